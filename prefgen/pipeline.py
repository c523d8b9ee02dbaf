"""A user outside ComfyUI: a user vector from pictures, and stock diffusers that paint with it.

    from prefgen.pipeline import UserReader, put_on

    reader = UserReader("taste.safetensors", clip_vision="models/clip-vit-h", mllm="models/smolvlm2", lora="lora")
    user = reader.read(liked=["a.png", "b.png"], disliked=["c.png"])
    put_on(pipeline, "taste.safetensors", weight=0.8)
    pipeline("a lighthouse", ip_adapter_image_embeds=user.embeds(pipeline)).images[0].save("lighthouse.png")

`pipeline` is any of diffusers' for SD1.5 or SDXL. The vector is the one that the nodes make of the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from .adapter import FAMILY_OF_WIDTH, FLUX, AdapterHeader, UserAdapter
from .adapter_checks import check_compatible, check_encoded
from .adapter_file import load_adapter_once
from .clip import ClipVision
from .encoded import EncodedPreference
from .errors import AdapterError
from .fusion import fuse_user_vector
from .history import HistoryItem, PreferenceHistory
from .mllm.model import PreferenceMLLM
from .pictures import as_tensor, read_picture

Picture: TypeAlias = "str | Path | Image.Image"


@dataclass(frozen=True)
class User:
    """A user of one adapter. vector: e_u [C + D + I], fp32 on the CPU, as `Fuse User Vector` makes it."""

    vector: torch.Tensor
    header: AdapterHeader

    def embeds(self, pipeline, pictures: int = 1, guidance: bool = True) -> list[torch.Tensor]:
        """What a pipeline takes as `ip_adapter_image_embeds` for so many prompts.

        guidance: the pipeline paints both halves, of which the unconditional one comes first and sees no user; False
        for a guidance scale of 1 or less.
        """
        return user_embeds(self.vector.expand(pictures, -1), pipeline, guidance)


class UserReader:
    """Reads pictures as the nodes do, with the encoders that an adapter was trained with.

    adapter: a file of `training.export`. mllm: a transformers folder, lora: a PEFT folder, clip_vision: a CLIP of
    transformers or open_clip (`architecture`: see `clip.ClipVision`); what the adapter has no part for may be left out.
    AdapterError, MLLMError or ClipError, one sentence, for what doesn't fit.
    """

    def __init__(
        self,
        adapter: str | Path,
        clip_vision: str | Path | None = None,
        mllm: str | Path | None = None,
        lora: str | Path | None = None,
        architecture: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.adapter = user_adapter(adapter)
        self.vision = ClipVision(Path(clip_vision), device, architecture) if clip_vision is not None else None
        self.mllm = PreferenceMLLM.load(mllm, dtype, device, lora) if mllm is not None else None

    def read(
        self,
        liked: Sequence[Picture],
        disliked: Sequence[Picture] = (),
        liked_prompts: Sequence[str] = (),
        disliked_prompts: Sequence[str] = (),
        semantic: float = 1.0,
        core: float = 1.0,
        image: float = 1.0,
    ) -> User:
        """The user who likes and dislikes these pictures: files or PIL images, oldest first, with the prompts that made
        them where they are known. semantic, core, image: weights of the three parts, as in Fuse User Vector; one that
        is 0 needs no encoder. Raises PictureError for a picture that can't be read."""
        header = self.adapter.header
        if self.mllm is None and ((header.semantic_width and semantic) or (header.core_width and core)):
            raise AdapterError(
                f"{self.adapter.name} reads histories with an MLLM: give UserReader its folder as mllm, or read with "
                "semantic=0 and core=0."
            )
        if self.vision is None and header.image_width and image:
            raise AdapterError(
                f"{self.adapter.name} reads pictures with CLIP vision: give UserReader its folder as clip_vision, or "
                "read with image=0."
            )
        likes = [_tensor(picture) for picture in liked]
        dislikes = [_tensor(picture) for picture in disliked]
        encoded = self.encode(PreferenceHistory.from_images(likes, dislikes, liked_prompts, disliked_prompts))
        return User(fuse_user_vector(self.adapter, encoded, semantic, core, image), header)

    def encode(self, history: PreferenceHistory) -> EncodedPreference:
        """What the encoders read off a history. AdapterError where they aren't those of the adapter's training."""
        encoded = EncodedPreference(
            hidden=self.mllm.encode(history) if self.mllm else None,
            image_embed_liked=self._embeddings(history.liked),
            image_embed_disliked=self._embeddings(history.disliked),
            mllm=self.mllm.fingerprint if self.mllm else {},
            clip_vision={"width": self.vision.width} | self.vision.about if self.vision else {},
            digest=history.digest,
        )
        check_encoded(self.adapter.header, encoded)
        return encoded

    def _embeddings(self, items: Sequence[HistoryItem]) -> torch.Tensor | None:
        if self.vision is None or not items:
            return None
        pixels = [item.image.mul(255).round().byte().numpy() for item in items]
        return self.vision([Image.fromarray(picture) for picture in pixels])


