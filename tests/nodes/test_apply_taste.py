"""Apply Taste: the four nodes in one. What it chooses for which model, that it paints the same bytes as a graph of the
four, and what it says where something is missing."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.prefgen import ip_adapter_files
from tests.prefgen.comfy import studio, tiny_models
from tests.prefgen.tastes.test_taste import picture

VIT_H = {"visual_projection.weight": torch.zeros(1024, 1280)}  # all that is looked at before it is loaded


@pytest.fixture
def rooms(tmp_path, monkeypatch, pack):
    """An artist's empty model folders."""
    import folder_paths

    pack("prefgen.comfy.folders")
    for kind in ("prefgen", "LLM", "ipadapter", "clip_vision"):
        (tmp_path / kind).mkdir()
        suffixes = {".safetensors"} if kind == "clip_vision" else set()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], suffixes))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(scope="module")
def atelier(pack):
    return pack("prefgen.comfy.atelier_models").load_atelier()


@pytest.fixture
def apply(pack):
    return pack("nodes.taste").ApplyTaste.execute


@pytest.fixture
def chosen(pack):
    """choose(model, adapter=..., ...) -> Choice."""
    auto = pack("prefgen.comfy.auto")
    return lambda model, **request: auto.choose(model, auto.Request(**request))


def flux():
    """A model without cross-attention, as far as choosing looks at it."""
    inner = type("Flux", (), {"model_config": SimpleNamespace()})()
    return SimpleNamespace(model=inner, get_model_object=lambda _: torch.nn.Module())


def own_mllm(rooms, pack, name="mine"):
    """The atelier's MLLM as a folder of an artist's."""
    folder = rooms / "prefgen" / "mllm" / name
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(pack("prefgen.atelier.models").MLLM_FOLDER, target_is_directory=True)


def painted(model):
    """Two steps of the real sampler on an atelier model."""
    import comfy.sample

    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    states = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    conds = [[[states[i : i + 1], {}]] for i in range(2)]
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "sgm_uniform", *conds, torch.zeros_like(noise), disable_pbar=True, seed=0
        )


def test_it_paints_the_same_bytes_as_the_four_nodes(pack, rooms, atelier, apply):
    model, _, _, clip_vision = atelier
    history = pack("nodes.history").LoadPreferenceHistory.execute("example: ada").args
    mllm = pack("nodes.mllm").LoadPreferenceMLLM.execute("atelier").args[0]
    encode = pack("nodes.history").EncodePreferenceHistory.execute
    encoded = encode(history[0], [mllm], history[1], [clip_vision]).args[0]
    user = pack("nodes.user").FuseUserVector.execute(encoded, "atelier").args[0]
    explicit = pack("nodes.user").ApplyUserCrossAttention.execute(model, user, 0.8).args[0]
    output = apply(model, "example: ada", 0.8).args
    plain = painted(model)
    assert torch.equal(painted(output[0]), painted(explicit)) and not torch.equal(painted(output[0]), plain)
    assert output[1:3] == ("", "") and user.taste == "example: ada"
    for said in (
        "taste: example: ada",
        "adapter: atelier (",
        "MLLM: atelier (",
        "CLIP vision: atelier (",
        "weight: 0.8",
    ):
        assert said in output[3]
    assert f"user: {user.digest[:8]}" in output[3]


def test_strength_0_is_the_plain_model_and_no_words_and_reads_nothing(pack, atelier, apply, monkeypatch):
    monkeypatch.setattr(pack("prefgen.comfy.histories"), "load", None)
    output = apply(atelier[0], "example: ada", 0.0, "words only").args
    assert output[0] is atelier[0] and output[1:3] == ("", "")


def test_a_strength_that_moves_reads_nothing_again(pack, rooms, atelier, apply, monkeypatch):
    first = apply(atelier[0], "example: bruno", 1.0).args[3]
    monkeypatch.setattr(pack("prefgen.comfy.histories"), "load", None)
    monkeypatch.setattr(pack("prefgen.comfy.readers"), "load_mllm", None)
    monkeypatch.setattr(pack("prefgen.comfy.readers"), "load_clip_vision", None)
    assert apply(atelier[0], "example: bruno", 0.5).args[3] == first.replace("weight: 1,", "weight: 0.5,")


def test_an_ip_adapter_is_applied_for_taste_and_not_for_copying(pack, rooms, apply, monkeypatch, tmp_path):
    ip_adapter_files.write(rooms / "ipadapter", "ip-adapter-plus_sd15")
    save_file(VIT_H, rooms / "clip_vision" / "some name.safetensors")
    _, clip_vision = tiny_models.clip_vision("CLIP ViT-H", tmp_path)
    monkeypatch.setattr(pack("prefgen.comfy.readers"), "load_clip_vision", lambda name: clip_vision)
    model = studio.build()
    history = pack("nodes.history").LoadPreferenceHistory.execute("example: ada").args
    encode = pack("nodes.history").EncodePreferenceHistory.execute
    encoded = encode(history[0], disliked=history[1], clip_vision=[clip_vision]).args[0]
    adapter = "ipadapter/ip-adapter-plus_sd15.safetensors"
    user = pack("nodes.user").FuseUserVector.execute(encoded, adapter).args[0]
    explicit = pack("nodes.user").ApplyUserCrossAttention.execute(model, user, 0.7, blocks="style").args[0]
    output = apply(model, "example: ada").args
    assert torch.equal(studio.latents(output[0]), studio.latents(explicit))
    assert "weight: 0.7, blocks: style" in output[3] and "CLIP vision: some name.safetensors" in output[3]
    assert f"adapter: {adapter} ({user.adapter.digest[:8]})" in output[3]


