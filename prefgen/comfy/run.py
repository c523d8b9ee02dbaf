"""One sampling run: who is on in a model call, with what, and where it is added to the attention of each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from comfy.ldm.modules.attention import optimized_attention

from ..apply_options import Block, interpolated
from ..branch import user_residual
from .application import ActiveUser, Application, Call, Selection
from .cache import Cache
from .layout import NODE, WHAT_HELPS, Layout, LayoutError, Row
from .patched_rows import rows_after_patches
from .rows import RowReader
from .sigmas import Sigmas
from .user_tensors import UserTensors

# What travels in the options of one model call.
CALL = "prefgen_call"
# What travels in the options of one block: the query before other packs' attn2 patches, and the call as its rows are
# after them.
QUERY = "prefgen_query"
PATCHED_CALL = "prefgen_patched_call"


class Run:
    """Who is on, with what, where. Lives in the run's own copy of the options, and is dropped when the run ends.

    addresses: of every cross-attention, in file order. conds: the guider's conditions by their names. latent: shape
    [b, C, H, W] of what is sampled; None outside of ComfyUI's guiders.
    """

    def __init__(
        self,
        applications: tuple[Application, ...],
        addresses: Sequence[Block],
        model_sampling,
        conds: Mapping,
        latent: Sequence[int] | None = None,
    ):
        self.applications = applications
        self.numbers = {address: number for number, address in enumerate(addresses)}
        self.was_called = False
        # The attention that the model's file asks for, by block: of quantised files in newer ComfyUI.
        self.preferred: dict[int, object] = {}
        for application in applications:
            application.prepare(model_sampling)
        self.sigmas = Sigmas.of(model_sampling)
        self.sigma_spans = {
            application: (self.sigmas.at(application.start_at), self.sigmas.at(application.end_at))
            for application in applications
        }
        self.rows = RowReader(conds, latent)
        self.tensors = UserTensors(applications)
        self._layouts = Cache()
        self._selections = Cache()
        self._calls = Cache()
        self._origins = Cache()
        self._attentions = Cache()

    def let_go(self) -> None:
        """Free what lies on the device. The run's attentions refer to it, so that dropping it alone frees nothing until
        Python looks for such circles."""
        self.tensors.clear()

    # A model call: who is on, and where.

    def call(self, sigma: torch.Tensor, x: torch.Tensor, options: Mapping, marks, context) -> Call:
        """Who is on, from sigma [B], and in which rows of a batch of latents x [B, C, h, w], from the marks [B, 6] that
        came with it or its text states [B, T, D]. Reads the device once, and only if somebody has a start, an end or a
        schedule, and once where a mask lies under tiles. Raises LayoutError with one sentence."""
        weights = self.weights_at(sigma)
        if not weights:
            return Call(self.layout(()), ())
        by_item = any(application.by_item for application in weights)
        by_place = any(application.by_place for application in weights)
        rows = self.rows.read(x, options, marks, context, by_item, by_place)
        return self.call_of(weights, self.layout(rows))

    def weights_at(self, sigma: torch.Tensor) -> dict[Application, float]:
        """The weight of everyone who is on at a sigma [B], whose rows are all at the same step."""
        if not any(application.by_sigma for application in self.applications):
            return {application: application.weight for application in self.applications}
        now = float(sigma.flatten()[0])
        weights = {}
        for application, (start, end) in self.sigma_spans.items():
            weight = application.weight
            if application.weight_schedule:
                weight *= interpolated(application.weight_schedule, self.sigmas.share(now))
            if weight and end <= now <= start:  # sigmas fall
                weights[application] = weight
        return weights

    def call_of(self, weights: Mapping[Application, float], layout: Layout) -> Call:
        """The one call of these weights in rows of this layout."""

        def compute() -> Call:
            users = []
            for number, application in enumerate(self.applications):
                if application in weights:
                    uncond = application.uncond
                    selection = self._selections.get((layout, uncond), partial(Selection.of, layout, uncond))
                    if selection.rows:
                        users.append(ActiveUser(number, application, weights[application], selection))
            return Call(layout, tuple(users))

        return self._calls.get((tuple(weights.items()), layout), compute)

    def layout(self, rows: Sequence[Row]) -> Layout:
        """The one layout of these rows in this run."""
        return self._layouts.get(tuple(rows), partial(Layout, tuple(rows)))

    # The blocks of a model call.

    def patch(self, options: dict, call: Call, x: torch.Tensor, model) -> None:
        """Have the options of one model call, a copy of our own, add the users of that call to the attention. x: the
        call's latents, on the device that the model computes on. model: ComfyUI's BaseModel."""
        options[CALL] = call
        for user in call.users:
            self.tensors.bring(user, x.device, model.manual_cast_dtype or model.get_dtype())
        replace = options.get("patches_replace", {})
        prior = replace.get("attn2", {})
        # ComfyUI looks for the transformer's own slot first, then for one that covers the whole block.
        composed = {
            address: self.composed(number, prior.get(address, prior.get(address[:2])))
            for address, number in self.numbers.items()
            if any(user.application.block_weights[number] for user in call.users)
        }
        options["patches_replace"] = replace | {"attn2": prior | composed}
        patches = options.get("patches", {})
        others = patches.get("attn2_patch")
        if others:
            # Two of ours, before and after those of other packs, see what these make of the query's rows.
            after = partial(self.after_patches, tuple(others))
            options["patches"] = patches | {"attn2_patch": [before_patches, *others, after]}

    def composed(self, block: int, prior: Callable | None) -> Callable:
        """The attention of one block with its users; the same object as long as the same `prior` sits there, so that a
        compiled model doesn't take every step for a new one."""
        return self._attentions.get(block, lambda: partial(attention_with_users, self, block, prior), source=prior)

    def after_patches(self, others: tuple[Callable, ...], query, context, value, extra: dict):
        """An `attn2_patch` that follows those of other packs: say in the block's options who is on in which of the
        query's rows now. Raises LayoutError."""
        before, before_context, before_value = extra.pop(QUERY)
        call: Call = extra[CALL]
        if query is not before:
            count = query.shape[0]
            key = (others, tuple(extra.get("cond_or_uncond", ())), tuple(before.shape), count)
            origins = self._origins.get(
                key, lambda: rows_after_patches(others, before, before_context, before_value, extra, count)
            )
            if origins is None or before.shape[0] != len(call.layout):
                raise LayoutError(
                    f"{NODE} can't tell what another node makes of the {before.shape[0]} rows of a cross-attention: "
                    f"{WHAT_HELPS}."
                )
            weights = {user.application: user.weight for user in call.users}
            extra[PATCHED_CALL] = self.call_of(weights, self.layout([call.layout.rows[origin] for origin in origins]))
        return query, context, value


