"""What an adapter file was made for, and the one sentence that says why it can't be used."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import MendableError

FORMAT_VERSION = 1
FAMILY_NAMES = {"atelier": "the atelier", "sd15": "SD1.5", "sd2": "SD2", "sdxl": "SDXL", "sdxl_refiner": "SDXL refiner"}
FAMILY_OF_WIDTH = {768: "sd15", 1024: "sd2", 1280: "sdxl_refiner", 2048: "sdxl"}  # by the width of the text states


class AdapterError(MendableError, ValueError):
    """An adapter that can't be used, in one sentence for the artist."""


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter was made for.

    block_widths: attention width of every cross-attention in file order (down, up, mid).
    mllm: name, revision, lora, prompt_version, precision, num_layers, hidden_size, sem_layers, core_layer; None for an
    image-only adapter. clip_vision: name, width, preprocessing, and since encoders have one their digest (see
    `image_encoder.described`); for an IP-Adapter file also output, what it reads.
    kind: "prefgen", or "ip_adapter" for a public IP-Adapter file. tokens: 0 where the pictures decide.
    """

    format_version: int
    kind: str
    base_family: str
    semantic_width: int
    core_width: int
    image_width: int
    cross_attention_dim: int
    tokens: int
    block_widths: list[int]
    mllm: dict | None = None
    clip_vision: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)

    @property
    def user_width(self) -> int:
        return self.semantic_width + self.core_width + self.image_width
