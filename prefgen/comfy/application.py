"""Who is on, with what weight, where: a user as applied to a model, and what of that is so in one model call.

An option of Apply User Cross-Attention is an input in nodes/user.py, is read from what an artist types in
prefgen/apply_options.py, and becomes a field here in `apply_user` (patcher.py). What depends on the step is asked in
`Run.weights_at`, what depends on the block, the item or the place in user_tensors.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..apply_options import Points
from ..fusion import FusedUser
from .layout import Layout, Row
from .sigmas import Sigmas


@dataclass(frozen=True, eq=False)
class Application:
    """One user applied to a model, with the options of Apply User Cross-Attention as `apply_user` has read them.

    attn_mask: [b, H, W] in 0..1 or None. uncond: the unconditional half gets what training calls no user, or the user's
    disliked pictures. block_weights: one for every block, in file order. weight_schedule: (share of the sampling,
    weight) points, none for a level weight. item_weights: (number of the batch item, weight) points, none for all items
    alike. All weights multiply `weight`. For Flux: in_attention, as the adapter's header says; text_weight, of the
    text's tokens in single blocks, to which InstantX' own pipeline adds the user as well.
    """

    user: FusedUser
    weight: float
    start_at: float
    end_at: float
    attn_mask: torch.Tensor | None
    uncond: bool
    block_weights: tuple[float, ...]
    weight_schedule: Points = ()
    item_weights: Points = ()
    in_attention: bool = False
    text_weight: float = 0.0

    @property
    def by_item(self) -> bool:
        """Whether it matters which item of the batch is painted."""
        return bool(self.item_weights) or (self.attn_mask is not None and len(self.attn_mask) > 1)

    @cached_property
    def by_place(self) -> bool:
        """Whether it matters which part of the canvas is painted. The first time this reads the mask."""
        return self.attn_mask is not None and bool((self.attn_mask != self.attn_mask[:, :1, :1]).any())

    @property
    def by_sigma(self) -> bool:
        """Whether it matters which step of the sampling is painted."""
        return self.start_at > 0.0 or self.end_at < 1.0 or bool(self.weight_schedule)

    def prepare(self, model_sampling) -> None:
        """Read what a run needs of the mask and of the model's schedule, so that no step waits for the device."""
        _ = self.by_place
        Sigmas.of(model_sampling).read(model_sampling, (self.start_at, self.end_at), bool(self.weight_schedule))


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows of a batch that a user is added to.

    spans: (first row, row after the last). rows: what they are, in that order. keys: for each of them, or for all
    alike, 0 for the user's K and V or 1 for those of no user.
    """

    spans: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]
    keys: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, uncond: bool) -> Selection:
        """The rows of the half with the prompt; of both halves if `uncond`."""
        numbers = [number for number, row in enumerate(layout.rows) if uncond or not row.negative]
        starts = [number for number in numbers if number - 1 not in numbers]
        ends = [number + 1 for number in numbers if number + 1 not in numbers]
        rows = tuple(layout.rows[number] for number in numbers)
        keys = tuple(int(row.negative) for row in rows)
        # One row of K and V does for all where all are of the same half.
        return cls(tuple(zip(starts, ends, strict=True)), rows, keys[:1] if len(set(keys)) == 1 else keys)

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        """These rows of a batch; a view where they stand side by side."""
        if self.spans == ((0, batch.shape[0]),):
            return batch
        parts = [batch[start:end] for start, end in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add(self, batch: torch.Tensor, residual: torch.Tensor) -> None:
        """Add a residual of these rows to a batch, in place."""
        residual = residual.to(batch.dtype)
        first = 0
        for start, end in self.spans:
            batch[start:end].add_(residual[first : first + end - start])
            first += end - start


@dataclass(frozen=True, eq=False)
class ActiveUser:
    """One application that is on in a model call: with what weight, and added to which rows of the batch. number: its
    own among those of the run."""

    number: int
    application: Application
    weight: float
    selection: Selection

    @property
    def is_level(self) -> bool:
        """Whether the weight is the same in all steps of a run and for all items."""
        return not self.application.weight_schedule and not self.application.item_weights

    def weight_in(self, block: int) -> float:
        """The weight in a block, which item weights multiply."""
        return self.weight * self.application.block_weights[block]


@dataclass(frozen=True, eq=False)
class Call:
    """One model call: the rows of its batch, and who is on."""

    layout: Layout
    users: tuple[ActiveUser, ...]
