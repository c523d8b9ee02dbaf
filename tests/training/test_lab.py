"""What a lab meets first: sizes that agree, devices that are here, users who dislike nothing, caches of old weights."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from prefgen.atelier import models
from prefgen.errors import MendableError
from prefgen.files import file_sha256
from tests.prefgen import tiny_mllms
from tests.training import tiny_bases, tiny_clip, warm
from training import export, probe_layers, train_mllm
from training.common import devices
from training.common.adapters import trained_adapter
from training.common.cache import digest_of
from training.common.config.command import load, stage_args
from training.common.config.schema import TrainUserAttention
from training.common.errors import exit_with_message
from training.data import preference_questions
from training.data.agents import __main__ as agents
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.errors import DataError
from training.data.open_world import open_world
from training.data.store import Store
from training.data.vqa import make as vqa
from training.data.worlds import DataSetWorld
from training.evaluation.scores import Clip, ScoreError

# Simulated users


def population_of(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["agents", "folder", *map(str, words)])
    return agents.population_of(agents.arguments())


def test_pictures_grow_with_the_users_unless_their_number_is_said(monkeypatch):
    assert population_of(monkeypatch).pictures == 990_998 and population_of(monkeypatch).users == 50_153
    assert population_of(monkeypatch, "--users", 300).pictures == 5928
    assert population_of(monkeypatch, "--users", 1).pictures == 20
    assert population_of(monkeypatch, "--users", 300, "--pictures", 601).pictures == 601
    with pytest.raises(DataError, match="--pictures must be at least twice --users"):
        population_of(monkeypatch, "--users", 300, "--pictures", 599)


def test_a_sets_size_is_that_of_the_configuration_which_trains_on_it(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    words = ("--renderer", "diffusers", "--pipeline", tmp_path)
    for name, pixels in (("sdxl_24gb", 1024), ("sd15_12gb", 512)):
        assert population_of(monkeypatch, *words, "--config", name).renderer.size == pixels == load(name).base.pixels
    with pytest.raises(DataError, match="--size 512: sdxl_24gb trains on 1024 pixels"):
        population_of(monkeypatch, *words, "--config", "sdxl_24gb", "--size", 512)


def test_a_set_that_was_painted_smaller_than_the_base_trains_on_is_told_by_every_stage(tmp_path, capsys):
    make(Population(12, 60, 3, 12, Atelier(64), None), tmp_path / "set", processes=1)
    sentence = "was painted at 64 pixels, base.pixels is 512: paint it with --size 512, or set base.pixels=64."
    open_world(load("sd15_12gb", [f"data.path={tmp_path / 'set'}"]), tmp_path)
    assert sentence in capsys.readouterr().err
    open_world(load("sd15_12gb", [f"data.path={tmp_path / 'set'}", "base.pixels=64"]), tmp_path)
    assert capsys.readouterr().err == ""


def test_a_set_that_was_painted_smaller_is_refused_by_the_branch(trained, monkeypatch, tmp_path):
    from training import train_user_attention

    line = ["train", "--config", str(trained.config), "--runs", str(tmp_path), "--set", "base.pixels=128"]
    monkeypatch.setattr(sys, "argv", line)
    for folder in ("extract", "probe_layers", "train_alignment"):
        (tmp_path / folder).symlink_to(trained.runs / folder)
    with pytest.raises(SystemExit, match="was painted at 80 pixels, base.pixels is 128: paint it with --size 128"):
        train_user_attention.main()


# Devices


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "cuda:99", "mps", "xpu", "vulkan"])
def test_a_device_that_is_not_here_is_one_sentence(name):
    with pytest.raises(MendableError, match="^--device ") as caught:
        devices.checked_device(name)
    assert len(str(caught.value).splitlines()) == 1


def test_devices_that_are_here_are_taken(monkeypatch):
    assert devices.checked_device("cpu") == "cpu" and devices.checked_device(devices.default_device())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.checked_device("cuda") == "cuda" and devices.checked_device("cuda:1") == "cuda:1"
    with pytest.raises(MendableError, match="--device cuda:2: torch sees cuda:0 to cuda:1 here"):
        devices.checked_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_every_command_with_a_device_says_in_one_sentence_that_it_is_not_here(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    paint = ["training.data.agents", tmp_path / "set", "--renderer", "diffusers", "--pipeline", tmp_path]
    compare = [
        "training.evaluation.compare",
        "--config",
        "sd15_12gb",
        "--adapter",
        "a",
        "--clip",
        "c",
        "--out",
        tmp_path / "out",
    ]
    for line in (paint, compare):
        line = [sys.executable, "-m", *map(str, line), "--device", "cuda"]
        ran = warm.run(line)
        assert ran.returncode == 1 and len(ran.stderr.strip().splitlines()) == 1
        assert ran.stderr.startswith("--device cuda: torch can't use any cuda here")
    assert not (tmp_path / "set").exists() and not (tmp_path / "out").exists()


# Export


def exported(monkeypatch, world, *words):
    out = world.runs / f"{len(words)}-{'-'.join(words).strip('-')}.safetensors"
    line = ["export", "--config", str(world.config), "--runs", str(world.runs), "--out", str(out), "--unfinished"]
    monkeypatch.setattr(sys, "argv", [*line, *words])
    with exit_with_message():
        export.main()
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of the branch, a step long."""
    from training import train_alignment, train_user_attention

    world = tiny_bases.world(tmp_path_factory.mktemp("export"), "sd15")
    short = {"steps": 1, "batch": 2, "users": 2, "lr": 1e-3, "ema": 0.9}
    sections = {"train_alignment": {"steps": 1}, "train_user_attention": short}
    world.config = tiny_bases.write_config(world.config, "sd15", world.base, world.data, **sections)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stage in (train_alignment, train_user_attention):
            words = [stage.__name__, "--config", str(world.config), "--runs", str(world.runs)]
            monkeypatch.setattr(sys, "argv", words)
            stage.main()
    return world


