"""One sampling run on Flux.1 and Chroma: where in the blocks of such a model its users are added.

The query is the block's own, normed and before its positions are rotated into it, of the picture's tokens alone: text
and the reference pictures of Kontext stay as they are. XLabs' files add to what a block gives, InstantX' to its
attention before the output projection.

Newer ComfyUI hands that query over (`attn1_patch`, v0.17). Older ComfyUI lets the attention itself be replaced
(`optimized_attention_override`), where the rotation is taken back: exact up to rounding, and no weight is used twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch

from ..apply_options import Block
from ..branch import split_attention, user_residual
from .application import ActiveUser, Call, Selection
from .layout import NODE, LayoutError
from .run import CALL, Run

# What travels in the options of one model call: the picture's (height, width) in tokens, a list for the number of the
# text's tokens, which older ComfyUI tells the double blocks alone, and one for the inverse of its rotations.
GRID = "prefgen_grid"
TEXT = "prefgen_text"
INVERSE = "prefgen_inverse"
# What travels in the options of one block: its number, what is to be added after it, to its attention, and its
# rotation of positions.
BLOCK = "prefgen_block"
AFTER = "prefgen_after"
INSIDE = "prefgen_inside"
ROTATION = "prefgen_rotation"
OVERRIDE = "optimized_attention_override"


class Residual(NamedTuple):
    """What is added to tokens `start` to `end` of the rows of a selection, [B, end - start, heads, dim_head]."""

    selection: Selection
    start: int
    end: int
    value: torch.Tensor

    def add_to(self, batch: torch.Tensor, first: int = 0) -> None:
        """Add it, in place, to a batch [B, T, width] whose tokens are those from `first` on."""
        tokens = batch[:, self.start - first : self.end - first]
        # By heads, as the attention leaves it: to flatten it first would write it once more.
        self.selection.add(tokens.unflatten(-1, self.value.shape[2:]), self.value)


class Query(NamedTuple):
    """A block's query [B, heads, T, dim_head], and what takes its rotation back, where it is rotated."""

    value: torch.Tensor
    inverse: torch.Tensor | None = None

    def tokens(self, start: int, end: int) -> torch.Tensor:
        """Of the tokens from start to end, before their positions."""
        value = self.value[:, :, start:end]
        return value if self.inverse is None else rotated(value, self.inverse[:, :, start:end])


