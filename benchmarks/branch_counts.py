"""What the user branch adds to the cross-attentions of a model call, counted: operators, bytes, waits of the host.

    PREFGEN_NEIGHBOURS=/folder/with/it python benchmarks/branch_counts.py sd15 sdxl

The same shapes, files and patches as branch_cost.py, of ComfyUI_IPAdapter_plus beside ours. A count is the same on
every machine, beside any other work. Adds to docs/performance-counts.json, from which docs/performance.md is written.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from branch_cost import (
    LAYOUTS,
    NAMES,
    attention_of,
    blocks_of,
    full_size,
    options_of,
    patched_models,
    plain_attention,
)
from records import parser_of, publish, wrapped

from training.evaluation.tables import table

TITLE = "What the user branch adds to a model call, counted"
# Everything by which the host learns a value of a tensor, and so waits for the device.
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2", "item"}
PACKS = {"ours": "ours", "both": "ours, both halves", "theirs": "IPAdapter_plus"}


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("families", nargs="+", choices=list(NAMES))
    parser.add_argument("--channels", type=int, default=320, help="of the UNet's first level; the published ones: 320")
    args = parser.parse_args()
    # Enters ComfyUI, on the CPU; before that, since it has a package `tests` too.
    from tests import comfyui, neighbours

    # What ComfyUI takes on most graphics cards; on a CPU it takes one that writes more. Before either pack asks for it.
    attention = importlib.import_module("comfy.ldm.modules.attention")
    attention.optimized_attention = attention.attention_pytorch

    def ours(name: str) -> ModuleType:
        return importlib.import_module(f"{comfyui.PACK}.{name}")

    theirs = neighbours.ipadapter_plus() if neighbours.checkout(neighbours.IPADAPTER_PLUS) else None
    for family in args.families:
        row = {"family": family, "channels": args.channels, "tokens": {}, "note": args.note}
        model = full_size(family, args.channels)
        for tokens, layout in LAYOUTS[family].items():
            row["tokens"][tokens] = counts_of(model, args.channels, family, layout, ours, theirs)
        publish(args.out, "performance-counts.json", row, ("family",), TITLE, page)


def counts_of(model, channels: int, family: str, layout: str, ours: Callable, theirs: tuple | None) -> dict:
    """{"first" | "all": {pack: what it adds to the first block or to all that both packs reach}}."""
    from tests.prefgen.comfy.tiny_models import clip_vision

    patcher = ours("prefgen.comfy.patcher")
    with tempfile.TemporaryDirectory() as folder:
        _, vision = clip_vision("CLIP ViT-H", Path(folder), 224)
        patched = patched_models(model, layout, vision, Path(folder), ours, theirs, channels)
    options = {
        "ours": options_of(model, patched["positive"], family, patcher),
        "both": options_of(model, patched["both"], family, patcher),
    }
    register = {}
    if theirs:
        register = patched["theirs"].model_options["transformer_options"]["patches_replace"]["attn2"]
    added = []
    for block in blocks_of(model, family, patcher):
        attentions = {pack: (attention_of(options[pack], block), options[pack] | block.extra) for pack in options}
        # ComfyUI looks for the transformer's own slot first, then for one that covers the whole block.
        other = register.get(block.address, register.get(block.address[:2]))
        if other:
            attentions["theirs"] = other, options["ours"] | block.extra
        if other or not theirs:
            added.append(added_by(block, attentions))
    sums = {
        pack: {name: sum(block[pack][name] for block in added) for name in figures}
        for pack, figures in added[0].items()
    }
    return {"blocks": len(added), "first": added[0], "all": sums}


def added_by(block, attentions: dict) -> dict[str, dict[str, int]]:
    """What each attention does in a block beyond ComfyUI's own, from its second call on: the first one projects K
    and V."""
    import torch

    q, k, v = block.inputs()
    with torch.no_grad():
        plain = counted(lambda: plain_attention(q, k, v, block.extra))
        added = {}
        for pack, (attention, extra) in attentions.items():
            attention(q, k, v, extra)
            done = counted(partial(attention, q, k, v, extra))
            added[pack] = {name: done[name] - plain[name] for name in done}
    return added


def counted(call: Callable) -> dict[str, int]:
    """Operators of a call that aren't views, the bytes that they write (a sum in place writes its result), and waits
    of the host."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counts(TorchDispatchMode):
        operators = written = reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.reads += function.overloadpacket.__name__ in READS
            if not function.is_view:
                self.operators += 1
                self.written += sum(t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Counts() as counts:
        call()
    return {"operators": counts.operators, "bytes": counts.written, "reads": counts.reads}


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    words = (
        "Beyond torch's attention, which ComfyUI takes on most cards, in fp32, batch 2 (prompt and negative prompt), "
        "from the second call of a run on. Operators are those that aren't views; a sum in place counts as written. By "
        "default PrefGen serves the half with the prompt, IPAdapter_plus both. A wait is the host asking for a value "
        "of a tensor."
    )
    head = ["", "tokens", "pack", "operators", "MiB written", "waits", "all blocks: operators", "MiB written", "waits"]
    cells = []
    for row in rows:
        for tokens, figures in row["tokens"].items():
            for pack, name in PACKS.items():
                if pack in figures["first"]:
                    each = [figures["first"][pack], figures["all"][pack]]
                    cells.append([NAMES[row["family"]], tokens, name, *(c for f in each for c in figures_in_words(f))])
    notes = [f"{NAMES[row['family']]}: {row['note']}" for row in rows if row["note"]]
    command = (
        "`PREFGEN_NEIGHBOURS=... python benchmarks/branch_counts.py sd15 sdxl`, record: `performance-counts.json`."
    )
    return "\n\n".join([command, wrapped(words), table(head, cells), *notes])


def figures_in_words(figures: dict) -> list[str]:
    return [f"+{figures['operators']}", f"{figures['bytes'] / 2**20:.1f}", str(figures["reads"])]


if __name__ == "__main__":
    main()
