"""Tiny random SD1.5 and SDXL as diffusers folders, and what the stages before the branch leave for them."""

import json
from types import SimpleNamespace

import numpy as np
import torch
import yaml

from prefgen.atelier.models import CLIP_TOKENIZER
from tests.prefgen.tiny_unets import UNETS
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.worlds import DataSetWorld

PIXELS, LAYERS, WIDTH, IMAGE = 64, 6, 16, 24
MLLM = {
    "name": "tiny",
    "revision": "abc",
    "lora": None,
    "prompt_version": 1,
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
}


def text_encoder(kind, width: int, tokenizer):
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def write_base(folder, family: str):
    """A diffusers folder of one family: tiny random parts whose text is as wide as the real one's."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), model_max_length=77)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**UNETS[family]) if family in UNETS else None,
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16 if family == "flux" else 4,
            shift_factor=0.1 if family == "flux" else None,
            norm_num_groups=4,
        ),
        "text_encoder": text_encoder(CLIPTextModel, 768, tokenizer),
        "tokenizer": tokenizer,
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    }
    if family == "flux":
        return write_flux(folder, parts)
    if family == "sdxl":
        second = text_encoder(CLIPTextModelWithProjection, 1280, tokenizer)
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **absent)
    pipeline.save_pretrained(folder)
    return folder


def write_flux(folder, parts):
    """A FluxPipeline's folder of a tiny transformer, T5 and VAE, and the CLIP of `parts`."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    size = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    diffusers.FluxPipeline(
        transformer=transformer,
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(parts["tokenizer"]), **size)),
        # Any tokenizer does for a T5 that has learnt nothing.
        tokenizer_2=parts["tokenizer"],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def write_data(folder):
    make(Population(40, 240, 3, 40, Atelier(80), None), folder, processes=1)
    return folder


def write_upstream(runs, data, histories: int = 3):
    """The arrays of `extract` and the choice of `probe_layers`: states in which a user's histories are alike."""
    world = DataSetWorld(data)
    users, generator = world.users("train"), torch.Generator().manual_seed(0)
    own = torch.randn(len(users), 1, LAYERS, WIDTH, generator=generator)
    hidden = (own + 0.3 * torch.randn(len(users), histories, LAYERS, WIDTH, generator=generator)).flatten(0, 1)
    images = torch.nn.functional.normalize(torch.randn(len(hidden), IMAGE, generator=generator), dim=1)
    extract, probe = runs / "extract", runs / "probe_layers"
    extract.mkdir(parents=True)
    probe.mkdir()
    np.save(extract / "hidden.npy", hidden.half().numpy())
    np.save(extract / "images.npy", images.half().numpy())
    np.save(extract / "owners.npy", np.repeat(users, histories))
    clip_vision = {"name": "tiny", "width": IMAGE, "preprocessing": "none"}
    index = {"world": world.name, "users": len(users), "mllm": MLLM, "layers": LAYERS, "clip_vision": clip_vision}
    (extract / "index.json").write_text(json.dumps(index))
    (probe / "layers.json").write_text(json.dumps({"sem_layers": [2, 3, 4, 5], "core_layer": 3}))
    for folder in (extract, probe):
        (folder / "done").write_text("{}")


def write_config(path, family: str, base, data, /, **changes):
    """A configuration file; changes: {"base": {...}, "train_user_attention": {...}}."""
    content = {
        "hardware": "a test",
        "data": {"path": str(data)},
        "base": {"family": family, "path": str(base), "pixels": PIXELS, "precision": "fp32"},
        "mllm": {"path": "tiny"},
        "clip_vision": {"path": "tiny"},
        "train_alignment": {"steps": 4, "batch": 32, "bank": 16, "hidden": 24},
        "train_user_attention": {"steps": 4, "batch": 4, "lr": 1e-3, "warmup": 2, "ema": 0.9, "users": 4},
    }
    for name, section in changes.items():
        content[name] = content.get(name, {}) | section
    path.write_text(yaml.safe_dump(content))
    return path


def world(folder, family: str) -> SimpleNamespace:
    """base, data, runs, config of a whole small world under `folder`."""
    base, data, runs = write_base(folder / family, family), write_data(folder / "agents"), folder / "runs"
    write_upstream(runs, data)
    return SimpleNamespace(
        base=base, data=data, runs=runs, config=write_config(folder / "run.yaml", family, base, data)
    )
