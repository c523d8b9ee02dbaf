"""Public IP-Adapter files from a graph's pictures to the noise prediction: what diffusers' own IP-Adapter gives."""

import comfy.clip_vision
import pytest
import torch

from tests.closeness import assert_close, assert_far
from tests.prefgen import ip_adapter_files as files
from tests.prefgen.comfy.tiny_models import UNETS, Both, clip_vision

WEIGHT = 0.8


@pytest.fixture(scope="module")
def unets():
    return {family: Both(family) for family in UNETS}


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """vision("CLIP ViT-H") -> (transformers' model, ComfyUI's), made once."""
    models = {}

    def make(name):
        if name not in models:
            models[name] = clip_vision(name, tmp_path_factory.mktemp("vision"))
        return models[name]

    return make


PICTURES = [torch.rand(1, 70, 56, 3, generator=torch.Generator().manual_seed(i)) for i in range(5)]


def what_diffusers_reads(theirs, pictures, states):
    """[2, pictures, ...]: row 0 the pictures, row 1 what diffusers takes for none."""
    pixels = torch.cat([comfy.clip_vision.clip_preprocess(picture, 56) for picture in pictures])
    with torch.no_grad():
        if states:
            rows = [theirs(x, output_hidden_states=True).hidden_states[-2] for x in (pixels, torch.zeros_like(pixels))]
        else:
            embeds = theirs(pixels).image_embeds
            rows = [embeds, torch.zeros_like(embeds)]
    return torch.stack(rows)


@pytest.fixture
def fused(pack):
    """fused(path, clip_vision, liked, disliked, **ways) -> a user, as the nodes make it."""
    adapter_file, checks, fusion = pack("prefgen.adapter_file"), pack("prefgen.adapter_checks"), pack("prefgen.fusion")
    encoding, history = pack("prefgen.comfy.encoding"), pack("prefgen.history")

    def fuse(path, clip_vision, liked, disliked=(), **ways):
        with torch.no_grad():
            read = encoding.encode_history(history.PreferenceHistory.from_images(liked, disliked), None, clip_vision)
        adapter = adapter_file.load_adapter(path)
        checks.check_encoded(adapter.header, read)
        return fusion.fuse_user(adapter, read, **ways)

    return fuse


@pytest.mark.parametrize("name", files.LAYOUTS)
def test_every_public_layout_gives_the_noise_of_diffusers_on_both_halves(name, unets, vision, pack, fused, tmp_path):
    layout, apply_user = files.LAYOUTS[name], pack("prefgen.comfy.patcher").apply_user
    both, (theirs, ours) = unets[layout.family], vision(layout.encoder)
    path = files.write(tmp_path, name)
    patched = apply_user(both.patcher, fused(path, ours, PICTURES[:1]), WEIGHT, apply_to="both")
    expected = both.theirs(path, what_diffusers_reads(theirs, PICTURES[:1], layout.kind != "base"), WEIGHT)
    got, plain = both.ours(patched), both.ours(both.patcher)
    assert_close(plain, both.theirs(path, None, WEIGHT))
    for half in range(2):  # each gets something
        assert_close(got[half], expected[half], unlike=plain[half])
    only = both.ours(apply_user(both.patcher, fused(path, ours, PICTURES[:1]), WEIGHT))
    assert_close(only[0], got[0], unlike=plain[0])
    assert_close(only[1], plain[1], unlike=got[1])


@pytest.mark.parametrize("name", ["ip-adapter_sd15", "ip-adapter-plus_sd15"])
def test_several_pictures_side_by_side_are_a_list_of_pictures_in_diffusers(name, unets, vision, pack, fused, tmp_path):
    layout, (theirs, ours) = files.LAYOUTS[name], vision("CLIP ViT-H")
    both, path = unets["sd15"], files.write(tmp_path, name)
    user = fused(path, ours, PICTURES[:3], pooling="side by side")
    got = both.ours(pack("prefgen.comfy.patcher").apply_user(both.patcher, user, WEIGHT, apply_to="both"))
    expected = both.theirs(path, what_diffusers_reads(theirs, PICTURES[:3], layout.kind != "base"), WEIGHT)
    assert_close(got, expected, unlike=both.ours(both.patcher))


def test_negative_gives_the_disliked_pictures_to_the_unconditional_half_alone(unets, vision, pack, fused, tmp_path):
    both, (theirs, ours) = unets["sd15"], vision("CLIP ViT-H")
    path = files.write(tmp_path, "ip-adapter_sd15")
    user = fused(path, ours, PICTURES[:1], PICTURES[3:4], pooling="negative", push=1.0)
    got = both.ours(pack("prefgen.comfy.patcher").apply_user(both.patcher, user, WEIGHT))  # apply_to is "positive"
    rows = what_diffusers_reads(theirs, [PICTURES[0], PICTURES[3]], False)[:1].transpose(0, 1)
    expected = both.theirs(path, rows, WEIGHT)
    assert_close(got, expected, unlike=both.ours(both.patcher))


@pytest.mark.parametrize("way", ["push away", "side by side", "least disliked", "negative"])
def test_disliked_pictures_count_in_every_way_and_not_at_push_0(way, unets, vision, pack, fused, tmp_path):
    both, (_, ours) = unets["sd15"], vision("CLIP ViT-H")
    path = files.write(tmp_path, "ip-adapter-plus_sd15")

    def denoised(disliked, **ways):
        user = fused(path, ours, PICTURES[:3], disliked, pooling=way, **ways)
        return both.ours(pack("prefgen.comfy.patcher").apply_user(both.patcher, user, WEIGHT))

    alone = denoised(())
    assert_far(denoised(PICTURES[3:]), alone)
    assert torch.equal(denoised(PICTURES[3:], push=0.0), alone)