class FluxRun(Run):
    """As a Run on a UNet; the addresses are ("double", i, 0) and ("single", i, 0)."""

    def patch(self, options: dict, call: Call, x: torch.Tensor, model) -> None:
        """As Run.patch, for latents x [B, C, h, w]."""
        transformer = model.diffusion_model
        token = transformer.patch_size
        options |= {CALL: call, GRID: tuple(-(-side // token) for side in x.shape[-2:]), TEXT: [], INVERSE: []}
        for user in call.users:
            self.tensors.bring(user, x.device, model.manual_cast_dtype or model.get_dtype())
        hands_over = hands_query_over(transformer.double_blocks[0])
        if hands_over:
            self.patch_query(options)
        else:
            prior = options.get(OVERRIDE)
            options[OVERRIDE] = self._attentions.get(OVERRIDE, lambda: partial(attend, self, prior), source=prior)
        replace = options.get("patches_replace", {})
        slots = replace.get("dit", {})
        composed = {
            (f"{kind}_block", number): self.composed(block, slots.get((f"{kind}_block", number)))
            for (kind, number, _), block in self.numbers.items()
            if self.wraps(block, kind, call, hands_over)
        }
        options["patches_replace"] = replace | {"dit": slots | composed}

    def patch_query(self, options: dict) -> None:
        """Have newer ComfyUI show the query of every block and take what is added to its attention."""
        patches = options.get("patches", {})
        first = self._attentions.get("query", lambda: partial(read_query, self))
        last = self._attentions.get("inside", lambda: partial(add_inside, self))
        # First, since another pack may turn or lengthen the query; last, so that nobody takes a user for the model.
        options["patches"] = patches | {
            "attn1_patch": [first, *patches.get("attn1_patch", ())],
            "attn1_output_patch": [*patches.get("attn1_output_patch", ()), last],
        }

    def wraps(self, block: int, kind: str, call: Call, hands_over: bool) -> bool:
        """Whether the block's slot is needed: to add after the block, or to say more than older ComfyUI does."""
        users = [user for user in call.users if user.application.block_weights[block]]
        if hands_over:
            return any(not user.application.in_attention for user in users)
        # The double blocks say how long the text is, which the single ones don't.
        return bool(users) or kind == "double"

    def composed(self, block: int, prior: Callable | None) -> Callable:
        """What stands in a block's slot; the same object as long as the same `prior` does."""
        return self._attentions.get(block, lambda: partial(block_with_users, self, block, prior), source=prior)

    def residuals(self, block: int, query: Query, text: int, options: Mapping) -> Iterator[tuple[ActiveUser, Residual]]:
        """What the users add in a block, from its query, whose first `text` tokens are the text's. Raises
        LayoutError."""
        call: Call = options[CALL]
        height, width = options[GRID]
        end = text + height * width
        rows, _, tokens, _ = query.value.shape
        if rows != len(call.layout) or tokens < end:
            raise LayoutError(
                f"{NODE} can't tell what {rows} x {tokens} tokens in a block of Flux are, since the "
                f"model was called with {len(call.layout)} pictures of {width} x {height}: take the node that cuts "
                "or repeats tokens out of this model's chain."
            )
        for user in call.users:
            if user.application.block_weights[block]:
                yield user, self.residual(user, block, query, (text, end), (height, width))
                if user.application.text_weight and self.kind_of(block) == "single":
                    yield user, self.residual(user, block, query, (0, text), None)

    def residual(
        self, user: ActiveUser, block: int, query: Query, tokens: tuple[int, int], grid: tuple[int, int] | None
    ) -> Residual:
        """What a user adds to a span of tokens. grid: (height, width) of the picture that they are, None for text."""
        start, end = tokens
        rows = user.selection.take(query.tokens(start, end)).transpose(1, 2)
        k, v = self.tensors.keys_values(user, block, rows)
        mask = None
        weight = user.application.text_weight
        if grid is not None:
            mask = self.tensors.mask(user, rows, {"activations_shape": grid})
            mask = None if mask is None else mask[..., None]
            weight = 1.0
        value = user_residual(rows, k, v, rows.shape[2], mask, weight, split_attention)
        return Residual(user.selection, start, end, value)

    def kind_of(self, block: int) -> str:
        """ "double" or "single"."""
        return next(kind for (kind, _, _), number in self.numbers.items() if number == block)


def hands_query_over(block: torch.nn.Module) -> bool:
    """Whether this ComfyUI shows patches the query of a Flux block (v0.17 and newer)."""
    code = getattr(type(block).forward, "__code__", None)
    return code is not None and "attn1_patch" in code.co_consts


def block_with_users(run: FluxRun, block: int, prior: Callable | None, args: dict, extra: dict) -> dict:
    """What ComfyUI calls in place of a block: the block with its users, inside of whatever another node has put there.
    A node that skips the block skips its users with it."""
    original = partial(call_block, run, block, extra["original_block"])
    return original(args) if prior is None else prior(args, extra | {"original_block": original})


def call_block(run: FluxRun, block: int, original: Callable, args: dict) -> dict:
    """A block, with what its users add after it. args: img [B, T, width], txt (of a double block), pe, and options."""
    options = args.get("transformer_options") or {}
    if CALL not in options:
        raise LayoutError(
            f"Another node calls a block of Flux without its options, beside which {NODE} can't work: take that node "
            "out of this model's chain."
        )
    after: list[Residual] = []
    if "txt" in args:
        options[TEXT][:] = [args["txt"].shape[1]]
    options = options | {BLOCK: block, AFTER: after, ROTATION: args["pe"]}
    out = original(args | {"transformer_options": options})
    if after:
        # The block's result is ours to add to; what a gradient needs is not.
        image = out["img"].clone() if out["img"].requires_grad else out["img"]
        for residual in after:
            residual.add_to(image, options[TEXT][0])
        out = out | {"img": image}
    return out


def sort_residuals(run: FluxRun, block: int, query: Query, text: int, options: Mapping) -> list[Residual]:
    """What is added to the attention; what is added after the block goes to where `call_block` looks."""
    inside = []
    for user, residual in run.residuals(block, query, text, options):
        if user.application.in_attention:
            inside.append(residual)
        else:
            options[AFTER].append(residual)
    return inside


def read_query(run: FluxRun, q, k, v, pe=None, attn_mask=None, extra_options=None) -> dict:
    """An `attn1_patch`: q [B, heads, T, dim_head] before its positions. Changes nothing in the attention's inputs."""
    block = run.numbers.get((extra_options["block_type"], extra_options["block_index"], 0))
    users = extra_options[CALL].users
    if block is None or not any(user.application.block_weights[block] for user in users):
        return {}
    after = any(u.application.block_weights[block] and not u.application.in_attention for u in users)
    if pe is None or (after and extra_options.get(BLOCK) != block):
        raise LayoutError(
            f"{NODE} finds the blocks of Flux changed by another node (one that spreads the model over several cards, "
            "or calls it without its patches): take that node out of this model's chain."
        )
    extra_options[INSIDE] = sort_residuals(run, block, Query(q), extra_options["img_slice"][0], extra_options)
    return {}


def add_inside(run: FluxRun, attention: torch.Tensor, extra_options: dict) -> torch.Tensor:
    """An `attn1_output_patch`: attention [B, T, width] before the output projection."""
    return with_residuals(attention, extra_options.pop(INSIDE, ()), True)


def attend(run: FluxRun, prior: Callable | None, attention: Callable, q, k, v, heads, *args, **kwargs) -> torch.Tensor:
    """An `optimized_attention_override` for ComfyUI that doesn't show the query: q [B, heads, T, dim_head], rotated."""
    options = kwargs.get("transformer_options") or {}
    if prior is None:
        out = attention(q, k, v, heads, *args, **kwargs)
    else:
        out = prior(attention, q, k, v, heads, *args, **kwargs)
    block = options.get(BLOCK)
    if block is None or not any(user.application.block_weights[block] for user in options[CALL].users):
        return out
    if not options[TEXT] or options[ROTATION] is None:
        raise LayoutError(
            f"{NODE} can't tell text from picture in the blocks of Flux, since another node leaves out the first ones: "
            "take that node out of this model's chain."
        )
    query = Query(q, inverse_of(options[ROTATION], options[INVERSE]))
    return with_residuals(out, sort_residuals(run, block, query, options[TEXT][0], options), prior is not None)


def with_residuals(attention: torch.Tensor, residuals, borrowed: bool) -> torch.Tensor:
    """attention [B, T, width] with all residuals; itself where there is none. borrowed: it may be another pack's."""
    if not residuals:
        return attention
    if borrowed or attention.requires_grad:
        attention = attention.clone()
    for residual in residuals:
        residual.add_to(attention)
    return attention


def inverse_of(pe: torch.Tensor, cached: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The inverse of rotations pe [B or 1, 1, T, dim_head / 2, 2, 2]; cached: the last ones with theirs, kept up to
    date here, since all blocks of a model call have the same."""
    if not cached or cached[0][0] is not pe:
        a, b, c, d = pe.flatten(-2).unbind(-1)
        # Of a rotation it is 1, but nodes that stretch positions scale it as well.
        determinant = a * d - b * c
        cached[:] = [(pe, torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2)) / determinant[..., None, None])]
    return cached[0][1]


def rotated(q: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
    """q [B, heads, T, dim_head], every pair of numbers turned by a matrix of pe [B or 1, 1, T, dim_head / 2, 2, 2]."""
    pairs = q.to(pe.dtype).unflatten(-1, (-1, 1, 2))
    turned = torch.addcmul(pe[..., 0] * pairs[..., 0], pe[..., 1], pairs[..., 1])
    return turned.flatten(-2).to(q.dtype)


def flux_addresses(transformer: torch.nn.Module) -> tuple[Block, ...]:
    """Of all blocks, double ones first."""
    doubles = [("double", number, 0) for number in range(len(transformer.double_blocks))]
    return (*doubles, *(("single", number, 0) for number in range(len(transformer.single_blocks))))
