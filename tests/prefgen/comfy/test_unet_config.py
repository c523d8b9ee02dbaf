"""ComfyUI's UNet arguments from diffusers' config: every one of them."""

import pytest


@pytest.mark.parametrize("linear", [True, False, None])
def test_every_argument_of_the_unet_comes_from_its_config(pack, linear):
    config = {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 6,
        "layers_per_block": 2,
        "block_out_channels": (64, 128, 256),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 48,
        "attention_head_dim": 4,
    } | ({} if linear is None else {"use_linear_projection": linear})
    assert pack("prefgen.comfy.atelier_models").unet_config_from_diffusers(config) == {
        "image_size": 16,
        "in_channels": 8,
        "out_channels": 6,
        "model_channels": 64,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
        "context_dim": 48,
        "num_heads": 4,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(linear),
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "legacy": False,
    }
