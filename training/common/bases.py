"""The frozen diffusion models that a branch is trained beside, behind one interface: the atelier's own, SD1.5, SDXL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

from prefgen.adapter import FAMILY_NAMES, FAMILY_OF_WIDTH
from prefgen.clip import ClipText
from prefgen.dtypes import DTYPES
from prefgen.errors import MendableError
from prefgen.files import read_text
from prefgen.pictures import shrunk

from .atelier_clip import text_features, tokenize
from .config.schema import ClipText as TextTower
from .config.schema import Config
from .fitting import Pieces, peak_bytes, pieces_that_fit, release
from .sampling import NoiseSchedule, atelier_scheduler

TEXTS_AT_ONCE = 256
# In the VAE, where as many fit.
PICTURES_AT_ONCE = 16
# What diffusers raises for a broken folder.
BROKEN_FOLDER = (OSError, ValueError, KeyError, RuntimeError)


class BaseError(MendableError):
    """A base that can't be used: one sentence that names the key of the configuration."""


@dataclass
class Text:
    """Prompts as the UNet reads them: states [B, T, X], and for SDXL the pooled embedding [B, P]."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def __getitem__(self, rows) -> Text:
        return Text(self.states[rows], None if self.pooled is None else self.pooled[rows])


class Base:
    """A frozen UNet with its VAE, text encoders and noise schedule.

    encoders: (tokenizer, CLIP text model) in the order in which the UNet reads them. scheduler: DDIM of the base's own
    schedule; `schedule` has its prediction type, and its cumulative alphas [timesteps] where none are given. Encoders
    and VAE compute in fp32 weights (SDXL's VAE overflows in half precision), the UNet in `dtype`. BaseError for a
    prediction type that can't be trained with.
    """

    def __init__(
        self,
        family: str,
        unet,
        vae,
        encoders: Sequence[tuple[Any, Any]],
        scheduler: DDIMScheduler,
        pixels: int,
        dtype: torch.dtype,
        device: torch.device | str,
        alphas: torch.Tensor | None = None,
    ):
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise BaseError(f"base.path: a scheduler of prediction_type {prediction} can't be trained with.")
        self.family = family
        self.unet = unet
        self.vae = vae
        self.encoders = list(encoders)
        self.scheduler = scheduler
        self.pixels = pixels
        # Pixels to a side of a latent.
        self.factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.dtype = dtype
        self.device = torch.device(device)
        # In place of the base's own text encoders for `text_bank`, where it names a tower.
        self.clip_text = TextTower()
        self.schedule = NoiseSchedule(scheduler.alphas_cumprod if alphas is None else alphas, prediction, self.device)
        for part in (unet, vae, *(model for _, model in self.encoders)):
            self._freeze(part)

    def take_unet(self, unet) -> None:
        """Add the UNet to a base that was loaded without."""
        self._freeze(unet)
        self.unet = unet

    def _freeze(self, part) -> None:
        if part is not None:
            part.eval().requires_grad_(False).to(self.device)

    def autocast(self) -> AbstractContextManager:
        """The UNet's precision, for a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Text:
        """fp32 on the base's device; pooled is None where the UNet doesn't read it."""
        with self.autocast():
            states, pooled = self._encode(prompts)
        return Text(states.float(), pooled[-1].float() if self.family == "sdxl" else None)

    @torch.no_grad()
    def text_bank(self, texts: list[str]) -> torch.Tensor:
        """Unit pooled embeddings [n, C] of the base's text encoders, side by side where it has two, or of the
        configuration's `clip_text`; fp32, CPU."""
        if self.clip_text.path is not None:
            return ClipText(self.clip_text.path, str(self.device), self.clip_text.architecture)(texts)
        rows = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            _, pooled = self._encode(texts[start : start + TEXTS_AT_ONCE])
            rows.append(torch.cat([F.normalize(p.float(), dim=1) for p in pooled], 1).cpu())
        return F.normalize(torch.cat(rows), dim=1)

    def predict(self, noisy, timesteps, text: Text, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """The UNet's output [B, c, h, w], fp32, for noisy latents of that shape."""
        dtype = next(self.unet.parameters()).dtype
        with self.autocast():
            shape = (noisy.shape[-2] * self.factor, noisy.shape[-1] * self.factor)
            added = self.added_conditions(text, sizes, shape)
            output = self.unet(noisy.to(dtype), timesteps, text.states.to(dtype), added_cond_kwargs=added)
        return output.sample.float()

    def added_conditions(
        self, text: Text, sizes: torch.Tensor | None, shape: tuple[int, int] | None = None
    ) -> dict | None:
        """What SDXL's UNet reads besides the states (arXiv 2307.01952, section 2.2): the pooled embedding, and original
        size, crop and target size in pixels, fp32. sizes: [B, 4], height and width of the original, top and left of
        the crop. shape: height and width of the target, the base's square by default."""
        if self.family != "sdxl":
            return None
        assert sizes is not None and text.pooled is not None
        target = torch.tensor([shape or (self.pixels, self.pixels)]).expand(len(sizes), -1)
        # Not in `dtype`: in bf16 1,300 pixels are 1,296.
        time_ids = torch.cat([sizes.cpu().float(), target], 1).to(self.device)  # [B, 6]
        return {"text_embeds": text.pooled.to(self.dtype), "time_ids": time_ids}

    @torch.no_grad()
    def latents(
        self, pictures: Sequence[np.ndarray], shape: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """(unit-variance latents [B, c, h, w] on the CPU, sizes int32 [B, 4] for `added_conditions`) of uint8 pictures
        [H, W, 3], which are resized and cropped to a height and width in pixels, the base's square by default."""
        height, width = shape or (self.pixels, self.pixels)
        cuts, sizes = zip(*(cut(picture, height, width) for picture in pictures), strict=True)
        latents = torch.cat(self._pieces(self._encode_pictures, cuts))
        return latents, np.array(sizes, np.int32)

    def _encode_pictures(self, cuts: Sequence[np.ndarray]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(cuts)).movedim(-1, 1).to(self.device).float() / 127.5 - 1
        mean = self.vae.encode(pixels).latent_dist.mean
        return (mean * self.vae.config.scaling_factor).cpu()

    @cached_property
    def _pieces(self) -> Pieces:
        """As many pictures as fit what is free when the first is encoded."""
        picture_bytes = encoding_bytes(type(self.vae), self.vae.config, self.pixels)
        return pieces_that_fit(picture_bytes, PICTURES_AT_ONCE, self.device)

    def free_encoders(self) -> None:
        """Give the text encoders' memory back."""
        self.encoders = []
        release()

    def _encode(self, prompts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(states [B, T, X], pooled [B, P] of every encoder)."""
        all_states = []
        all_pooled = []
        for tokenizer, model in self.encoders:
            tokens = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            output = model(input_ids=tokens.input_ids.to(self.device), output_hidden_states=self.family == "sdxl")
            # SDXL reads the penultimate layer, before the final norm.
            all_states.append(output.hidden_states[-2] if self.family == "sdxl" else output.last_hidden_state)
            # CLIPTextModelWithProjection, SDXL's second encoder, has text_embeds; a plain CLIPTextModel has not.
            all_pooled.append(output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output)
        return torch.cat(all_states, -1), all_pooled


class AtelierBase(Base):
    """Its CLIP is one model, whose text side is read through its projection; the UNet stays fp32 under autocast."""

    def _encode(self, prompts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        ((tokenizer, clip),) = self.encoders
        states, pooled = text_features(clip, tokenize(tokenizer, prompts).to(self.device))
        return states, [pooled]


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
    import diffusers

    assert config.base.path is not None, "the schema asks for it"
    try:
        unet = diffusers.UNet2DConditionModel.from_pretrained(
            str(config.base.path), subfolder="unet", local_files_only=True, use_safetensors=True
        )
    except BROKEN_FOLDER as error:
        raise _cant_load(config.base.path, error) from error
    return _in_precision(unet, DTYPES[config.base.precision])


def encoding_bytes(kind, vae_config, pixels: int) -> int:
    """Memory that a VAE of this class and configuration takes for one picture of this side, beside its weights: counted
    on the meta device."""
    with torch.device("meta"):
        vae = kind.from_config(vae_config).eval()
        picture = torch.empty(1, 3, pixels, pixels)
    return peak_bytes(lambda: vae.encode(picture).latent_dist.mean)


def cut(picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """(uint8 [height, width, 3], (height, width, top, left)): the picture is resized until it covers the shape, and its
    middle cut out. With it its own size, and the crop's corner in the resized picture."""
    own_height, own_width = picture.shape[:2]
    scale = max(height / own_height, width / own_width)
    new_height = max(height, round(own_height * scale))
    new_width = max(width, round(own_width * scale))
    if (new_height, new_width) != (own_height, own_width):
        picture = np.asarray(shrunk(Image.fromarray(picture), new_width, new_height))
    top = (new_height - height) // 2
    left = (new_width - width) // 2
    return picture[top : top + height, left : left + width], (own_height, own_width, top, left)


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


def load_pipeline(config: Config, **options):
    """The base's own diffusers pipeline; options: of `from_pretrained`. BaseError with one sentence."""
    import diffusers

    family = config.base.family
    path = config.base.path
    assert path is not None, "the schema asks for it"
    _check_family(family, path)
    if family == "sdxl":
        kind = diffusers.StableDiffusionXLPipeline
    else:
        kind = diffusers.StableDiffusionPipeline
        # It would black pictures out, and with them what is compared. SDXL's pipeline has none.
        options |= {"safety_checker": None, "requires_safety_checker": False}
    diffusers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(str(path), local_files_only=True, use_safetensors=True, **options)
    except BROKEN_FOLDER as error:
        raise _cant_load(path, error) from error


def _published(config: Config, device: torch.device | str, without: Sequence[str]) -> Base:
    family = config.base.family
    absent: dict[str, Any] = dict.fromkeys(("feature_extractor", "image_encoder", *without))
    pipeline = load_pipeline(config, **absent)
    dtype = DTYPES[config.base.precision]
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


def _cant_load(path: Path, error: Exception) -> BaseError:
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return BaseError(f"base.path {path} can't be loaded ({reason}): it needs whole safetensors files.")


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
    try:
        unet = json.loads(read_text(path / "unet/config.json"))
    except (OSError, ValueError) as error:
        raise BaseError(f"base.path {path} has no UNet (unet/config.json): take SD1.5 or SDXL.") from error
    actual = FAMILY_OF_WIDTH.get(unet.get("cross_attention_dim"), "unknown")
    if actual != family:
        name = FAMILY_NAMES.get(actual, actual)
        raise BaseError(f"base.path {path} holds an {name} model, base.family says {family}.")
