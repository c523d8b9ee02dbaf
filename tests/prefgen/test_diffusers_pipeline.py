"""A saved adapter in stock diffusers: `load_ip_adapter`, `ip_adapter_image_embeds`, guidance, two users."""

import pytest
import torch

from prefgen.adapter_file import load_adapter, save_adapter
from prefgen.atelier.editions import FIRST
from prefgen.branch import scaled_dot_product, user_residual
from tests.closeness import SAMPLED, assert_close, assert_far

SCALE, GUIDANCE = 0.8, 4.0
# A UNet with all three kinds of blocks.
TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


class UserAttention:
    """What ComfyUI does, in diffusers' words: text attention, plus the users' residuals, then the output layer."""

    def __init__(self, users):
        self.users = users  # (k, v, weight) each

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query = attn.to_q(hidden_states)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        out = scaled_dot_product(query, attn.to_k(text), attn.to_v(text), attn.heads)
        for k, v, weight in self.users:
            out = out + user_residual(query, k, v, attn.heads, weight=weight)
        return attn.to_out[1](attn.to_out[0](out))


@pytest.fixture
def new_pipeline():
    """A function that makes the same pipeline anew: random weights, a UNet by its config, and text states given."""

    def make(config=TINY):
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config)
        text = CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
        scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
        parts = (vae, CLIPTextModel(text), None, unet, scheduler, None, None)
        pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def cross_attentions(unet):
    """Names in file order: down, up, mid."""
    return [name for name in unet.attn_processors if name.endswith("attn2.processor")]


def adapter_for(new_adapter, unet, seed=0, **options):
    widths = [unet.get_submodule(n.removesuffix(".processor")).to_k.out_features for n in cross_attentions(unet)]
    return new_adapter(widths, unet.config.cross_attention_dim, seed=seed, **options)


def install(unet, users):
    """Put our branch beside every cross-attention; users: (adapter, vectors [B, E], weight)."""
    projected = [(adapter.keys_values(vectors), weight) for adapter, vectors, weight in users]
    processors = {name: UserAttention(()) for name in unet.attn_processors}
    for i, name in enumerate(cross_attentions(unet)):
        processors[name] = UserAttention([(*pairs[i], weight) for pairs, weight in projected])
    unet.set_attn_processor(processors)


def draw(pipeline, vectors=None):
    """Latents of three guided steps, and every noise prediction of the UNet, both halves."""
    predictions = []
    hook = pipeline.unet.register_forward_hook(lambda _, __, output: predictions.append(output[0].clone()))
    generator = torch.Generator().manual_seed(1)
    config = pipeline.unet.config
    text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    embeds = vectors and [torch.stack([torch.zeros_like(v), v])[:, None] for v in vectors]
    latents = pipeline(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        ip_adapter_image_embeds=embeds,
        guidance_scale=GUIDANCE,
        num_inference_steps=3,
        latents=torch.randn(shape, generator=generator),
        output_type="latent",
    ).images
    hook.remove()
    return latents, torch.stack(predictions)


def user(adapter, seed):
    vector = torch.randn(adapter.header.user_width, generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.zeros_like(vector), vector])


@pytest.mark.parametrize("config", [TINY, FIRST.unet], ids=["tiny", "atelier"])
def test_a_guided_run_with_precomputed_embeddings_equals_ours(new_pipeline, new_adapter, tmp_path, config):
    theirs, ours = new_pipeline(config), new_pipeline(config)
    plain, without = draw(ours)
    adapter = adapter_for(new_adapter, ours.unet)
    save_adapter(adapter, tmp_path / "taste.safetensors")
    vectors = user(adapter, seed=3)

    install(ours.unet, [(load_adapter(tmp_path / "taste.safetensors"), vectors, SCALE)])
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name="taste.safetensors", image_encoder_folder=None)
    theirs.set_ip_adapter_scale(SCALE)
    latents, predictions = draw(ours)
    their_latents, their_predictions = draw(theirs, [vectors[1]])

    assert predictions.shape[:2] == (3, 2)  # three steps, unconditional and conditional half
    assert_close(predictions, their_predictions, unlike=without)
    assert_close(latents, their_latents, ulps=SAMPLED, unlike=plain)


@pytest.mark.parametrize("widths", [(0, 0, 8), (0, 16, 8)], ids=["image", "core and image"])
def test_an_adapter_of_some_parts_paints_as_ours(new_pipeline, new_adapter, tmp_path, widths):
    theirs, ours = new_pipeline(), new_pipeline()
    _, without = draw(ours)
    adapter = adapter_for(new_adapter, ours.unet, widths=widths)
    save_adapter(adapter, tmp_path / "taste.safetensors")
    vectors = user(adapter, seed=3)
    install(ours.unet, [(load_adapter(tmp_path / "taste.safetensors"), vectors, 1.0)])
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name="taste.safetensors", image_encoder_folder=None)
    assert_close(draw(ours)[1], draw(theirs, [vectors[1]])[1], unlike=without)


def test_the_unconditional_half_is_the_vector_of_zeros_not_the_plain_model(new_pipeline, new_adapter):
    pipeline = new_pipeline()
    _, plain = draw(pipeline)
    adapter = adapter_for(new_adapter, pipeline.unet)
    install(pipeline.unet, [(adapter, user(adapter, 3), SCALE)])
    _, with_user = draw(pipeline)
    install(pipeline.unet, [(adapter, user(adapter, 4), SCALE)])
    _, with_another = draw(pipeline)
    assert_close(with_user[0, 0], with_another[0, 0], unlike=plain[0, 0])
    assert_far(with_user[0, 1], with_another[0, 1])


def test_two_users_add_up_as_two_ip_adapters_do(new_pipeline, new_adapter, tmp_path):
    theirs, ours = new_pipeline(), new_pipeline()
    adapters = [adapter_for(new_adapter, ours.unet, seed) for seed in (0, 1)]
    names = [f"{i}.safetensors" for i in range(2)]
    for adapter, name in zip(adapters, names, strict=True):
        save_adapter(adapter, tmp_path / name)
    vectors = [user(adapter, seed) for seed, adapter in enumerate(adapters, 5)]

    _, plain = draw(ours)
    install(ours.unet, list(zip(adapters, vectors, (0.7, -0.4), strict=True)))
    theirs.load_ip_adapter([str(tmp_path)] * 2, subfolder=[""] * 2, weight_name=names, image_encoder_folder=None)
    theirs.set_ip_adapter_scale([0.7, -0.4])
    _, predictions = draw(ours)
    _, their_predictions = draw(theirs, [v[1] for v in vectors])
    assert_close(predictions, their_predictions, unlike=plain)