def test_an_export_is_fp16_with_fp32_normalisers_and_half_the_size(trained, monkeypatch):
    full, half = (exported(monkeypatch, trained, *words) for words in (("--dtype", "fp32"), ()))
    exact, stored = load_file(full), load_file(half)
    norms = {key for key in stored if "_norm." in key}
    assert norms and all(stored[key].dtype == torch.float32 for key in norms)
    assert all(stored[key].dtype == torch.float16 for key in stored if key not in norms)
    assert half.stat().st_size < 0.55 * full.stat().st_size
    for key, value in stored.items():
        assert torch.allclose(value.float(), exact[key], rtol=1e-3, atol=1e-6), key


def spoilt(trained, value):
    adapter = trained_adapter(
        stage_args(TrainUserAttention, load(trained.config), trained.runs),
        unfinished=True,
    )
    adapter.to_k_ip[0].weight.data[0, 0] = value
    return adapter


@pytest.mark.parametrize(
    "value, sentence", [(1e6, "too large for fp16: export with --dtype fp32"), (float("nan"), "is not finite")]
)
def test_a_weight_that_fp16_cannot_hold_is_refused_by_its_name(trained, value, sentence):
    with pytest.raises(SystemExit, match=f"to_k_ip.0.weight .*{sentence}"):
        export.stored(spoilt(trained, value), "fp16")
    if value == 1e6:
        assert export.stored(spoilt(trained, value), "fp32").to_k_ip[0].weight[0, 0] == value


# Probes


def test_probes_say_which_controls_no_layer_beats():
    rng = np.random.default_rng(0)
    chance = {name: rng.random(60) for name in ("same_user", "named", "liked_first")}
    knowing = {name: 0.5 + 0.5 * rng.random(60) for name in chance}

    def row(values, shuffled):
        return values | {f"{name}_shuffled": shuffled[name] for name in values}

    by_user = {"colour": row(chance, chance), "0": row(knowing, chance), "1": row(chance, chance)}
    assert probe_layers.unbeaten(by_user, 2) == []
    by_user["0"] = row({name: chance[name][::-1] for name in chance}, chance)
    said = probe_layers.unbeaten(by_user, 2)
    assert len(said) == 6 and "No layer beats shuffled labels in 'liked above disliked'." in said
    by_user["0"] = row(knowing | {"named": chance["named"]}, chance)
    assert said[2:4] == probe_layers.unbeaten(by_user, 2) != []


# Users who dislike nothing


def only_liked(folder, users):
    """Turn these users' disliked pictures into liked ones, in the finished set."""
    index = pq.read_table(folder / "index.parquet").to_pydict()
    index["verdict"] = ["liked" if u in users else v for u, v in zip(index["user"], index["verdict"], strict=True)]
    schema = pq.read_schema(folder / "index.parquet")
    pq.write_table(pq.read_table(folder / "index.parquet").from_pydict(index, schema), folder / "index.parquet")
    people = pq.read_table(folder / "users.parquet")
    rows = [row | ({"dislikes": []} if row["user"] in users else {}) for row in people.to_pylist()]
    pq.write_table(people.from_pylist(rows, people.schema), folder / "users.parquet")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A set in which some users dislike nothing; an MLLM; questions."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny_bases.write_data(folder / "agents")
    users = DataSetWorld(folder / "agents").users("train")
    only_liked(folder / "agents", set(users[::2]))
    vqa.make(folder / "agents", folder / "vqa", 10, seed=0)
    tiny_mllms.write_folder(folder / "mllm", "LLaVA-OneVision")
    return folder


