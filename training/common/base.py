"""A frozen diffusion model that a branch is trained beside, behind one interface; which ones there are: bases.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

from prefgen.clip import ClipText
from prefgen.errors import MendableError
from prefgen.pictures import shrunk

from .atelier_clip import text_features, tokenize
from .config.schema import ClipText as TextTower
from .fitting import Pieces, peak_bytes, pieces_that_fit, release
from .sampling import NoiseSchedule

TEXTS_AT_ONCE = 256
# In the VAE, where as many fit.
PICTURES_AT_ONCE = 16


class BaseError(MendableError):
    """A base that can't be used: one sentence that names the key of the configuration or the folder."""


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

    # Of guided sampling, for the pictures that training shows.
    guidance = 5.0

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
        self.schedule = self._schedule(scheduler, alphas)
        for part in (unet, vae, *(model for _, model in self.encoders)):
            self._freeze(part)

    def _schedule(self, scheduler, alphas: torch.Tensor | None) -> NoiseSchedule:
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise BaseError(f"base.path: a scheduler of prediction_type {prediction} can't be trained with.")
        return NoiseSchedule(scheduler.alphas_cumprod if alphas is None else alphas, prediction, self.device)

    def take_unet(self, unet) -> None:
        """Add the UNet to a base that was loaded without."""
        self._freeze(unet)
        self.unet = unet

    def _freeze(self, part) -> None:
        if part is not None:
            part.eval().requires_grad_(False).to(self.device)

    @property
    def latent_channels(self) -> int:
        return self.unet.config.in_channels

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
        return self._encode_pixels(pixels).cpu()

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor

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
