"""Which image encoder read the pictures: known by its weights, not by its width alone."""

import json
import os

import comfy.clip_vision
import pytest
import torch

from prefgen.image_encoder import described, weights_digest
from tests.prefgen import ip_adapter_files as files
from tests.prefgen.comfy.tiny_models import ENCODERS, clip_vision

PICTURES = [torch.rand(1, 70, 56, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
CLIP_VISION = {  # (hidden size, projection; None for an encoder without one)
    "clip_vision_model": {"num_attention_heads": 16, "hidden_act": "gelu"},
    "siglip_vision_model": {"num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    "dinov2": {"num_attention_heads": 16, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "image_size": 518},
}


def encoder(folder, kind, hidden, projection=None, **more):
    """ComfyUI's own class for a kind of encoder, one layer deep, random weights."""
    config = {"model_type": kind, "hidden_size": hidden, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14}
    config |= {"intermediate_size": 64, "num_channels": 3} | CLIP_VISION[kind] | more
    if projection:
        config["projection_dim"] = projection
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(config))
    tower = comfy.clip_vision.ClipVisionModel(str(path))
    tower.dtype = torch.float32
    tower.model.float()
    generator = torch.Generator().manual_seed(hidden)
    with torch.no_grad():
        for parameter in tower.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return tower


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """(transformers' ViT-H, ComfyUI's), three layers deep."""
    return clip_vision("CLIP ViT-H", tmp_path_factory.mktemp("vision"))


@pytest.fixture
def read(pack):
    def encode(clip_vision):
        history = pack("prefgen.history").PreferenceHistory.from_images(PICTURES[:2], PICTURES[2:])
        with torch.no_grad():
            return pack("prefgen.comfy.encoding").encode_history(history, None, clip_vision)

    return encode


@pytest.fixture
def refused(pack):
    def check(header, encoded) -> str:
        checks = pack("prefgen.adapter_checks")
        with pytest.raises(checks.AdapterError) as raised:
            checks.check_encoded(header, encoded)
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".") and len(text) < 260, text
        return text

    return check


WRONG = {
    # DINOv2-large is as wide as what a ViT-H gives, a SigLIP could be, a ViT-g is.
    "DINOv2-large for a base ViT-H": ("ip-adapter_sd15", "dinov2", 1024, None, ["CLIP ViT-H", "DINO (width 1024)"]),
    "DINO for a plus ViT-H": ("ip-adapter-plus_sd15", "dinov2", 1280, None, ["CLIP ViT-H", "DINO (width 1280)"]),
    "SigLIP for a base ViT-H": ("ip-adapter_sd15", "siglip_vision_model", 1024, None, ["CLIP ViT-H", "SigLIP"]),
    "SigLIP for a plus ViT-H": ("ip-adapter-plus_sd15", "siglip_vision_model", 1152, None, ["CLIP ViT-H", "SigLIP"]),
    "a ViT-g for a base ViT-H": ("ip-adapter_sd15", "clip_vision_model", 1408, 1024, ["CLIP ViT-H", "1408"]),
    "a bare ViT-L for a base ViT-H": ("ip-adapter_sd15", "clip_vision_model", 1024, None, ["CLIP ViT-H", "and 1024"]),
    "a tower of ViT-H for a bigG": ("ip-adapter_sd15_vit-G", "clip_vision_model", 1280, None, ["CLIP ViT-bigG"]),
    "a ViT-H of another projection": ("ip-adapter-plus_sd15", "clip_vision_model", 1280, 640, ["CLIP ViT-H", "640"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_encoder_of_the_right_width_that_is_another_one_is_refused(case, tmp_path, pack, read, refused):
    name, kind, hidden, projection, words = WRONG[case]
    adapter = pack("prefgen.adapter_file").load_adapter(files.write(tmp_path, name))
    text = refused(adapter.header, read(encoder(tmp_path, kind, hidden, projection)))
    assert all(word in text for word in words), text


def test_llavas_clip_whose_projection_is_in_no_file_is_refused(tmp_path, pack, read, refused):
    adapter = pack("prefgen.adapter_file").load_adapter(files.write(tmp_path, "ip-adapter_sd15"))
    llava = encoder(tmp_path, "clip_vision_model", 1280, 1024, projector_type="llava3")
    assert "LLaVA" in refused(adapter.header, read(llava))


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [("siglip_vision_model", {}, "SigLIP"), ("dinov2", {}, "DINO"), ("clip_vision_model", "llava", "LLaVA")],
)
def test_a_look_at_pictures_refuses_what_gives_no_embedding(kind, more, words, tmp_path, pack):
    """SigLIP's normed states were compared as if they were an embedding, LLaVA's are whatever the memory holds."""
    more = {"projector_type": "llava3"} if more else {}
    with pytest.raises(ValueError) as raised:
        pack("prefgen.comfy.looking").name_of_encoder(encoder(tmp_path, kind, 64, 32 if more else None, **more))
    assert words in str(raised.value) and "choose a CLIP" in str(raised.value)


def test_two_encoders_never_share_a_file_of_embeddings(tmp_path, pack):
    """Weights that were rounded to bf16 have no checksum: all of them were filed under one name."""
    name_of = pack("prefgen.comfy.looking").name_of_encoder
    unrounded = encoder(tmp_path, "clip_vision_model", 64, 32)
    rounded, other = (encoder(tmp_path, "clip_vision_model", 64, 32) for _ in range(2))
    with torch.no_grad():
        for number, model in enumerate((rounded, other)):
            for parameter in model.model.parameters():
                parameter.copy_((parameter + 0.1 * number).bfloat16())
    names = [name_of(each) for each in (unrounded, rounded, other)]
    assert len(set(names)) == 3 and names == [name_of(each) for each in (unrounded, rounded, other)]


@pytest.mark.parametrize("name", files.LAYOUTS)
def test_the_right_encoder_passes(name, tmp_path, pack, read):
    adapter = pack("prefgen.adapter_file").load_adapter(files.write(tmp_path, name))
    _, ours = clip_vision(files.LAYOUTS[name].encoder, tmp_path)
    encoded = read(ours)
    pack("prefgen.adapter_checks").check_encoded(adapter.header, encoded)
    hidden, projection = ENCODERS[files.LAYOUTS[name].encoder]
    assert encoded.clip_vision["hidden_size"] == hidden and encoded.clip_vision["width"] == projection


def test_transformers_and_comfyui_tell_one_digest_also_at_half_precision(vision):
    theirs, ours = vision
    digest = described(theirs.state_dict())["digest"]
    assert described(ours.model.state_dict()) == described(theirs.state_dict())
    for state in (theirs.state_dict(), ours.model.state_dict()):
        assert weights_digest({key: value.half() for key, value in state.items()}) == digest
    copy = type(theirs)(theirs.config).half()  # as ComfyUI makes a model before it loads a file into it
    copy.load_state_dict(theirs.state_dict())
    assert described(copy.state_dict())["digest"] == digest


def test_weights_that_were_trained_on_have_another_digest(vision):
    state = vision[0].state_dict()
    digest, generator = weights_digest(state), torch.Generator().manual_seed(1)
    for key in ("visual_projection.weight", "vision_model.encoder.layers.1.mlp.fc1.bias"):
        moved = state[key] + torch.randn(state[key].shape, generator=generator) * 1e-3
        assert weights_digest(state | {key: moved}) != digest
    assert weights_digest({key: value for key, value in state.items() if "post_layernorm" not in key}) != digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_rounded_coarser_than_fp16_have_no_digest(vision, dtype):
    """Nothing tells them from others that round alike. ComfyUI may hold them so, and widen them again."""
    state = {key: value.to(dtype) for key, value in vision[0].state_dict().items()}
    assert "digest" not in described(state)
    assert "digest" not in described({key: value.half() for key, value in state.items()})
    norms = {key: value for key, value in vision[0].state_dict().items() if "norm" in key}  # ComfyUI holds them in fp32
    assert "digest" not in described(state | norms)


@pytest.fixture
def ours_for_vit_h(pack):
    """A PrefGen header for pictures read with a ViT-H, with more of it where given."""

    def header(**clip):
        adapters = pack("prefgen.adapter")
        return adapters.AdapterHeader(
            format_version=adapters.FORMAT_VERSION,
            kind="prefgen",
            base_family="sd15",
            semantic_width=8,
            core_width=8,
            image_width=1024,
            cross_attention_dim=768,
            tokens=4,
            block_widths=[32],
            clip_vision={"name": "ViT-H", "width": 1024} | clip,
        )

    return header


def test_an_adapter_is_refused_pictures_of_another_training_of_its_encoder(vision, pack, read, refused, ours_for_vit_h):
    theirs, ours = vision
    check = pack("prefgen.adapter_checks").check_encoded
    check(ours_for_vit_h(**described(theirs.state_dict())), read(ours))
    other = described({key: value * 1.01 for key, value in theirs.state_dict().items()})
    assert "ViT-H" in (text := refused(ours_for_vit_h(**other), read(ours))) and "other weights" in text
    check(ours_for_vit_h(), read(ours))  # exported before encoders had digests


def test_an_adapter_is_refused_pictures_of_another_kind_of_encoder(tmp_path, read, refused, ours_for_vit_h):
    assert "DINO" in refused(ours_for_vit_h(), read(encoder(tmp_path, "dinov2", 1024)))
    about = {"architecture": "CLIP", "hidden_size": 1280}
    assert "another one" in refused(
        ours_for_vit_h(**about), read(encoder(tmp_path, "clip_vision_model", 1408, projection=1024))
    )


def test_the_atelier_and_its_adapter_go_together_as_before(pack, read):
    models = pack("prefgen.atelier.models")
    _, _, _, vision = pack("prefgen.comfy.atelier_models").load_atelier()
    header = pack("prefgen.adapter_file").load_adapter(models.WEIGHTS / "adapter.safetensors").header
    pack("prefgen.adapter_checks").check_encoded(header, read(vision))
    assert read(vision).clip_vision["digest"] == described(models.load_clip().state_dict())["digest"]


def test_an_encoder_is_looked_at_once(vision, read, pack, monkeypatch):
    encoding, looked = pack("prefgen.comfy.encoding"), []
    monkeypatch.setattr(encoding, "described", lambda state: looked.append(1) or {"architecture": "CLIP"})
    other = clip_vision_copy(vision[1])
    read(other), read(other)
    assert len(looked) == 1


def clip_vision_copy(clip):
    import copy

    other = copy.copy(clip)
    other.model = copy.deepcopy(clip.model)
    other.patcher = comfy.model_patcher.ModelPatcher(other.model, torch.device("cpu"), torch.device("cpu"))
    return other


def test_pictures_are_not_read_with_what_no_adapter_reads(tmp_path, read, monkeypatch):
    dino = encoder(tmp_path, "dinov2", 1024)
    monkeypatch.setattr(dino, "encode_image", lambda image: pytest.fail("the picture was read"))
    assert read(dino).clip_vision == {"architecture": "DINO", "hidden_size": 1024}


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_projection_that_is_in_no_file_is_refused_where_it_shows(tmp_path, read, value):
    bare = encoder(tmp_path, "clip_vision_model", 1280, 1024)
    bare.model.visual_projection.weight.data.fill_(value)  # what the memory may hold
    with pytest.raises(ValueError, match="no image projection. Choose another in Load CLIP Vision"):
        read(bare)


def test_a_replaced_adapter_is_fused_anew_though_size_and_time_are_the_same(tmp_path, pack, read, vision, monkeypatch):
    """By the fingerprint, which ComfyUI compares before it answers from its cache, and by what the node reads."""
    import folder_paths

    node, name = pack("nodes").FuseUserVector, "ipadapter/ip-adapter_sd15.safetensors"
    pack("prefgen.comfy.folders")
    path, encoded = files.write(tmp_path, "ip-adapter_sd15"), read(vision[1])
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", ([str(tmp_path)], {".safetensors"}))
    marks, users, times = [], [], path.stat()
    for seed in (0, 0, 1):
        if seed:
            files.write(tmp_path, "ip-adapter_sd15", seed=seed)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        marks.append(node.fingerprint_inputs(adapter=name, semantic=1.0))
        users.append(node.execute(encoded, name).args[0])
    assert marks[0] == marks[1] != marks[2]
    assert users[0].adapter is users[1].adapter
    assert not torch.equal(users[1].keys_values()[0][0], users[2].keys_values()[0][0])


def test_the_fuse_node_says_it(tmp_path, pack, read, monkeypatch):
    import folder_paths

    nodes = pack("nodes")
    pack("prefgen.comfy.folders")
    files.write(tmp_path, "ip-adapter_sd15")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", ([str(tmp_path)], {".safetensors"}))
    encoded = read(encoder(tmp_path, "dinov2", 1024))
    with pytest.raises(ValueError, match="reads CLIP ViT-H .* DINO"):
        nodes.FuseUserVector.execute(encoded, "ipadapter/ip-adapter_sd15.safetensors")