def test_what_learnt_tastes_goes_before_plus_base_and_faces(pack, rooms, chosen):
    names = ("ip-adapter_sd15", "ip-adapter-full-face_sd15", "ip-adapter-plus_sd15", "ip-adapter_sdxl_vit-h")
    for name in names:
        ip_adapter_files.write(rooms / "ipadapter", name)
    plus = rooms / "ipadapter" / "ip-adapter-plus_sd15.safetensors"
    os.link(plus, rooms / "ipadapter" / "a-plus-face.safetensors")
    (rooms / "ipadapter" / "broken.safetensors").write_bytes(b"no adapter")
    save_file(VIT_H, rooms / "clip_vision" / "h.safetensors")
    fitting = pack("prefgen.comfy.auto").fitting
    order = [name.removeprefix("ipadapter/").removesuffix(".safetensors") for name, _ in fitting(studio.build())]
    assert order == ["ip-adapter-plus_sd15", "ip-adapter_sd15", "a-plus-face", "ip-adapter-full-face_sd15"]
    choice = chosen(studio.build())
    assert (choice.adapter, choice.clip_vision) == ("ipadapter/ip-adapter-plus_sd15.safetensors", "h.safetensors")
    assert choice.mllm is None
    assert chosen(studio.build("SDXL")).adapter == "ipadapter/ip-adapter_sdxl_vit-h.safetensors"


def test_the_atelier_takes_its_own_and_an_own_adapter_first(pack, rooms, atelier, chosen):
    choice = chosen(atelier[0])
    assert (choice.adapter, choice.mllm, choice.clip_vision) == ("atelier", "atelier", "atelier")
    shipped = pack("prefgen.atelier.models").WEIGHTS / "adapter.safetensors"
    (rooms / "prefgen" / "mine.safetensors").symlink_to(shipped)
    own_mllm(rooms, pack)
    assert chosen(atelier[0]).adapter == "mine.safetensors"
    assert chosen(atelier[0], mllm="mine").mllm == "mine"


def test_a_model_without_cross_attention_gets_words(pack, rooms, apply):
    own_mllm(rooms, pack)
    model = flux()
    output = apply(model, "example: ada").args
    assert output[0] is model and output[1] and output[2]
    assert "in words" in output[3] and "MLLM: mine (" in output[3] and "No adapter reaches Flux" in output[3]
    loaded = pack("prefgen.comfy.histories").load(pack("prefgen.comfy.folders").history_of("example: ada"))
    mllm = pack("nodes.mllm").LoadPreferenceMLLM.execute("mine").args[0]
    described = pack("nodes.describe").DescribePreference.execute([mllm], loaded.liked, loaded.disliked).args
    assert output[1:3] == described[:2]


def test_words_alone_can_be_asked_for_where_an_adapter_would_fit(pack, rooms, atelier, apply):
    output = apply(atelier[0], "example: ada", adapter="words only").args
    assert output[0] is atelier[0] and "palette" in output[1] and "No adapter" not in output[3]


def test_what_is_missing_is_one_sentence_with_its_place_and_the_set(pack, rooms, chosen, one_sentence):
    sets = pack("prefgen.download.fetch").load_sets()
    for model, words in (
        (flux(), ("Flux", "models/prefgen/mllm", "prefgen.download qwen3-vl-2b")),
        (studio.build(), ("SD1.5", "models/ipadapter", "prefgen.download sd15-plus")),
        (studio.build("SDXL"), ("SDXL", "models/ipadapter", "prefgen.download sdxl-plus")),
    ):
        with pytest.raises(ValueError) as raised:
            chosen(model)
        assert all(word in one_sentence(raised) for word in words)
        assert words[-1].split()[-1] in sets
    ip_adapter_files.write(rooms / "ipadapter", "ip-adapter-plus_sd15")
    with pytest.raises(ValueError, match="CLIP ViT-H, which isn't in models/clip_vision: `.*sd15-plus`") as raised:
        chosen(studio.build())
    one_sentence(raised)
    with pytest.raises(ValueError, match="No MLLM is here") as raised:
        chosen(studio.build(), adapter="words only")
    one_sentence(raised)


def test_an_adapter_whose_mllm_is_gone_says_which_one(pack, rooms, atelier, chosen, monkeypatch, one_sentence):
    monkeypatch.setattr(pack("prefgen.comfy.readers"), "trained_mllm", lambda trained: None)
    with pytest.raises(ValueError, match="was trained with the MLLM mllm") as raised:
        chosen(atelier[0], adapter="atelier")
    one_sentence(raised)


