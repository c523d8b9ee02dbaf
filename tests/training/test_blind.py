"""Sets that know no attributes, as real people's: every stage that an adapter of some parts needs, to a file that
paints.

In one process, on a tiny SD1.5 and a tiny MLLM; each stage is its own command's `main`.
"""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from prefgen.adapter_file import load_adapter
from prefgen.encoded import EncodedPreference
from prefgen.fusion import fuse_user
from prefgen.mllm.model import PreferenceMLLM
from tests.closeness import assert_close
from tests.prefgen import tiny_mllms
from tests.training import tiny_bases, tiny_clip
from training import export, extract, probe_layers, train_alignment, train_mllm, train_user_attention
from training.common.config.command import load
from training.common.config.schema import STAGES
from training.common.errors import exit_with_message
from training.common.user_branch import connect, install
from training.data import targets, traits
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.check import check
from training.data.errors import DataError
from training.data.vqa import make as vqa
from training.data.worlds import DataSetWorld, counted

MODULES = {
    "train_mllm": train_mllm,
    "extract": extract,
    "probe_layers": probe_layers,
    "train_alignment": train_alignment,
    "train_user_attention": train_user_attention,
}
IMAGE = 16
SHARED = ("train_mllm", "extract", "probe_layers")


def forget_attributes(folder):
    """The set as people's ratings would give it."""
    users = pq.read_table(folder / "users.parquet")
    rows = [row | {"tastes": [], "dislikes": []} for row in users.to_pylist()]
    pq.write_table(users.from_pylist(rows, users.schema), folder / "users.parquet")
    index = pq.read_table(folder / "index.parquet")
    rows = [row | {"attributes": []} for row in index.to_pylist()]
    pq.write_table(index.from_pylist(rows, index.schema), folder / "index.parquet")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("blind")
    make(Population(40, 800, 3, 40, Atelier(80), None), folder / "people", processes=1)
    forget_attributes(folder / "people")
    vqa.make(folder / "people", folder / "vqa", 10, seed=0)
    tiny_bases.write_base(folder / "base", "sd15")
    tiny_mllms.write_folder(folder / "mllm", "SmolVLM2")
    torch.manual_seed(3)
    sizes = {"image_size": tiny_clip.SIDE, "patch_size": tiny_clip.PATCH, "projection_dim": IMAGE}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny_clip.TOWER, **sizes)).save_pretrained(folder / "vision")
    content = {
        "hardware": "a test",
        "data": {"path": str(folder / "people"), "questions": str(folder / "vqa")},
        "base": {"family": "sd15", "path": str(folder / "base"), "pixels": tiny_bases.PIXELS, "precision": "fp32"},
        "mllm": {"path": str(folder / "mllm"), "precision": "fp32", "lora": {"rank": 2}},
        "clip_vision": {"path": str(folder / "vision")},
        "train_mllm": {"steps": 2, "batch": 8, "users": 20, "pictures": 3, "contrast": 1.0, "others": 0.25},
        "extract": {"users": 24, "histories": 2, "pictures": 3, "batch": 8},
        "probe_layers": {"users": 2, "histories": 2, "pictures": 2},
        "train_alignment": {"steps": 2, "batch": 16, "bank": 16, "hidden": 24},
        "train_user_attention": {"steps": 2, "batch": 4, "warmup": 2, "ema": 0.9, "users": 3, "distil": 0.5},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


def command(module, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        with exit_with_message():
            module.main()


def train(lab, runs, parts, *changes):
    """Every stage in order, as a pipeline script starts them; those that aren't needed end at once."""
    options = [word for change in (f"train_user_attention.parts={parts}", *changes) for word in ("--set", change)]
    common = ["--config", lab / "run.yaml", "--runs", runs, *options]
    for stage in STAGES:
        try:
            command(MODULES[stage], *common)
        except SystemExit as end:
            assert end.code == 0, end
    command(export, *common, "--out", runs / "prefgen.safetensors", "--dtype", "fp32")
    return load_adapter(runs / "prefgen.safetensors")


@pytest.fixture(scope="module")
def reading(lab):
    """What all adapters with an MLLM share: its LoRA, the extracted users, the layers."""
    runs = lab / "reading"
    train(lab, runs, "[core,image]")
    return runs


def shared(reading, folder):
    folder.mkdir()
    for stage in SHARED:
        (folder / stage).symlink_to(reading / stage)
    return folder


def paints(lab, adapter, path):
    """The branch of the file moves the base's prediction, by as much in stock diffusers as here."""
    import diffusers

    absent = {"safety_checker": None, "requires_safety_checker": False}
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(lab / "base"), **absent)
    draw = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 7, 768, generator=draw)
    read = EncodedPreference(
        hidden=torch.randn(tiny_mllms.LAYERS, tiny_mllms.WIDTH, generator=draw),
        image_embed_liked=torch.randn(2, IMAGE, generator=draw),
        image_embed_disliked=None,
    )
    user = fuse_user(adapter, read)

    def predict(**more):
        with torch.no_grad():
            return pipeline.unet(latents, 500, text, added_cond_kwargs=more or None).sample

    processors = dict(pipeline.unet.attn_processors)
    branch = install(pipeline.unet)
    connect(branch, None)
    plain = predict()
    connect(branch, [(k[:1], v[:1]) for k, v in user.keys_values()])
    ours = predict()
    pipeline.unet.set_attn_processor(processors)
    pipeline.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    assert_close(ours, predict(image_embeds=[user.vector[None, None]]), ulps=64, unlike=plain)


