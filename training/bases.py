"""The frozen diffusion model that a user branch is trained for: the atelier's, or SD1.5 and SDXL in diffusers' layout.

All of them speak the same words: unit-variance latents, text states, what the UNet wants besides, the noise schedule.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from prefgen.atelier import models

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class BaseError(ValueError):
    """A base that can't be trained on: one sentence."""


@dataclass(frozen=True)
class Text:
    """states [B, T, X]; pooled [B, P] where the UNet wants it (SDXL), else None."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, device: torch.device) -> Text:
        return Text(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


class Base(ABC):
    """A frozen base. family: as adapters name it; alphas: cumulative, float64 [steps]; prediction: "epsilon" or
    "v_prediction"; autocast: the precision that the UNet is run in; pixels: side of the training pictures."""

    family: str
    prediction: str
    alphas: torch.Tensor
    pixels: int
    unet: torch.nn.Module
    autocast: torch.dtype
    identity: list  # what tells this base's latents and texts from another's

    @abstractmethod
    def text(self, texts: Sequence[str]) -> Text:
        """What the UNet reads of prompts."""

    @abstractmethod
    def bank(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit pooled CLIP text embeddings [n, C], float32: the space that e_sem is aligned to."""

    @abstractmethod
    def latents(self, pictures: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """(unit-variance latents [B, c, h, w], geometry int64 [B, 4]) of pictures uint8 [H, W, 3]: original height and
        width, top and left of the square that was kept."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unit-variance latents -> pictures [B, 3, H, W] in -1..1, on the CPU."""

    def added(self, text: Text, geometry: torch.Tensor) -> dict | None:
        """`added_cond_kwargs` of the UNet."""
        return None

    def to(self, device: torch.device | str) -> Base:
        """Everything on a device."""
        self.unet.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def cross_attention_dim(self) -> int:
        return self.unet.config.cross_attention_dim


class AtelierVae:
    """The embedded world's VAE, which its UNet learns from before there is a base."""

    def __init__(self):
        self.vae, self.pixels = models.load_vae_diffusers(), models.IMAGE_SIZE
        self.identity = ["atelier", hashlib.sha256((models.WEIGHTS / "vae.safetensors").read_bytes()).hexdigest()]

    @torch.inference_mode()
    def latents(self, pictures: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Base.latents`."""
        pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            mean = self.vae.encode(pixels).latent_dist.mean.float()
        geometry = torch.tensor([[*picture.shape[:2], 0, 0] for picture in pictures])
        return mean * self.vae.config.scaling_factor, geometry


class AtelierBase(AtelierVae, Base):
    """The embedded world's UNet, VAE and CLIP, fp32."""

    family = "atelier"

    def __init__(self):
        super().__init__()
        self.prediction, self.alphas, self.autocast = models.PREDICTION, models.alphas_cumprod(), torch.bfloat16
        self.clip, self.tokenizer = models.load_clip(), models.clip_tokenizer()
        self.unet = models.load_unet_diffusers().requires_grad_(False)

    @torch.inference_mode()
    def text(self, texts: Sequence[str]) -> Text:
        from .atelier.clip import text_features, tokenize

        with torch.autocast("cpu", torch.bfloat16):
            return Text(text_features(self.clip, tokenize(self.tokenizer, list(texts)))[0].float())

    @torch.inference_mode()
    def bank(self, texts: Sequence[str]) -> torch.Tensor:
        from .atelier.clip import text_features, tokenize

        rows = [
            text_features(self.clip, tokenize(self.tokenizer, list(texts[start : start + 256])))[1]
            for start in range(0, len(texts), 256)
        ]
        return F.normalize(torch.cat(rows), dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        from .sampling import decode

        return decode(self.vae, latents)


class DiffusersBase(Base):
    """SD1.5 or SDXL from a folder that diffusers wrote. BaseError for any other."""

    def __init__(self, folder: Path, family: str, pixels: int, precision: str):
        self.folder, self.family, self.pixels, self.autocast = Path(folder), family, pixels, DTYPES[precision]
        if self.folder.is_file():
            raise BaseError(
                f"{folder} is a single file: base.path should be a folder with unet/, vae/, text_encoder/ and so on, "
                "as diffusers' save_pretrained writes it."
            )
        if not (self.folder / "unet" / "config.json").exists():
            raise BaseError(f"{folder} is no diffusers folder: there is no unet/config.json in it.")
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        self.unet = self._part(UNet2DConditionModel, "unet", self.autocast).requires_grad_(False)
        self._check()
        self.vae = self._part(AutoencoderKL, "vae", torch.float32).requires_grad_(False)  # SDXL's overflows in fp16
        channels = self.vae.config.latent_channels
        if self.unet.config.in_channels != channels:
            raise BaseError(
                f"{folder} takes {self.unet.config.in_channels} channels (an inpainting or editing model): the branch "
                f"is trained on a plain one with {channels}."
            )
        scheduler = self._part(DDPMScheduler, "scheduler")
        self.prediction, self.alphas = scheduler.config.prediction_type, scheduler.alphas_cumprod.double()
        if self.prediction not in ("epsilon", "v_prediction"):
            raise BaseError(f"{folder} predicts {self.prediction}: the branch is trained on epsilon and v_prediction.")
        self.encoders = self._encoders()
        sizes = sorted((f.parent.name, f.name, f.stat().st_size) for f in self.folder.rglob("*.safetensors"))
        self.identity = [family, str(self.folder.resolve()), sizes]

    def _part(self, kind, name: str, dtype: torch.dtype | None = None):
        """One part of the folder, safetensors only, in eval mode."""
        options = {} if dtype is None else {"torch_dtype": dtype, "use_safetensors": True}
        try:
            part = kind.from_pretrained(str(self.folder), subfolder=name, local_files_only=True, **options)
        except Exception as error:  # diffusers and transformers raise many kinds for a broken folder
            raise BaseError(
                f"{self.folder / name} can't be loaded ({str(error).splitlines()[0][:120]}): download it whole, with "
                "safetensors weights."
            ) from error
        return part.eval() if isinstance(part, torch.nn.Module) else part

    def _check(self) -> None:
        """The family by what the UNet wants, never by its name."""
        found = "sdxl" if self.unet.config.addition_embed_type == "text_time" else "sd15"
        if found != self.family or (self.family == "sdxl") != (self.folder / "text_encoder_2").is_dir():
            names = {"sd15": "SD1.5", "sdxl": "SDXL"}
            raise BaseError(f"{self.folder} holds {names[found]}, base.family says {self.family}.")

    def _encoders(self) -> list[tuple]:
        """(tokenizer, text encoder) of one or two CLIPs."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        kinds = [("tokenizer", "text_encoder", CLIPTextModel)]
        if self.family == "sdxl":
            kinds.append(("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection))
        return [
            (self._part(CLIPTokenizer, tokenizer), self._part(kind, encoder, self.autocast).requires_grad_(False))
            for tokenizer, encoder, kind in kinds
        ]

    def _outputs(self, texts: Sequence[str]) -> list:
        found = []
        for tokenizer, encoder in self.encoders:
            ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
            found.append(encoder(ids.to(encoder.device), output_hidden_states=True))
        return found

    @torch.inference_mode()
    def text(self, texts: Sequence[str]) -> Text:
        outputs = self._outputs(texts)
        if self.family == "sd15":
            return Text(outputs[0].last_hidden_state)
        # SDXL reads the last but one layer of both, and the second encoder's projected embedding.
        return Text(torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1].text_embeds)

    @torch.inference_mode()
    def bank(self, texts: Sequence[str]) -> torch.Tensor:
        rows = []
        for start in range(0, len(texts), 64):
            outputs = self._outputs(texts[start : start + 64])
            pooled = [outputs[0].pooler_output, *(o.text_embeds for o in outputs[1:])]
            rows.append(torch.cat([F.normalize(p.float(), dim=1) for p in pooled], 1).cpu())
        return F.normalize(torch.cat(rows), dim=1)

    @torch.inference_mode()
    def latents(self, pictures: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        squares, geometry = zip(*(square(picture, self.pixels) for picture in pictures), strict=True)
        pixels = torch.from_numpy(np.stack(squares)).movedim(-1, 1).float() / 127.5 - 1
        mean = self.vae.encode(pixels.to(self.vae.device)).latent_dist.mean
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return ((mean - shift) * self.vae.config.scaling_factor).cpu(), torch.tensor(geometry)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = latents.to(self.vae.device, torch.float32) / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(z[None]).sample for z in scaled]).clamp(-1, 1).cpu()

    def added(self, text: Text, geometry: torch.Tensor) -> dict | None:
        if self.family != "sdxl":
            return None
        target = torch.tensor([[self.pixels, self.pixels]]).expand(len(geometry), 2)
        ids = torch.cat([geometry, target], 1).to(text.pooled.device, text.pooled.dtype)
        return {"text_embeds": text.pooled, "time_ids": ids}

    def to(self, device: torch.device | str) -> DiffusersBase:
        super().to(device)
        self.vae.to(device)
        for _, encoder in self.encoders:
            encoder.to(device)
        return self

    def drop_encoders(self, keep_vae: bool) -> None:
        """Let go of what is cached: the text encoders, and the VAE unless pictures are to be shown."""
        self.encoders = []
        if keep_vae:
            self.vae.to("cpu")
        else:
            del self.vae
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def square(picture: np.ndarray, side: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The middle square of a picture [H, W, 3] at side x side, and (height, width, top, left) as SDXL counts them: the
    original's size, and the corner after it was resized."""
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.array(resized.crop((left, top, left + side, top + side))), (height, width, top, left)


def load_base(config) -> Base:
    """The base of a configuration."""
    if config.base.family == "atelier":
        return AtelierBase()
    return DiffusersBase(config.base.path, config.base.family, config.base.pixels, config.base.precision)
