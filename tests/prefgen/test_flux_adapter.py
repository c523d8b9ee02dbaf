"""IP-Adapter files for Flux.1, known by the keys and shapes that are published."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prefgen.adapter_checks import check_encoded
from prefgen.adapter_file import adapter_header, load_adapter
from prefgen.encoded import EncodedPreference
from prefgen.errors import AdapterError
from prefgen.flux_adapter import build_flux_adapter, is_flux
from prefgen.fusion import fuse_user
from prefgen.pooling import WAYS
from tests.closeness import assert_close
from tests.prefgen import flux_files as files


@pytest.mark.parametrize("kind", [*files.FACTS, "diffusers"])
def test_the_published_files_are_known_by_keys_and_shapes(kind):
    shapes = files.shapes(kind)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert is_flux(shapes)
    adapter = build_flux_adapter("file.safetensors", tensors)
    header = adapter.header
    tokens, blocks, millions = files.FACTS.get(kind, files.FACTS["xlabs-v1"])
    assert (header.base_family, header.tokens, header.block_widths) == ("flux", tokens, [3072] * blocks)
    assert header.cross_attention_dim == 4096 and header.in_attention == (kind == "instantx")
    assert header.clip_vision["name"] == ("SigLIP so400m" if kind == "instantx" else "CLIP ViT-L")
    assert sum(tensor.numel() for tensor in tensors.values()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("kind", [*files.FACTS, "diffusers"])
def test_half_a_file_is_a_sentence(kind, tmp_path, one_sentence):
    tensors = files.tensors(kind)
    branch = [key for key in tensors if "ip" in key.split(".")[-2] or "double" in key]
    lost = {"a projection": next(key for key in tensors if key.endswith("norm.weight")), "a block": branch[-1]}
    for key in lost.values():
        save_file({name: value for name, value in tensors.items() if name != key}, tmp_path / "half.safetensors")
        for read in (load_adapter, adapter_header):
            with pytest.raises(AdapterError, match=r"half\.safetensors is damaged: it lacks") as raised:
                read(tmp_path / "half.safetensors")
            one_sentence(raised)
    wide = tensors | {branch[0]: torch.zeros(3, *tensors[branch[0]].shape[1:])}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(AdapterError, match="wide.safetensors is damaged") as raised:
        load_adapter(tmp_path / "wide.safetensors")
    one_sentence(raised)


SD3 = {"ip_adapter.0.norm_ip.linear.weight": (48, 8), "ip_adapter.0.to_k_ip.weight": (8, 8)}
REFUSED = {
    "SD3.5": (SD3 | {"ip_adapter.1.to_k_ip.weight": (8, 8), "image_proj.latents": (1, 4, 8)}, "SD3.5.*Describe"),
    "Redux": ({"redux_up.weight": (24, 8), "redux_down.weight": (8, 24)}, "Redux.*Apply Style Model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_load_says_what_helps(kind, tmp_path, one_sentence):
    shapes, words = REFUSED[kind]
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "other.safetensors")
    for read in (load_adapter, adapter_header):
        with pytest.raises(AdapterError) as raised:
            read(tmp_path / "other.safetensors")
        assert re.search(words, one_sentence(raised))


def test_a_pickle_says_how_it_is_converted(tmp_path, one_sentence):
    torch.save(files.tensors("instantx"), tmp_path / "ip-adapter.safetensors")
    with pytest.raises(AdapterError, match=r"pickle .* weights_only=True.* docs/flux.md") as raised:
        load_adapter(tmp_path / "ip-adapter.safetensors")
    one_sentence(raised)


def test_the_pages_conversion_of_instantx_pickle_loads(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "flux.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, value in files.tensors("instantx").items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    torch.save(parts, tmp_path / "ip-adapter.bin")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "flux.md", "exec"), {})  # noqa: S102  the page's own
    adapter = load_adapter(tmp_path / "flux-instantx-ip-adapter.safetensors")
    assert adapter.header.in_attention and len(adapter.to_k_ip) == files.TINY.doubles + files.TINY.singles


@pytest.mark.parametrize("way", WAYS)
def test_every_pooling_makes_a_user_and_none_is_a_black_picture(way, tmp_path):
    adapter = load_adapter(files.write(tmp_path, "xlabs-v1"))
    width = adapter.header.image_width
    liked, disliked, black = torch.randn(3, width), torch.randn(2, width), torch.randn(width)
    encoded = EncodedPreference(None, liked, disliked, clip_vision={"width": width}, image_embed_none=black)
    check_encoded(adapter.header, encoded)
    user = fuse_user(adapter, encoded, pooling=way)
    assert len(user.keys_values()) == files.TINY.doubles and user.keys_values()[0][0].shape[0] == 2
    if way != "negative":
        assert torch.equal(user.no_user, black.expand_as(user.vector))
    assert torch.equal(fuse_user(adapter, encoded, image=0.0, pooling=way).vector, black.expand_as(user.vector))
    with pytest.raises(AdapterError, match="takes a black picture for none"):
        check_encoded(adapter.header, EncodedPreference(None, liked, disliked, clip_vision={"width": width}))


def test_siglips_head_is_transformers_and_is_known_by_its_model(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from prefgen.siglip import NORM, load_head

    torch.manual_seed(0)
    size = {"hidden_size": 144, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(**size, image_size=28, patch_size=14)).eval()
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    if NORM not in weights:  # transformers 5.x names the model's parts without its own name
        weights = {"vision_model." + key: value for key, value in weights.items()}
    save_file(weights, tmp_path / "siglip.safetensors")
    head = load_head(tmp_path / "siglip.safetensors", weights[NORM])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        output = model(torch.randn(2, 3, 28, 28))
        assert_close(head(output.last_hidden_state), output.pooler_output)
    assert load_head(tmp_path / "siglip.safetensors", weights[NORM] + 1) is None
    del weights["vision_model.head.probe"]
    save_file(weights, tmp_path / "without.safetensors")
    assert load_head(tmp_path / "without.safetensors", weights[NORM]) is None
