"""What an image-prompt adapter adds to one double block of Flux.1 in a model call, counted: operators, bytes, waits.

    PREFGEN_NEIGHBOURS=/folder/with/it COMFYUI_PATH=/a/comfyui python benchmarks/flux_counts.py

A model call of a Flux.1 with one double block of the published width, bf16, with XLabs' files of 4 and 16 tokens: ours,
and x-flux-comfyui's own block with its processor. A count is the same on every machine, beside any other work. Adds to
docs/performance-flux.json, from which docs/performance.md is written.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from branch_counts import counted
from records import parser_of, publish, wrapped

from training.evaluation.tables import table

TITLE = "What an adapter adds to a double block of Flux, counted"
KINDS = {"4": "xlabs-v1", "16": "xlabs-v2"}
PACKS = {"ours": "ours", "theirs": "x-flux-comfyui", "inside": "x-flux-comfyui, beyond its own block"}
TEXT_TOKENS = 512


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--heads", type=int, default=24, help="of 128 numbers; the published model: 24")
    parser.add_argument("--side", type=int, default=64, help="tokens on a side of the picture; 1024 px: 64")
    args = parser.parse_args()
    from scripts.setup_env import comfyui_version, find_comfyui

    # Enters ComfyUI, on the CPU; before that, since it has a package `tests` too.
    from tests import comfyui, neighbours

    # What ComfyUI takes on most graphics cards; on a CPU it takes one that writes more.
    attention = importlib.import_module("comfy.ldm.modules.attention").attention_pytorch
    importlib.import_module("comfy.ldm.flux.math").optimized_attention = attention

    def ours(name: str) -> ModuleType:
        return importlib.import_module(f"{comfyui.PACK}.{name}")

    name = "x-flux-comfyui"
    theirs = neighbours.modules_of(name, "layers")[0] if neighbours.checkout(name) else None
    row = {"comfyui": comfyui_version(find_comfyui()), "heads": args.heads, "side": args.side, "note": args.note}
    row["tokens"] = counts_of(args, ours, theirs)
    publish(args.out, "performance-flux.json", row, ("comfyui", "heads", "side"), TITLE, page)


def counts_of(args, ours: Callable, theirs: ModuleType | None) -> dict[str, dict[str, dict[str, int]]]:
    """{tokens: {pack: what it adds to a model call}}, from the second call on: the first one projects K and V."""
    import torch

    from tests.prefgen import flux_files
    from tests.prefgen.comfy import tiny_flux

    width = 128 * args.heads
    sizes = flux_files.Sizes(width=width, doubles=1, singles=0)
    shape = {"depth": 1, "depth_single_blocks": 0, "hidden_size": width, "num_heads": args.heads}
    dtype = torch.bfloat16
    model = tiny_flux.build(dtype=dtype, compute=dtype, context_in_dim=sizes.text, **shape)
    block = model.model.diffusion_model.double_blocks[0]
    plain = counted_call(args, model, sizes.text)
    own_block = counted_call(args, model, sizes.text, mixed(theirs, block, None)) if theirs else {}
    figures = {}
    for count, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            adapter = ours("prefgen.adapter_file").load_adapter(flux_files.write(Path(folder), kind, sizes))
        vector = torch.zeros(1, sizes.clip)
        user = ours("prefgen.fusion").FusedUser(vector, adapter, vector)
        patched = ours("prefgen.comfy.patcher").apply_user(model, user, 1.0)
        figures[count] = {"ours": added(counted_call(args, patched, sizes.text), plain)}
        if theirs:
            tokens = adapter.user_tokens(vector[None]).to(dtype)
            adapted = counted_call(args, model, sizes.text, mixed(theirs, block, tokens))
            figures[count] |= {"theirs": added(adapted, plain), "inside": added(adapted, own_block)}
    return figures


def mixed(theirs: ModuleType, block, tokens):
    """The forward of a double block as the pack puts it, with one IP-Adapter or, without tokens, with none."""
    mixer = theirs.DoubleStreamMixerProcessor()
    if tokens is not None:
        processor = theirs.IPProcessor(tokens.shape[-1], block.hidden_size, tokens, 1.0)
        mixer.add_ipadapter(processor.to(tokens.dtype))

    def forward(img, txt, vec, pe, **_):
        return mixer(block, img, txt, vec, pe)

    return forward


def counted_call(args, model, text_width: int, forward: Callable | None = None) -> dict[str, int]:
    """What the second of two model calls of a run does. forward: in place of the double block's own."""
    import torch

    from tests.prefgen.comfy import tiny_flux

    transformer, apply_model = model.model.diffusion_model, model.model.apply_model
    seen, results = [], []

    def call(*inputs, **more):
        seen.append(counted(lambda: results.append(apply_model(*inputs, **more))))
        return results.pop()

    # Around everything, wrappers too.
    model.model.apply_model = call
    if forward:
        transformer.double_blocks[0].forward = forward
    try:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, TEXT_TOKENS, text_width, generator=generator)
        pooled = {"pooled_output": torch.randn(1, tiny_flux.POOLED, generator=generator)}
        conds = [[[states, pooled]]] * 2
        tiny_flux.latents(model, steps=2, cfg=1.0, conds=conds, size=(2 * args.side, 2 * args.side))
    finally:
        del model.model.apply_model
        transformer.double_blocks[0].__dict__.pop("forward", None)
    return seen[-1]


def added(figures: dict[str, int], plain: dict[str, int]) -> dict[str, int]:
    return {name: figures[name] - plain[name] for name in figures}


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    words = (
        "Beyond ComfyUI's own double block with torch's attention, in bf16, batch 1 as at cfg 1, from the second call "
        "of a run on, beside 512 tokens of text. x-flux-comfyui replaces the whole block by its "
        "own, which does without ComfyUI's sums in place: the last row of each is what its adapter adds to that. It "
        "projects K and V at every step, and so reads their weights: 48 MiB a block. Before 0.17 ComfyUI doesn't hand "
        "the query over, and ours takes the rotation back."
    )
    head = ["ComfyUI", "width", "picture's tokens", "adapter's tokens", "pack", "operators", "MiB written", "waits"]
    cells = []
    for row in rows:
        for tokens, figures in row["tokens"].items():
            for pack, name in PACKS.items():
                if pack in figures:
                    each = figures[pack]
                    numbers = [f"{each['operators']:+}", f"{each['bytes'] / 2**20:.1f}", str(each["reads"])]
                    place = [row["comfyui"], str(128 * row["heads"]), str(row["side"] ** 2), tokens]
                    cells.append([*place, name, *numbers])
    notes = [f"{row['comfyui']}: {row['note']}" for row in rows if row["note"]]
    command = "`PREFGEN_NEIGHBOURS=... python benchmarks/flux_counts.py`, record: `performance-flux.json`."
    return "\n\n".join([command, wrapped(words), table(head, cells), *notes])


if __name__ == "__main__":
    main()
