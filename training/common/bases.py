"""Which frozen diffusion models a branch is trained beside: the atelier's own, SD1.5, SDXL and Flux.1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from prefgen.adapter import FAMILY_NAMES, FAMILY_OF_WIDTH, FLUX
from prefgen.dtypes import DTYPES
from prefgen.files import read_text

from .base import AtelierBase, Base, BaseError
from .base_files import CANT_LOAD, first_line, load_model, load_models
from .config.schema import Config
from .sampling import atelier_scheduler


def load_base(config: Config, device: torch.device | str = "cpu", without: Sequence[str] = ()) -> Base:
    """The base of a configuration, without its "unet", "vae" or both. BaseError with one sentence for files that aren't
    there, or not what base.family says."""
    load = _atelier if config.base.family == "atelier" else _published
    base = load(config, device, without)
    base.clip_text = config.clip_text
    return base


def load_unet(config: Config):
    """The UNet of a base that was loaded without, in the precision that it computes in."""
    if config.base.family == "atelier":
        from prefgen.atelier import models

        return models.load_unet_diffusers()
    assert config.base.path is not None, "the schema asks for it"
    dtype = DTYPES[config.base.precision]
    options: dict[str, Any] = {}
    if config.base.nf4:
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            raise BaseError(
                "base.nf4 puts the transformer on a graphics card in 4 bits, and there is none here: train on a "
                "machine with one, or set base.nf4=false."
            )
        from diffusers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if config.base.family == FLUX:
        # In its precision at once: 12 billion parameters in fp32 take 48 GB.
        return load_model(config.base.path, "transformer", dtype, **options)
    unet = load_model(config.base.path, "unet", dtype if config.base.nf4 else None, **options)
    return unet if config.base.nf4 else _in_precision(unet, dtype)


def _atelier(config: Config, device: torch.device | str, without: Sequence[str]) -> Base:
    from prefgen.atelier import models

    side = models.edition().image_size
    if config.data.path is not None and config.base.pixels != side:
        raise BaseError(f"base.pixels is {config.base.pixels}, and the embedded models paint {side}: set it to {side}.")
    return AtelierBase(
        "atelier",
        None if "unet" in without else models.load_unet_diffusers(),
        None if "vae" in without else models.load_vae_diffusers(),
        [(models.clip_tokenizer(), models.load_clip())],
        atelier_scheduler(),
        side,
        DTYPES[config.base.precision],
        device,
        # Their last one is no exact zero, as the scheduler's is.
        models.alphas_cumprod(),
    )


def load_pipeline(config: Config, dtype: torch.dtype | None = None, without: Sequence[str] = ()):
    """The base's own diffusers pipeline, without some components. dtype: None takes diffusers' own choice. BaseError
    with one sentence."""
    import diffusers

    family = config.base.family
    path = config.base.path
    options: dict[str, Any] = {}
    assert path is not None, "the schema asks for it"
    _check_family(family, path)
    if family == "sdxl":
        kind = diffusers.StableDiffusionXLPipeline
    elif family == FLUX:
        kind = diffusers.FluxPipeline
        without = ["transformer" if name == "unet" else name for name in without]
    else:
        kind = diffusers.StableDiffusionPipeline
        # It would black pictures out, and with them what is compared. SDXL's pipeline has none.
        options = {"safety_checker": None, "requires_safety_checker": False}
    diffusers.utils.logging.disable_progress_bar()
    components = load_models(path, dtype, without) | dict.fromkeys(without) | options
    try:
        return kind.from_pretrained(str(path), local_files_only=True, torch_dtype=dtype, **components)
    except CANT_LOAD as error:
        raise BaseError(
            f"base.path {path} can't be loaded ({first_line(error)}): its tokenizers or its scheduler are missing or "
            "damaged; take the whole diffusers folder."
        ) from error


def _published(config: Config, device: torch.device | str, without: Sequence[str]) -> Base:
    family = config.base.family
    pipeline = load_pipeline(config, without=("feature_extractor", "image_encoder", *without))
    dtype = DTYPES[config.base.precision]
    if family == FLUX:
        return _flux(config, pipeline, device, without)
    encoders = [(pipeline.tokenizer, _in_precision(pipeline.text_encoder))]
    if family == "sdxl":
        encoders.append((pipeline.tokenizer_2, _in_precision(pipeline.text_encoder_2)))
    return Base(
        family,
        None if "unet" in without else _in_precision(pipeline.unet, dtype),
        None if "vae" in without else _in_precision(pipeline.vae),
        encoders,
        # DDIM samples from the schedule that any pipeline names; SD1.5's and SDXL's latents aren't bound to -1..1.
        DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False),
        config.base.pixels,
        dtype,
        device,
    )


def _flux(config: Config, pipeline, device: torch.device | str, without: Sequence[str]) -> Base:
    # Here, since diffusers' module of Flux imports every way to quantise: seconds for those who train something else.
    from .flux import SHIFT, FlowScheduler, FluxBase

    dtype = DTYPES[config.base.precision]
    # T5 has 4.8 billion parameters, and was trained in bf16.
    second = (pipeline.tokenizer_2, _in_precision(pipeline.text_encoder_2, dtype))
    return FluxBase(
        FLUX,
        None if "unet" in without else _in_precision(pipeline.transformer, dtype),
        None if "vae" in without else _in_precision(pipeline.vae),
        [(pipeline.tokenizer, _in_precision(pipeline.text_encoder)), second],
        FlowScheduler(shift=SHIFT),
        config.base.pixels,
        dtype,
        device,
    )


def _in_precision(module, dtype: torch.dtype = torch.float32):
    return module if module.dtype == dtype else module.to(dtype)  # diffusers warns at every conversion


def _check_family(family: str, path: Path) -> None:
    """BaseError unless base.path holds a model of base.family."""
    if path.is_file():
        raise BaseError(
            f"base.path {path} is a single file, without configs and tokenizers: load it once in diffusers with "
            "from_single_file, save_pretrained it, and give that folder."
        )
    if not (path / "model_index.json").is_file():
        raise BaseError(f"base.path {path} is no diffusers folder: it has no model_index.json.")
    actual = _family_of(path)
    if actual != family:
        name = FAMILY_NAMES.get(actual, actual)
        raise BaseError(f"base.path {path} holds an {name} model, base.family says {family}.")


def _family_of(path: Path) -> str:
    """The family of a diffusers folder. BaseError for one without a denoiser that PrefGen knows."""
    for folder in ("unet", "transformer"):
        try:
            config = json.loads(read_text(path / folder / "config.json"))
        except (OSError, ValueError):
            continue
        if folder == "unet":
            return FAMILY_OF_WIDTH.get(config.get("cross_attention_dim"), "unknown")
        return FLUX if config.get("_class_name") == "FluxTransformer2DModel" else "unknown"
    raise BaseError(f"base.path {path} has no UNet (unet/config.json): take SD1.5, SDXL or Flux.1.")
