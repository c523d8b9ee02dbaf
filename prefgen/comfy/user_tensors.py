"""With what a user is added to an attention: its K and V, and its mask, on the attention's device and in its dtype.

K and V are projected once a run, on the CPU where the adapter's weights stay, and only they go to the device: those of
all blocks in one copy, before the model is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from comfy import model_management

from ..apply_options import interpolated
from ..branch import mask_to_tokens
from .application import ActiveUser, Application
from .layout import NODE, LayoutError, Place


class UserTensors:
    """The tensors of all users of one run. `like` is always the queries [B, T, width] of the rows that a user is added
    to: it says the device and the dtype.

    Several threads may ask at once, one for each card: every entry is complete when it is written. This runs inside a
    compiled model, where a plain dictionary and no function of its own in between costs no graph break.
    """

    def __init__(self, applications: Sequence[Application]):
        with torch.no_grad():
            self._projected = [application.user.keys_values() for application in applications]
        self._keys_values: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._weighted_values: dict[tuple, tuple[float, torch.Tensor | None, torch.Tensor]] = {}
        self._factors: dict[tuple, torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}

    def clear(self) -> None:
        """Let go of everything that was brought to a device."""
        for tensors in (self._keys_values, self._weighted_values, self._factors, self._masks):
            tensors.clear()

    def bring(self, user: ActiveUser, device: torch.device, dtype: torch.dtype, block: int | None = None) -> None:
        """Put K and V of a block, or of all, on a device, in one copy, unless they are there."""
        projected = self._projected[user.number]
        blocks = range(len(projected)) if block is None else (block,)
        keys = {number: (user.number, number, user.selection.keys, device, dtype) for number in blocks}
        missing = [number for number in blocks if keys[number] not in self._keys_values]
        if not missing:
            return
        rows = list(user.selection.keys)
        tensors = []
        for number in missing:
            k, v = (x[rows] for x in projected[number])
            tensors += [k, v * user.weight_in(number) if user.is_level else v]
        flat = torch.cat([x.to(dtype).flatten() for x in tensors])
        flat = flat.to(device, non_blocking=model_management.device_supports_non_blocking(device))
        parts = flat.split([x.numel() for x in tensors])
        on_device = [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
        for number, k, v in zip(missing, on_device[::2], on_device[1::2], strict=True):
            self._keys_values[keys[number]] = (k, v)

    def keys_values(self, user: ActiveUser, block: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K, and V times the user's weight in a block: [1 or B, N, width] each."""
        key = (user.number, block, user.selection.keys, like.device, like.dtype)
        if key not in self._keys_values:  # the attention's precision isn't the model's
            self.bring(user, like.device, like.dtype, block)
        k, v = self._keys_values[key]
        if user.is_level:
            return k, v
        weight = user.weight_in(block)
        # Schedules and context windows change the weights from call to call: the last ones are kept.
        factors = self.item_factors(user, v)
        last = self._weighted_values.get(key)
        if last is None or last[0] != weight or last[1] is not factors:
            last = (weight, factors, v * weight if factors is None else v * (factors * weight))
            self._weighted_values[key] = last
        return k, last[2]

    def item_factors(self, user: ActiveUser, like: torch.Tensor) -> torch.Tensor | None:
        """The item weights of the rows that a user is added to [B, 1, 1], brought to the device once a run; None
        without any."""
        points = user.application.item_weights
        if not points:
            return None
        items = tuple(row.item for row in user.selection.rows)
        key = (user.number, items, like.device, like.dtype)
        if key not in self._factors:
            factors = torch.tensor([interpolated(points, item or 0) for item in items])
            self._factors[key] = factors[:, None, None].to(device=like.device, dtype=like.dtype)
        return self._factors[key]

    def mask(self, user: ActiveUser, like: torch.Tensor, extra: Mapping) -> torch.Tensor | None:
        """The mask for the rows that a user is added to: [1 or B, T or 1, 1], None without one. extra: ComfyUI's
        options of the block. Raises LayoutError for a block whose tokens aren't its picture's pixels."""
        masks = user.application.attn_mask
        if masks is None:
            return None
        # The size comes from the block itself: nodes such as Kohya's Deep Shrink change it inside the model.
        by_place = user.application.by_place
        height, width = extra["activations_shape"][-2:] if by_place else (1, 1)
        key = (user.number, user.selection, (height, width), like.device, like.dtype)
        if key not in self._masks:
            if by_place and height * width != like.shape[1]:
                raise LayoutError(
                    f"The attn_mask of {NODE} can't follow this model: a block of {width} x {height} has "
                    f"{like.shape[1]} tokens. Leave the mask out."
                )
            # An item past the last mask gets the last one. The items of a single mask aren't known.
            parts = [(min(row.item or 0, len(masks) - 1), row.place) for row in user.selection.rows]
            tokens = {
                (number, place): mask_to_tokens(mask_part(masks[number], place), (height, width))
                for number, place in set(parts)
            }
            mask = torch.cat([tokens[part] for part in parts]) if len(tokens) > 1 else tokens[parts[0]]
            self._masks[key] = mask.to(device=like.device, dtype=like.dtype)
        return self._masks[key]


def mask_part(mask: torch.Tensor, place: Place | None) -> torch.Tensor:
    """The part of a canvas' mask [H, W] that a place shows, [1, h, w]; all of it for the canvas itself, and where the
    place doesn't matter because the mask is level."""
    if place is None or place.is_canvas:
        return mask[None]
    return place.cut(mask_to_tokens(mask[None], place.canvas).reshape(1, *place.canvas))