def put_on(pipeline, adapter: str | Path, weight: float = 1.0) -> None:
    """Load an adapter file into a diffusers pipeline, in place of any other. AdapterError for one of another base."""
    adapter = Path(adapter)
    header = user_adapter(adapter).header
    if is_flux(pipeline):
        transformer = pipeline.transformer
        widths = [transformer.inner_dim] * len(transformer.transformer_blocks)
        check_compatible(header, widths, transformer.config.joint_attention_dim, FLUX)
        no_encoder = {"image_encoder_pretrained_model_name_or_path": None}
    else:
        unet = pipeline.unet
        crosses = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
        widths = [unet.get_submodule(name).to_k.out_features for name in crosses]
        cross_dim = unet.config.cross_attention_dim
        check_compatible(header, widths, cross_dim, FAMILY_OF_WIDTH.get(cross_dim, ""))
        no_encoder = {"image_encoder_folder": None}
    take_off(pipeline)
    pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, **no_encoder)
    pipeline.set_ip_adapter_scale(weight)


def take_off(pipeline) -> None:
    """Take any adapter off a pipeline."""
    denoiser = pipeline.transformer if is_flux(pipeline) else pipeline.unet
    if getattr(denoiser, "encoder_hid_proj", None) is not None:
        pipeline.unload_ip_adapter()


def is_flux(pipeline) -> bool:
    """Whether a pipeline paints with Flux.1's transformer."""
    return hasattr(getattr(pipeline, "transformer", None), "single_transformer_blocks")


def user_embeds(vectors: torch.Tensor, pipeline, guidance: bool = True) -> list[torch.Tensor]:
    """`ip_adapter_image_embeds` of user vectors [B, C + D + I], one a prompt: by turns no user, as in training, and
    the user; without guidance, and on Flux, which takes the other half by itself, the users alone."""
    guidance = guidance and not is_flux(pipeline)
    rows = torch.stack([torch.zeros_like(vectors), vectors]).flatten(0, 1) if guidance else vectors
    return [rows[:, None].to(pipeline.device, pipeline.dtype)]


def user_adapter(path: str | Path) -> UserAdapter:
    """A PrefGen adapter. AdapterError for an IP-Adapter, which diffusers reads pictures for by itself, and others."""
    adapter = load_adapter_once(path)
    if not isinstance(adapter, UserAdapter):
        raise AdapterError(f"{Path(path).name} is an IP-Adapter: give diffusers its pictures as ip_adapter_image.")
    return adapter


def _tensor(picture: Picture) -> torch.Tensor:
    if isinstance(picture, Image.Image):
        return as_tensor(np.array(picture.convert("RGB")))
    return as_tensor(read_picture(picture))
