"""The published judges, on tiny models of their architectures: they score as the originals' own forward does."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from prefgen.clip import clip_pixels
from tests.closeness import assert_close, assert_far
from tests.prefgen import tiny_mllms
from tests.training import tiny_clip
from tests.training.tiny_clip import PATCH, SIDE, TOWER
from training.evaluation.scores import Clip, Csd, ScoreError, ViperProxy

STYLE = 24
PROMPTS = ["a boat", "a cat and a boat", "a boat"]


def pictures(count, seed=0, size=(48, 40)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip.write(tmp_path_factory.mktemp("clip"))


def test_clip_scores_are_the_models_own_logits(clip_folder):
    from transformers import CLIPModel, CLIPTokenizerFast

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizerFast.from_pretrained(clip_folder)
    asked = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        own = model(pixel_values=clip_pixels(pictures(3), SIDE), **asked).logits_per_image.diagonal()
    score = Clip(clip_folder)
    assert_close(score.pickscore(pictures(3), PROMPTS), own, unlike=own.flip(0))
    scale = model.logit_scale.exp().item()
    assert_close(score.fidelity(pictures(3), PROMPTS) * scale, own)
    first, other, again = score.texts(PROMPTS)
    assert_close(again, first, unlike=other)
    assert_far(own[0], own[2])  # another picture


def test_more_pictures_than_a_batch_and_a_prompt_past_the_limit(clip_folder):
    score, many = Clip(clip_folder), pictures(19)
    assert_close(score.images(many)[18], score.images(many[18:])[0], unlike=score.images(many)[17])
    assert torch.isfinite(score.texts(["a boat " * 60])).all()


def openai_names(tower):
    """A transformers vision tower's tensors as OpenAI's CLIP names them."""
    state, renamed = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}, {}
    for ours, theirs in {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.": "ln_pre.",
        "post_layernorm.": "ln_post.",
    }.items():
        renamed |= {theirs + k.removeprefix(ours): v for k, v in state.items() if k.startswith(ours)}
    for i in range(TOWER["num_hidden_layers"]):
        layer, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            joined = torch.cat([state[f"{layer}self_attn.{name}_proj.{kind}"] for name in "qkv"])
            renamed[f"{block}attn.in_proj_{kind}"] = joined
            for ours, theirs in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
            ):
                renamed[f"{block}{theirs}.{kind}"] = state[f"{layer}{ours}.{kind}"]
    return renamed


@pytest.fixture(scope="module")
def tower():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    options = TOWER | {"image_size": SIDE, "patch_size": PATCH, "hidden_act": "quick_gelu"}
    return CLIPVisionModel(CLIPVisionConfig(**options)).eval()


@pytest.mark.parametrize("naming", ["openai", "transformers"])
def test_csd_is_the_tower_and_its_projection_in_either_naming(tower, tmp_path, naming):
    style = torch.randn(64, STYLE, generator=torch.Generator().manual_seed(2))
    own = openai_names(tower) if naming == "openai" else tower.state_dict()
    prefix = "module." if naming == "openai" else ""
    state = {f"{prefix}backbone.{k}": v.contiguous() for k, v in own.items()}
    save_file(state | {f"{prefix}last_layer_style": style}, tmp_path / "csd.safetensors")
    with torch.inference_mode():
        features = tower(pixel_values=clip_pixels(pictures(3), SIDE)).pooler_output
    expected = F.normalize(features @ style, dim=1)
    assert_close(Csd(tmp_path / "csd.safetensors")(pictures(3)), expected, unlike=expected.flip(0))


def test_weights_that_are_not_csd_are_refused(tower, tmp_path):
    save_file({"last_layer_style": torch.zeros(64, STYLE)}, tmp_path / "bare.safetensors")
    half = {f"backbone.{k}": v.contiguous() for k, v in openai_names(tower).items() if "resblocks.1.mlp" not in k}
    save_file(half | {"last_layer_style": torch.zeros(64, STYLE)}, tmp_path / "half.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("bare", "half", "broken", "nowhere"):
        with pytest.raises(ScoreError, match=f"{name}.safetensors holds no CSD weights"):
            Csd(tmp_path / f"{name}.safetensors")


def test_a_folder_that_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ScoreError, match="no CLIP folder"):
        Clip(tmp_path)


def test_weights_that_a_clip_lacks_are_not_drawn_at_random(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(tmp_path / "clip/model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, tmp_path / "clip/model.safetensors", {"format": "pt"})
    with pytest.raises(ScoreError, match="lacks text_projection.weight and is no whole CLIP"):
        Clip(tmp_path / "clip")


def test_the_precision_goes_by_the_name_that_this_transformers_has(clip_folder, monkeypatch):
    from transformers import CLIPModel

    options = {}
    load = CLIPModel.from_pretrained
    monkeypatch.setattr("training.evaluation.scores.dtype_option", lambda dtype: {"of_this_version": dtype})

    def from_pretrained(folder, **more):
        options.update(more)
        return load(folder, output_loading_info=True)

    monkeypatch.setattr(CLIPModel, "from_pretrained", from_pretrained)
    Clip(clip_folder, dtype=torch.bfloat16)
    assert options["of_this_version"] == torch.bfloat16 and not {"dtype", "torch_dtype"} & options.keys()


@pytest.fixture(scope="module")
def idefics_folder(tmp_path_factory):
    """A tiny Idefics2 with the image processor and the two answers that the proxy gives."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Idefics2ImageProcessor, Idefics2Processor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("idefics2")
    words = [
        *tiny_mllms.SPECIALS[:6],
        "User",
        ":",
        "Score",
        "for",
        "this",
        "image",
        "?",
        "Assistant",
        "▁-",
        "▁+",
        "-",
        "+",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": tiny_mllms.SPECIALS[3:6]})
    tiny_mllms.write_model(folder, "idefics2", text={"vocab_size": len(words)})
    processor = Idefics2ImageProcessor(size={"longest_edge": 16, "shortest_edge": 8}, do_image_splitting=False)
    Idefics2Processor(processor, fast, image_seq_len=tiny_mllms.PERCEIVER["resampler_n_latents"]).save_pretrained(
        folder
    )
    return folder


def test_the_viper_proxy_reads_the_context_and_the_picture(idefics_folder, monkeypatch):
    monkeypatch.setattr("training.evaluation.scores.VIPER_SIZE", {"longest_edge": 16, "shortest_edge": 8})
    proxy = ViperProxy(idefics_folder, None)
    liked, disliked, asked = pictures(2, 1), pictures(2, 2), pictures(3, 3)
    scores = proxy.score(liked, disliked, asked)
    assert scores.shape == (3,) and ((0 < scores) & (scores < 1)).all() and len(set(scores.tolist())) == 3
    assert_far(scores, proxy.score(disliked, liked, asked))  # who is liked matters
    assert_close(proxy.score(liked, disliked, asked[1:]), scores[1:])  # each picture is asked about alone