def before_patches(query, context, value, extra: dict):
    """An `attn2_patch` that keeps its arguments for the one that follows other packs'."""
    extra[QUERY] = (query, context, value)
    return query, context, value


def attention_with_users(run: Run, block: int, prior: Callable | None, q, k, v, extra: dict) -> torch.Tensor:
    """What ComfyUI calls in place of one cross-attention: q [B, T, width], k and v [B, text tokens, width]."""
    heads = extra["n_heads"]
    if prior is None:
        preferred = {"preferred_attention": run.preferred[block]} if block in run.preferred else {}
        precision = extra.get("attn_precision")
        out = optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=extra, **preferred)
    else:
        out = prior(q, k, v, extra)
    call: Call = extra.get(PATCHED_CALL, extra[CALL])
    if q.shape[0] != len(call.layout) or out.shape[0] != len(call.layout):
        raise LayoutError(
            f"{NODE} can't tell which of the {out.shape[0]} rows of a cross-attention belong to the prompt, since the "
            f"model was called with {len(call.layout)}: {WHAT_HELPS}."
        )
    # What the plain attention has just made is ours to add to; another's result, or what a gradient needs, is not.
    if prior is not None or out.requires_grad:
        out = out.clone()
    for user in call.users:
        if user.application.block_weights[block]:
            query = user.selection.take(q)
            user_k, user_v = run.tensors.keys_values(user, block, query)
            mask = run.tensors.mask(user, query, extra)
            # With so few keys torch's own attention is the quickest, and exact where another one quantises.
            user.selection.add(out, user_residual(query, user_k, user_v, heads, mask))
    return out