def configured(folder, path, data, questions, **changes):
    sections = {"steps": 2, "batch": 8, "users": 0, "pictures": 3, "contrast": 1.0, "others": 0.25, "lr": 0.01}
    content = {
        "hardware": "a test",
        "data": {"path": str(data), "questions": questions and str(questions)},
        "base": {"family": "sd15", "path": str(folder / "base"), "pixels": 64},
        "mllm": {"path": str(folder / "mllm"), "precision": "fp32", "lora": {"rank": 2}},
        "clip_vision": {"path": str(folder / "vision")},
        "train_mllm": sections | changes,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def train(monkeypatch, config, runs):
    monkeypatch.setattr(sys, "argv", ["train_mllm", "--config", str(config), "--runs", str(runs)])
    with exit_with_message():
        train_mllm.main()


def samples(world, questions, users, step, others=0.25):
    config = load("sd15_12gb", ["train_mllm.batch=24", f"train_mllm.others={others}", "train_mllm.contrast=1.0"])
    section = config.train_mllm.model_copy(update={"batch": 24, "pictures": 3})
    return train_mllm.samples_of(world, questions, users, section, 1, np.random.default_rng([8, step]))


def test_nobody_is_asked_about_a_picture_with_the_answer_of_the_other_verdict(mixed):
    world = DataSetWorld(mixed / "agents")
    questions, users = preference_questions.Questions(world, mixed / "vqa"), world.users("train")
    asked = skipped = 0
    for step in range(12):
        batch = samples(world, questions, users, step)
        skipped += batch.skipped
        assert len(batch.pairs) % 2 == 0
        for pair in batch.pairs:
            assert world.is_liked[pair.shown[0]] == (pair.answer == "yes")
            asked += 1
    assert asked and skipped


def test_a_set_in_which_everybody_dislikes_something_gives_the_same_samples_as_before(tmp_path):
    make(Population(40, 240, 3, 40, Atelier(64), None), tmp_path / "set", processes=1)
    world = DataSetWorld(tmp_path / "set")
    users = world.users("train")
    vqa.make(tmp_path / "set", tmp_path / "vqa", 10, seed=0)
    questions = preference_questions.Questions(world, tmp_path / "vqa")
    batch = samples(world, questions, users, 0)
    rng, pairs = np.random.default_rng([8, 0]), []  # as it was written before
    count, others, wanted = 6, 6, 3
    chosen = [users[i] for i in rng.choice(len(users), count, replace=False)]
    rest = [users[i] for i in rng.choice(len(users), others + wanted, replace=False)]
    liked, disliked = int(rng.choice([1, 2, 3, 3])), int(rng.choice([0, 2, 3, 3]))
    [preference_questions.closing(world, user, rng, liked, disliked) for user in (*chosen, *chosen)]
    [questions.ask(user, rng, liked, disliked) for user in rest[:others]]
    for user in rest[others:]:
        history = world.history(user, rng, liked, max(1, disliked))
        pairs += [preference_questions.would(world, user, history, rng, verdict) for verdict in (True, False)]
    assert batch.skipped == 0 and batch.users == chosen
    assert [p.shown.tolist() for p in batch.pairs] == [p.shown.tolist() for p in pairs]
    assert [p.history.pictures.tolist() for p in batch.pairs] == [p.history.pictures.tolist() for p in pairs]


def test_a_question_about_a_verdict_that_the_user_never_gave_is_refused(mixed):
    world = DataSetWorld(mixed / "agents")
    user = next(user for user in world.users("train") if not world.has_disliked(user))
    history = world.history(user, np.random.default_rng(0), 2, 2)
    with pytest.raises(DataError, match=f"User {user} of .* has no disliked picture"):
        preference_questions.would(world, user, history, np.random.default_rng(0), liked=False)


def test_one_disliked_picture_is_enough_to_ask_about(mixed, monkeypatch):
    world = DataSetWorld(mixed / "agents")
    for count in (0, 1, 2):
        monkeypatch.setattr(world, "_history_rows", lambda *_, liked, count=count: np.arange(0 if liked else count))
        assert world.has_disliked(0) == (count > 0)


def test_the_taste_of_a_user_who_avoids_nothing_ends_with_what_is_liked(mixed):
    world = DataSetWorld(mixed / "agents")
    for user in world.users("train"):
        answer = preference_questions.taste_answer(world, user)
        assert answer.startswith("likes ") and ("avoids" in answer) == bool(world.dislikes(user))
        assert not answer.endswith(("avoids ", "; "))


def test_training_counts_the_pairs_that_it_leaves_out_and_says_so(mixed, tmp_path, monkeypatch, capsys):
    config = configured(mixed, tmp_path / "run.yaml", mixed / "agents", mixed / "vqa")
    train(monkeypatch, config, tmp_path / "runs")
    lines = (tmp_path / "runs/train_mllm/log.jsonl").read_text().splitlines()
    assert "pairs_skipped" in json.loads(lines[0])
    world = DataSetWorld(mixed / "agents")
    users = world.users("train")
    lacking = sum(not world.has_disliked(user) for user in users)
    assert json.loads((tmp_path / "runs/train_mllm/done").read_text())["users_without_dislikes"] == lacking
    assert f"{lacking} of {len(users)} users have no disliked picture" in capsys.readouterr().err


def test_a_set_of_likes_alone_trains_to_the_end_without_questions_and_contrast(tmp_path, mixed, monkeypatch):
    tiny_bases.write_data(tmp_path / "liked")
    only_liked(tmp_path / "liked", set(range(40)))
    report = vqa.make(tmp_path / "liked", tmp_path / "vqa", 10, seed=0)
    assert report["questions"]["train"] == {}
    config = configured(mixed, tmp_path / "asks.yaml", tmp_path / "liked", tmp_path / "vqa")
    with pytest.raises(SystemExit, match="No questions could be made of .*set train_mllm.others=0"):
        train(monkeypatch, config, tmp_path / "asks")
    config = configured(mixed, tmp_path / "run.yaml", tmp_path / "liked", None, others=0, contrast=0)
    train(monkeypatch, config, tmp_path / "runs")
    done = json.loads((tmp_path / "runs/train_mllm/done").read_text())
    assert "liked_precision" in done and "disliked_precision" not in done


# Judges


@pytest.mark.parametrize("version, keyword", [("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.20.2", "dtype")])
def test_a_judges_precision_is_asked_for_by_the_keyword_of_the_installed_transformers(monkeypatch, version, keyword):
    import transformers

    seen = {}

    def from_pretrained(folder, **options):
        seen.update(options)
        raise OSError("no such folder")

    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", from_pretrained)
    with pytest.raises(ScoreError, match="download it whole"):
        Clip("folder", dtype=torch.bfloat16)
    assert seen[keyword] is torch.bfloat16 and not {"dtype", "torch_dtype"} - {keyword} & seen.keys()
    assert seen["use_safetensors"] is True


def test_a_call_that_transformers_does_not_know_is_not_told_as_a_broken_folder(monkeypatch):
    import transformers

    def from_pretrained(folder, **options):
        raise TypeError("got an unexpected keyword argument")

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", from_pretrained)
    with pytest.raises(TypeError):
        Clip("folder")


# Caches


def test_a_digest_tells_weights_apart_by_content_dtype_and_name():
    torch.manual_seed(0)
    layer, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    before = digest_of(layer)
    assert before != digest_of(other) and before == digest_of(layer) != digest_of(layer, other)
    assert digest_of(torch.nn.Linear(3, 3).bfloat16()) != before
    layer.weight.data[0, 0] += 1e-6
    assert digest_of(layer) != before


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A small pool of pictures, and a folder of weights that a test may retrain."""
    import shutil

    from training.atelier import pool
    from training.data.picture_pool import PicturePool

    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("clip.safetensors", "vae.safetensors"):
        shutil.copy(models.WEIGHTS / name, weights / name)
    monkeypatch.setattr(models, "WEIGHTS", weights)
    line = ["pool", "--runs", str(tmp_path), "--set", "atelier.pool.count=70", "--set", "atelier.pool.processes=1"]
    monkeypatch.setattr(sys, "argv", line)
    pool.main()
    return PicturePool(tmp_path)


def retrain(name):
    from safetensors import safe_open

    path = models.WEIGHTS / f"{name}.safetensors"
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    state = {key: value * 1.5 if value.is_floating_point() else value for key, value in load_file(path).items()}
    save_file(state, path, metadata)


def test_latents_of_the_pool_are_kept_until_the_vae_is_retrained(pool, tmp_path):
    from training.data.picture_pool import pool_latents

    first = pool_latents(tmp_path, pool)
    mtime = (tmp_path / "latents.npy").stat().st_mtime_ns
    assert torch.equal(pool_latents(tmp_path, pool), first) and (tmp_path / "latents.npy").stat().st_mtime_ns == mtime
    retrain("vae")
    with pytest.raises(SystemExit, match="latents.json was made for another .*vae"):
        pool_latents(tmp_path, pool)
    for file in tmp_path.glob("latents.*"):
        file.unlink()
    assert not torch.equal(pool_latents(tmp_path, pool), first)


def test_clip_embeddings_of_the_pool_are_kept_until_clip_is_retrained(pool, tmp_path):
    from training.data.image_encoders import AtelierImageEncoder

    world = SimpleNamespace(pool=pool)
    first = AtelierImageEncoder(world, tmp_path)(np.arange(70))
    assert torch.equal(AtelierImageEncoder(world, tmp_path)(np.arange(70)), first)
    retrain("clip")
    with pytest.raises(SystemExit, match="clip_images.json was made for another clip"):
        AtelierImageEncoder(world, tmp_path)


def test_an_array_of_before_that_nothing_vouches_for_is_made_anew(pool, tmp_path):
    from training.data.picture_pool import pool_latents

    np.save(tmp_path / "latents.npy", np.zeros((70, 8, 16, 16), np.float16))
    assert pool_latents(tmp_path, pool).abs().sum() > 0


def test_another_pool_has_another_digest(pool, tmp_path, monkeypatch):
    digest = pool.digest
    pictures = np.load(tmp_path / "atelier.pool/pictures.npy", mmap_mode="r+")
    pictures[69, 0, 0, 0] += 1
    pictures.flush()
    assert type(pool)(tmp_path).digest != digest


def test_latents_of_a_data_set_that_was_made_anew_at_its_path_are_refused(trained, tmp_path):
    from training.common.bases import load_base
    from training.data.branch_caches import LatentCache, TextCache

    config = load(trained.config)
    base = load_base(config)
    world = DataSetWorld(trained.data)
    targets = world.all_targets(world.users("train")[:4])
    run, args = SimpleNamespace(rank=0, world_size=1), stage_args(TrainUserAttention, config, tmp_path)
    LatentCache.of_targets(args, base, world, targets, run)
    TextCache(args, base, world, targets, run)
    anew = DataSetWorld(trained.data)
    anew.digest = "another"
    with pytest.raises(SystemExit, match="latents.json was made for another data"):
        LatentCache.of_targets(args, base, anew, targets, run)
    base.vae.encoder.conv_in.weight.data += 1
    with pytest.raises(SystemExit, match="latents.json was made for another vae"):
        LatentCache.of_targets(args, base, world, targets, run)
    base.encoders[0][1].get_input_embeddings().weight.data += 1
    with pytest.raises(SystemExit, match="texts.json was made for another encoders"):
        TextCache(args, base, world, targets, run)


def test_an_image_encoder_is_known_by_its_weights(tmp_path):
    from training.data.image_encoders import ClipImageEncoder

    digests = []
    for seed in (0, 1):
        tiny_clip.write(tmp_path / str(seed), seed, projection=512)
        digests.append(ClipImageEncoder(None, tmp_path / str(seed), "cpu").digest)
    assert digests[0] != digests[1]


def test_a_set_is_known_by_its_manifest(tmp_path):
    make(Population(12, 60, 3, 12, Atelier(32), None), tmp_path / "set", processes=1)
    assert DataSetWorld(tmp_path / "set").digest == file_sha256(tmp_path / "set/manifest.json")
    assert Store(tmp_path / "set", Population(12, 60, 3, 12, Atelier(32), None).config()).done


def test_image_tokens_are_refused_with_other_eyes_or_another_pool_than_made_them(pool, tmp_path):
    from prefgen.atelier.models import MLLM_FOLDER
    from prefgen.mllm.model import PreferenceMLLM
    from training.data.image_tokens import pool_image_tokens, vision_digest

    model = PreferenceMLLM.load(MLLM_FOLDER).model
    folder = tmp_path / "atelier.mllm_vision"
    folder.mkdir()
    np.save(folder / "tokens.npy", np.zeros((70, 4, 192), np.float16))
    for made_of, words in (
        ({}, "another pool and other eyes"),
        ({"pool": pool.digest, "eyes": "0"}, "another eyes"),
        ({"pool": "0", "eyes": vision_digest(model)}, "another pool"),
    ):
        (folder / "tokens.json").write_text(json.dumps(made_of))
        with pytest.raises(SystemExit, match=f"were made with {words}: delete that folder"):
            pool_image_tokens(tmp_path, pool, model)
    (folder / "tokens.json").write_text(json.dumps({"pool": pool.digest, "eyes": vision_digest(model)}))
    assert len(pool_image_tokens(tmp_path, pool, model)) == 70
