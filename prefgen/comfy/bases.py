"""What of a loaded model a user can be added to: the cross-attentions of a UNet, or the blocks of Flux.1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher

from ..adapter import FAMILY_NAMES, FAMILY_OF_WIDTH, FLUX, AdapterHeader
from ..adapter_checks import check_compatible
from ..apply_options import Block
from .flux_run import FluxRun, flux_addresses
from .run import Run

# Why nothing reaches the models that people try it on, by the name of ComfyUI's class.
NO_ADAPTER = {
    "SD3": "SD3.5's only adapter changes at every step, which no hook of ComfyUI serves",
    "Flux2": "no adapter is published for Flux.2, whose widths aren't Flux.1's",
    "QwenImage": "no adapter is published for Qwen-Image",
    "Lumina2": "no adapter is published for Z-Image or Lumina 2",
    "Krea2": "no adapter is published for Krea 2",
}
# Other models of Flux' blocks go by the name of ComfyUI's class.
FLUX_NAMES = {"Flux": FAMILY_NAMES[FLUX], "ChromaRadiance": "Chroma Radiance"}


@dataclass(frozen=True)
class Base:
    """A model that users can be added to.

    name: what people call it. addresses, widths: of every place where a user can be added, in the order of adapter
    files. doubles: how many of the places are double blocks, 0 for a UNet. run: what a sampling run on it is.
    """

    name: str
    addresses: tuple[Block, ...]
    widths: tuple[int, ...]
    text_width: int
    run: type[Run] = Run
    doubles: int = 0

    def check(self, header: AdapterHeader) -> int:
        """How many of the places an adapter reaches, the first ones. Raises AdapterError if it doesn't fit."""
        # XLabs' files for Flux have K and V for the double blocks alone.
        count = self.doubles if self.doubles and not header.in_attention else len(self.addresses)
        check_compatible(header, self.widths[:count], self.text_width, self.name)
        return count


def base_of(model: ModelPatcher) -> Base | None:
    """What a model as it is patched offers; None for one that no user can be added to."""
    diffusion_model = model.get_model_object("diffusion_model")
    attentions = list(unet_blocks(diffusion_model))
    if attentions:
        text_width = attentions[0][1].to_k.in_features
        widths = tuple(attention.heads * attention.dim_head for _, attention in attentions)
        return Base(family_name(model, text_width), tuple(block for block, _ in attentions), widths, text_width)
    if not is_flux1(diffusion_model):
        return None
    addresses = flux_addresses(diffusion_model)
    return Base(
        name=FLUX_NAMES.get(type(model.model).__name__, type(model.model).__name__),
        addresses=addresses,
        widths=(diffusion_model.hidden_size,) * len(addresses),
        text_width=diffusion_model.params.context_in_dim,
        run=FluxRun,
        doubles=len(diffusion_model.double_blocks),
    )


def is_flux1(diffusion_model: torch.nn.Module) -> bool:
    """Whether a model is built of Flux.1's blocks, and isn't Flux.2, which ComfyUI builds of the same class."""
    if isinstance(diffusion_model, Chroma):
        return True
    return isinstance(diffusion_model, Flux) and not diffusion_model.params.global_modulation


def why_unreached(model: ModelPatcher) -> str:
    """Why no adapter reaches a model, in words without an end; "" where nobody knows the model."""
    return next((NO_ADAPTER[each.__name__] for each in type(model.model).__mro__ if each.__name__ in NO_ADAPTER), "")


def unet_blocks(unet: torch.nn.Module) -> Iterator[tuple[Block, torch.nn.Module]]:
    """Every cross-attention of a UNet with the address ComfyUI dispatches it under, in the order of IP-Adapter
    files: input blocks, output blocks, middle block. Nothing for a model that isn't such a UNet."""
    middle = getattr(unet, "middle_block", None)
    stages = [
        *(("input", number, stage) for number, stage in enumerate(getattr(unet, "input_blocks", ()))),
        *(("output", number, stage) for number, stage in enumerate(getattr(unet, "output_blocks", ()))),
        *([("middle", 0, middle)] if middle is not None else ()),
    ]
    for kind, number, stage in stages:
        for layer in stage.children():
            for index, block in enumerate(getattr(layer, "transformer_blocks", ())):
                if getattr(block, "attn2", None) is not None:
                    yield (kind, number, index), block.attn2


def family_name(model: ModelPatcher, cross_dim: int) -> str:
    """What people call the connected model, for messages."""
    # Released families are told apart by the width of their text states; the atelier's model says what it is.
    family = embedded_family(model) or FAMILY_OF_WIDTH.get(cross_dim)
    return FAMILY_NAMES[family] if family else f"a UNet with text width {cross_dim}"


def embedded_family(model: ModelPatcher) -> str:
    """What the atelier's model says that it is; "" of any other one."""
    # Of the class: newer ComfyUI's configurations answer None, and a warning in the log, to what they haven't.
    return getattr(type(model.model.model_config), "prefgen_family", "")