def test_an_mllm_is_known_by_its_weights_whatever_it_is_called(pack, rooms):
    readers = pack("prefgen.comfy.readers")
    trained = pack("prefgen.adapter_file").adapter_header(
        pack("prefgen.atelier.models").WEIGHTS / "adapter.safetensors"
    )
    assert readers.trained_mllm(trained.mllm) == ("atelier", "none")
    assert readers.trained_mllm(trained.mllm | {"revision": "0" * 64}) is None
    assert readers.trained_mllm(trained.mllm | {"lora": "0" * 64}) is None


@pytest.mark.parametrize("name", ip_adapter_files.LAYOUTS)
def test_a_header_alone_says_what_loading_says(pack, tmp_path, name):
    path = ip_adapter_files.write(tmp_path, name)
    files = pack("prefgen.adapter_file")
    assert files.adapter_header(path) == files.load_adapter(path).header


def test_a_name_that_is_not_offered_is_refused(pack, rooms, atelier, apply, one_sentence):
    node = pack("nodes.taste").ApplyTaste
    assert "There is no history named" in node.validate_inputs("../x")
    for wrong in ({"adapter": "../x"}, {"mllm": "../x"}, {"clip_vision": "../x"}):
        with pytest.raises(ValueError, match="choose one from the list") as raised:
            apply(atelier[0], "example: ada", 1.0, **wrong)
        one_sentence(raised)
        with pytest.raises(ValueError, match="choose one from the list"):
            node.fingerprint_inputs("example: ada", **wrong)


def test_the_fingerprint_follows_what_auto_may_take_and_nothing_else(pack, rooms):
    fingerprint = pack("nodes.taste").ApplyTaste.fingerprint_inputs
    seen = [fingerprint("example: ada"), fingerprint("example: bruno")]
    fixed = {"adapter": "atelier", "mllm": "atelier", "clip_vision": "atelier"}
    alone = fingerprint("example: ada", **fixed)
    assert fingerprint("example: ada", strength=0.3) == seen[0]
    ip_adapter_files.write(rooms / "ipadapter", "ip-adapter_sd15")
    seen.append(fingerprint("example: ada"))
    own_mllm(rooms, pack)
    seen.append(fingerprint("example: ada"))
    import folder_paths

    folder_paths.filename_list_cache.clear()
    save_file(VIT_H, rooms / "clip_vision" / "h.safetensors")
    seen.append(fingerprint("example: ada"))
    assert len(set(seen)) == len(seen) and fingerprint("example: ada", **fixed) == alone


def said_words(pack, rooms, monkeypatch):
    """(apply in words, a shelf with the taste "sea"): an MLLM that always says fog and boats stands for a large one."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(rooms / "input"))
    shelf = pack("prefgen.comfy.tastes").shelf()
    sea = shelf.new("sea")
    for number, verdict in enumerate(("liked", "disliked")):
        sea.rate(picture(number), verdict, f"{number}.png")
    module = pack("prefgen.comfy.apply_taste")
    traits = pack("prefgen.mllm.traits").Traits(("fog", "boats"), ("glare",), {})
    monkeypatch.setattr(module, "describe_history", lambda *_: traits)
    execute = pack("nodes.taste").ApplyTaste.execute
    return lambda name: execute(None, name, adapter="words only", mllm="atelier").result[1], shelf


def test_words_of_a_copy_and_of_a_renamed_taste_are_its_own(pack, rooms, monkeypatch):
    """A copy has the same files and times, so that what was read of the first might be taken for the copy's."""
    apply, shelf = said_words(pack, rooms, monkeypatch)
    assert apply("sea") == "fog, boats"
    shelf.copy("sea", "twin")
    assert apply("twin") == "fog, boats"
    shelf.taste("sea").say("fog", "liked", "struck")
    assert apply("sea") == "boats" and apply("twin") == "fog, boats"
    shelf.rename("sea", "lake")
    assert apply("lake") == "boats"


def test_a_revision_s_words_follow_what_the_artist_strikes_out(pack, rooms, monkeypatch):
    apply, shelf = said_words(pack, rooms, monkeypatch)
    name = f"sea@{shelf.taste('sea').keep_revision()}"
    nodes = pack("nodes.taste").ApplyTaste, pack("nodes").LoadPreferenceHistory
    before = [node.fingerprint_inputs(name) for node in nodes]
    assert apply(name) == "fog, boats"
    shelf.taste("sea").rate(picture(5), "liked", "5.png")
    assert [node.fingerprint_inputs(name) for node in nodes] == before, "a new verdict is none of its own"
    shelf.taste("sea").say("fog", "liked", "struck")
    assert all(node.fingerprint_inputs(name) != old for node, old in zip(nodes, before, strict=True))
    assert apply(name) == "boats"


def test_an_interrupt_stops_the_reading(pack, rooms, atelier, apply):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            apply(atelier[0], "example: chiyo")
    finally:
        comfy.model_management.interrupt_current_processing(False)