def test_no_picture_at_all_is_the_unconditional_half(unets, vision, pack, fused, tmp_path):
    """`image` 0 leads from the pictures to what IP-Adapter was trained to take for none."""
    both, (theirs, ours) = unets["sd15"], vision("CLIP ViT-H")
    path = files.write(tmp_path, "ip-adapter-plus_sd15")
    user = fused(path, ours, PICTURES[:2], image=0.0)
    got = both.ours(pack("prefgen.comfy.patcher").apply_user(both.patcher, user, WEIGHT, apply_to="both"))
    nothing = what_diffusers_reads(theirs, PICTURES[:1], True)[1:].expand(2, -1, -1, -1)
    assert_close(got, both.theirs(path, nothing, WEIGHT), unlike=both.ours(both.patcher))


def test_the_same_pictures_are_read_once(vision, fused, tmp_path, monkeypatch):
    _, ours = vision("CLIP ViT-H")
    path, read = files.write(tmp_path, "ip-adapter-plus_sd15"), []
    original = ours.encode_image
    monkeypatch.setattr(ours, "encode_image", lambda image: read.append(1) or original(image))
    pictures = [torch.rand(1, 56, 56, 3) for _ in range(3)]
    first, again = fused(path, ours, pictures[:2], pictures[2:]), fused(path, ours, pictures[:2], pictures[2:])
    assert len(read) == 3 and torch.equal(first.vector, again.vector)


REFUSED = {
    "an SD1.5 adapter on SDXL": ("ip-adapter_sd15", "CLIP ViT-H", "sdxl", "for SD1.5; the model you connected is SDXL"),
    "an SDXL adapter on SD1.5": (
        "ip-adapter_sdxl",
        "CLIP ViT-bigG",
        "sd15",
        "for SDXL; the model you connected is SD1",
    ),
    "base, encoder too wide": ("ip-adapter_sd15", "CLIP ViT-bigG", "sd15", "reads CLIP ViT-H (width 1024); the"),
    "base, encoder too narrow": ("ip-adapter_sdxl", "CLIP ViT-H", "sdxl", "connect CLIP ViT-bigG in Encode"),
    "plus, encoder too wide": ("ip-adapter-plus_sd15", "CLIP ViT-bigG", "sd15", "CLIP ViT-bigG (width 1664): connect"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_before_sampling(case, unets, vision, pack, fused, tmp_path):
    name, encoder, family, words = REFUSED[case]
    path = files.write(tmp_path, name)
    with pytest.raises(pack("prefgen.errors").AdapterError) as caught:
        pack("prefgen.comfy.patcher").apply_user(unets[family].patcher, fused(path, vision(encoder)[1], PICTURES[:1]))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_that_gives_no_hidden_states_serves_base_files_only(vision, pack, fused, tmp_path):
    class Embeddings:
        """A CLIP vision model of another pack."""

        def __init__(self):
            self.model = torch.nn.Identity()

        def encode_image(self, image):
            output = comfy.clip_vision.Output()
            output["image_embeds"] = torch.ones(1, 1024)
            return output

    fused(files.write(tmp_path, "ip-adapter_sd15"), Embeddings(), PICTURES[:1])
    with pytest.raises(ValueError, match="hidden states of CLIP ViT-H; the connected CLIP vision model gives none"):
        fused(files.write(tmp_path, "ip-adapter-plus_sd15"), Embeddings(), PICTURES[:1])


def test_a_history_that_nothing_reads_is_refused_and_an_mllm_alone_is_not_enough(pack, fused, tmp_path):
    with pytest.raises(ValueError, match="connect an MLLM .* or a CLIP vision model"):
        pack("nodes").EncodePreferenceHistory.execute(liked=PICTURES[:1])
    checks, encoded = pack("prefgen.adapter_checks"), pack("prefgen.encoded")
    adapter = pack("prefgen.adapter_file").load_adapter(files.write(tmp_path, "ip-adapter_sd15"))
    with pytest.raises(checks.AdapterError, match="through CLIP vision alone: connect CLIP ViT-H to clip_vision"):
        checks.check_encoded(adapter.header, encoded.EncodedPreference(torch.zeros(4, 8), None, None))


def test_the_nodes_alone_make_a_patched_model(unets, vision, pack, tmp_path, monkeypatch):
    """Encode without an MLLM, Fuse from models/ipadapter, Apply."""
    import folder_paths

    nodes, (_, ours) = pack("nodes"), vision("CLIP ViT-H")
    pack("prefgen.comfy.folders")
    (tmp_path / "sd15").mkdir()
    files.write(tmp_path / "sd15", "ip-adapter-plus_sd15")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", ([str(tmp_path)], {".safetensors"}))
    name = "ipadapter/sd15/ip-adapter-plus_sd15.safetensors"
    with torch.inference_mode():
        read = nodes.EncodePreferenceHistory.execute(liked=PICTURES[:2], disliked=PICTURES[2:3], clip_vision=[ours])
        assert nodes.FuseUserVector.validate_inputs(name) is True
        user = nodes.FuseUserVector.execute(read.args[0], name)
        patched = nodes.ApplyUserCrossAttention.execute(unets["sd15"].patcher, user.args[0])
    both = unets["sd15"]
    assert_far(both.ours(patched.args[0]), both.ours(both.patcher))