@pytest.mark.slow
def test_an_image_adapter_trains_without_an_mllm(lab, tmp_path, capsys):
    runs = tmp_path / "runs"
    adapter = train(lab, runs, "[image]", "mllm.path=null", "mllm.lora=null")
    assert not any((runs / stage).exists() for stage in ("train_mllm", "probe_layers", "train_alignment"))
    assert not (runs / "extract/hidden.npy").exists()
    assert capsys.readouterr().out.count("alone doesn't need this stage; skipped") == 3
    header = adapter.header
    assert (header.semantic_width, header.core_width, header.image_width, header.mllm) == (0, 0, IMAGE, None)
    paints(lab, adapter, runs / "prefgen.safetensors")


@pytest.mark.slow
def test_core_and_image_train_without_an_alignment(lab, reading):
    adapter = load_adapter(reading / "prefgen.safetensors")
    assert not (reading / "train_alignment").exists()
    header = adapter.header
    assert (header.semantic_width, header.core_width, header.image_width) == (0, tiny_mllms.WIDTH, IMAGE)
    assert header.mllm["sem_layers"] == [] and header.mllm["core_layer"] is not None and header.mllm["lora"]
    log = (reading / "train_user_attention/log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["distil"] == 0, "nobody knows a taste in words"
    paints(lab, adapter, reading / "prefgen.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["prompts", "traits"])
def test_all_three_parts_train_on_what_a_blind_set_knows(lab, reading, tmp_path, target):
    runs = shared(reading, tmp_path / "runs")
    if target == "traits":
        world = DataSetWorld(lab / "people")
        report = traits.make(world, PreferenceMLLM.load(lab / "mllm"), 2)
        assert report["users"] == len(world.users("train"))
        # A tiny random MLLM may say nothing but its own signs: these are words that CLIP can read.
        write_traits(lab / "people", {user: [f"trait{user % 5}", "a boat"] for user in world.users("train")})
    adapter = train(lab, runs, "[semantic,core,image]")
    figures = json.loads((runs / "train_alignment/done").read_text())
    assert figures["target"] == target and figures["candidates"] == 2
    assert adapter.header.semantic_width == 768
    log = json.loads((runs / "train_user_attention/log.jsonl").read_text().splitlines()[0])
    assert (log["distil"] > 0) == (target == "traits"), "traits have a words teacher, prompts have none"
    paints(lab, adapter, runs / "prefgen.safetensors")


def write_traits(folder, liked):
    """Other words in the place of those that were told."""
    path = folder / "traits/traits.parquet"
    table = pq.read_table(path)
    rows = [row | {"liked": liked[row["user"]]} for row in table.to_pylist()]
    pq.write_table(table.from_pylist(rows, table.schema), path)


# Targets


class Known:
    """A world that knows as much as it is given."""

    def __init__(self, attributes=(), traits=None, verdicts=None):
        self.attributes, self.traits = list(attributes), traits or {}
        self.counts = verdicts or {}

    def texts(self, user):
        return ["round shapes", "", "pastel palette"]

    def verdicts(self, user):
        return self.counts


def test_the_target_is_the_first_that_there_is():
    traits = {1: (["red", "round"], ["blue"])}
    assert targets.target_of(Known(["palette/pastel"], traits), "auto") == "attributes"
    assert targets.target_of(Known([], traits), "auto") == "traits"
    assert targets.target_of(Known(), "auto") == "prompts"
    assert targets.target_of(Known(["palette/pastel"], traits), "prompts") == "prompts"
    world = Known(["palette/pastel"], traits)
    assert targets.texts_of(world, "attributes", 1) == [("round shapes", 1.0), ("pastel palette", 1.0)]
    assert targets.texts_of(world, "traits", 1) == [("red, round", 1.0)]
    assert targets.texts_of(world, "traits", 2) == []


def test_what_is_disliked_of_a_prompt_takes_away_from_it():
    liked = np.array([True, True, True, False, False, True])
    counts = counted(["a cat", "a cat", "a boat", "a boat", "a tree", ""], liked)
    assert counts == {"a cat": (2, 0), "a boat": (1, 1), "a tree": (0, 1)}
    texts = targets.texts_of(Known(verdicts=counts), "prompts", 1)
    assert texts == [("a boat", 0.5), ("a cat", 2.0)]


def test_the_bank_is_the_weighted_mean_of_the_texts():
    class Text:
        def text_bank(self, texts):
            assert texts == ["a boat", "a cat"]
            return torch.eye(2)

    world = Known(verdicts={"a cat": (2, 0), "a boat": (1, 1)})
    bank = train_alignment.user_bank(Text(), world, [1], "prompts")
    torch.testing.assert_close(bank, torch.nn.functional.normalize(torch.tensor([[0.5, 2.0]])))


def test_a_hidden_attribute_is_known_nowhere(tmp_path):
    tiny_bases.write_data(tmp_path / "set")
    seen, blind = DataSetWorld(tmp_path / "set"), DataSetWorld(tmp_path / "set", attributes=False)
    user = seen.users("train")[0]
    assert seen.attributes and seen.tastes(user) and seen.target(user, np.random.default_rng(0)).enriched
    assert blind.attributes == [] and blind.tastes(user) == [] == blind.dislikes(user) == blind.texts(user)
    assert blind.target(user, np.random.default_rng(0)).enriched is None
    assert blind.digest == seen.digest
    config = load("sd15_12gb", [f"data.path={tmp_path / 'set'}", "data.attributes=false", "base.pixels=64"])
    from training.data.open_world import open_world

    assert open_world(config, tmp_path).attributes == []


def test_the_ateliers_users_keep_their_tastes_to_themselves_when_told_to(tmp_path):
    from training.data.worlds import AtelierWorld

    (tmp_path / "atelier.pool").mkdir()
    (tmp_path / "atelier.pool/done").write_text("{}")
    np.save(tmp_path / "atelier.pool/pictures.npy", np.zeros((60, 1, 1, 3), np.uint8))
    labels = np.random.default_rng(0).integers(0, 2, (60, 12))
    np.save(tmp_path / "atelier.pool/labels.npy", labels.astype(np.int8))
    seen, blind = AtelierWorld(tmp_path), AtelierWorld(tmp_path, attributes=False)
    user = seen.users("train", 3)[0]
    blind.users("train", 3)
    assert seen.tastes(user) and not blind.tastes(user) and not blind.dislikes(user) and not blind.attributes
    one, other = (world.target(user, np.random.default_rng(0)) for world in (seen, blind))
    assert (one.picture, one.prompt) == (other.picture, other.prompt) and one.enriched and other.enriched is None
    likes = blind.verdicts(user)
    assert sum(map(sum, likes.values())) == 32 and all(prompt for prompt in likes)


# Traits


class Talker:
    """An MLLM that says how many pictures it saw."""

    fingerprint = {"name": "talker"}

    def __init__(self, limit=None):
        self.asked, self.limit = 0, limit

    def answer(self, history, question):
        self.asked += 1
        if self.limit and self.asked > self.limit:
            raise KeyboardInterrupt
        return f"likes {len(history.liked)} boats ; avoids {len(history.disliked)} trees"


def test_traits_are_told_once_and_resumed_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(traits, "USERS_AT_ONCE", 4)
    for name in ("one", "two"):
        tiny_bases.write_data(tmp_path / name)
    one, two = (DataSetWorld(tmp_path / name) for name in ("one", "two"))
    straight = Talker()
    report = traits.make(one, straight, 2, 10)
    assert straight.asked == 10 == report["users"] == report["told"] and report["disliked"] == 10
    with pytest.raises(KeyboardInterrupt):
        traits.make(two, Talker(limit=6), 2, 10)
    assert not two.traits, "what is half told isn't read"
    rest = Talker()
    traits.make(two, rest, 2, 10)
    assert rest.asked == 6, "four of the six were on the disk"
    content = [(tmp_path / name / "traits/traits.parquet").read_bytes() for name in ("one", "two")]
    assert content[0] == content[1] and not (tmp_path / "two/traits/.parts").exists()
    read = DataSetWorld(tmp_path / "two").traits
    assert len(read) == 10 and all(value == (["2 boats"], ["2 trees"]) for value in read.values())
    with pytest.raises(DataError, match="holds other traits"):
        traits.make(one, Talker(), 3, 10)
    # The set's own check knows them, and tells them apart from files that don't belong there.
    assert all(not faults for _, faults in check(tmp_path / "one"))
    (tmp_path / "one/traits/traits.parquet").write_bytes(b"")
    assert dict(check(tmp_path / "one"))["files and checksums"] == ["traits/traits.parquet has another checksum"]


def test_traits_of_another_set_are_refused(tmp_path):
    tiny_bases.write_data(tmp_path / "set")
    world = DataSetWorld(tmp_path / "set")
    traits.make(world, Talker(), 2, 3)
    manifest = tmp_path / "set/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"versions": {}}))
    with pytest.raises(DataError, match="was made of another set: delete it"):
        _ = DataSetWorld(tmp_path / "set").traits
