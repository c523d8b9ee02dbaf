"""What the user branch costs in a step, beside ComfyUI_IPAdapter_plus at the same number of tokens.

    PREFGEN_NEIGHBOURS=/folder/with/it python benchmarks/branch_cost.py sd15 sdxl

At the shapes of SD1.5 at 512 and SDXL at 1024 pixels, batch 2 (prompt and negative prompt), published IP-Adapter
layouts at full width with made-up weights. Every cross-attention block is timed in turn without a patch, with ours and
with theirs: the two packs' own patches as their nodes leave them on the same model. Adds to
docs/performance-branch.json, from which docs/performance.md is written. CPU alone, fp32.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from records import machine, parser_of, publish, reached, spread, with_spread, wrapped

from training.evaluation.tables import table

PIXELS = {"sd15": 512, "sdxl": 1024}
NAMES = {"sd15": "SD1.5, 512 px", "sdxl": "SDXL, 1024 px"}
LAYOUTS = {
    "sd15": {4: "ip-adapter_sd15", 16: "ip-adapter-plus_sd15"},
    "sdxl": {4: "ip-adapter_sdxl_vit-h", 16: "ip-adapter-plus_sdxl_vit-h"},
}
# The latent's sides are halved three times in SD1.5 and twice in SDXL; every level has three blocks.
LEVELS = {"sd15": 3, "sdxl": 2}
TEXT_TOKENS = 77
ROUNDS = 12
# The bars: a third of their time, 3 % of a step, 20 MB.
MOST_OF_THEIRS = 1 / 3
MOST_OF_STEP = 0.03
MOST_MEGABYTES = 20


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("families", nargs="+", choices=list(PIXELS))
    parser.add_argument("--no-step", action="store_true", help="leave out the time of a whole UNet step")
    args = parser.parse_args()
    from tests import neighbours

    if neighbours.checkout(neighbours.IPADAPTER_PLUS) is None:
        raise SystemExit(f"{neighbours.why_not(neighbours.IPADAPTER_PLUS)}.")
    from tests import comfyui  # enters ComfyUI, on the CPU; before that, since it has a package `tests` too

    theirs = neighbours.ipadapter_plus()

    def ours(name: str) -> ModuleType:
        return importlib.import_module(f"{comfyui.PACK}.{name}")

    title = "A step with the user branch, beside ComfyUI_IPAdapter_plus"
    for family in args.families:
        row = measure(family, ours, theirs, args.no_step) | {"note": args.note}
        publish(args.out, "performance-branch.json", row, ("family",), title, page)


def measure(family: str, ours: Callable[[str], ModuleType], theirs: list[ModuleType], no_step: bool) -> dict:
    """A row of the record. ours: a module of this pack as ComfyUI has it, by its name."""
    import torch

    from tests.prefgen.comfy.tiny_models import clip_vision

    row = {
        "family": family,
        "pixels": PIXELS[family],
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    model = full_size(family)
    if not no_step:
        row["step_seconds"] = steps(model, family)
    row["tokens"] = {}
    with tempfile.TemporaryDirectory() as folder:
        _, vision = clip_vision("CLIP ViT-H", Path(folder), 224)
        for tokens, layout in LAYOUTS[family].items():
            patched = patched_models(model, layout, vision, Path(folder), ours, theirs)
            row["tokens"][tokens] = {"layout": layout} | compare(model, family, patched, ours)
            if not no_step:
                share = row["tokens"][tokens]["ours_ms"]["median"] / 1000 / float(np.median(row["step_seconds"]))
                row["tokens"][tokens]["share_of_step"] = round(share, 4)
    return row | {"machine": machine(), "nice": os.nice(0)}


def full_size(family: str, channels: int = 320):
    """ComfyUI's own UNet of the family, fp32, random weights, in its patcher. channels: of its first level."""
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    from tests.prefgen.comfy.tiny_models import COMFY, CPU

    shape = COMFY[family] | {"model_channels": channels}
    config = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](shape)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():  # ComfyUI leaves them as the memory was
            parameter.copy_(torch.randn(parameter.shape[-1:], generator=generator).expand(parameter.shape) * 0.02)
    return ModelPatcher(model, CPU, CPU)


def steps(patcher, family: str, rounds: int = 2) -> list[float]:
    """Seconds of whole UNet calls, batch 2, after one that warms up."""
    import torch

    side = PIXELS[family] // 8
    width = {"sd15": 768, "sdxl": 2048}[family]
    x = torch.randn(2, 4, side, side)
    states = torch.randn(2, TEXT_TOKENS, width)
    extra = {"y": torch.randn(2, 2816)} if family == "sdxl" else {}
    sigma = patcher.model.model_sampling.sigmas[500].repeat(2)
    spent = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            patcher.model.apply_model(x, sigma, c_crossattn=states, transformer_options={}, **extra)
            spent.append(round(time.perf_counter() - start, 2))
    return spent[1:]


def patched_models(
    model,
    layout: str,
    vision,
    folder: Path,
    ours: Callable[[str], ModuleType],
    theirs: tuple | None,
    channels: int = 320,
) -> dict:
    """The model with the same file by each pack: {"positive", "both": ours, for one half or both; "theirs", if any}."""
    import torch

    from tests.prefgen import ip_adapter_files

    path = ip_adapter_files.write(folder, layout, times=channels // 32, dtype=torch.float16)
    liked, disliked = (torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    history = ours("prefgen.history").PreferenceHistory.from_images([liked], [disliked])
    with torch.no_grad():
        encoded = ours("prefgen.comfy.encoding").encode_history(history, None, vision)
        user = ours("prefgen.fusion").fuse_user(ours("prefgen.adapter_file").load_adapter(path), encoded)
    apply_user = ours("prefgen.comfy.patcher").apply_user
    patched = {side: apply_user(model, user, 0.8, apply_to=side) for side in ("positive", "both")}
    if theirs:
        nodes, utils = theirs
        settings = {"weight": 0.8, "weight_type": "linear", "image": liked, "clip_vision": vision}
        with torch.no_grad():
            weights = utils.ipadapter_model_loader(str(path))
            patched["theirs"] = nodes.IPAdapterAdvanced().apply_ipadapter(model, weights, **settings)[0]
    return patched


@dataclass(frozen=True)
class Block:
    """One cross-attention: address, channels, number of queries, and what ComfyUI hands to a patch of it."""

    address: tuple[str, int, int]
    width: int
    queries: int
    extra: dict

    def inputs(self) -> tuple:
        """Random q [2, queries, width] and k, v [2, text tokens, width]."""
        import torch

        return tuple(torch.randn(2, n, self.width) for n in (self.queries, TEXT_TOKENS, TEXT_TOKENS))


def blocks_of(model, family: str, patcher: ModuleType) -> list[Block]:
    """Every cross-attention of the model at the family's picture size."""
    latent = PIXELS[family] // 8
    blocks = []
    for (kind, number, index), attention in patcher.unet_blocks(model.get_model_object("diffusion_model")):
        halved = {"input": number // 3, "output": LEVELS[family] - number // 3, "middle": LEVELS[family]}[kind]
        extra = {
            "cond_or_uncond": [0, 1],
            "n_heads": attention.heads,
            "block": (kind, number),
            "transformer_index": index,
            "original_shape": [2, 4, latent, latent],
        }
        width = attention.heads * attention.dim_head
        blocks.append(Block((kind, number, index), width, (latent // 2**halved) ** 2, extra))
    return blocks


def options_of(model, patched, family: str, patcher: ModuleType) -> dict:
    """The transformer_options that our wrapper hands to a model call of prompt and negative prompt: who is on, and the
    composed attention of every block."""
    import torch

    class Called:
        class_obj = model.model

        def __call__(self, x, t, c_concat, c_crossattn, control, options, **kwargs):
            return options

    latent = PIXELS[family] // 8
    sigma = model.model.model_sampling.sigmas[500].repeat(2)
    states = torch.randn(2, TEXT_TOKENS, {"sd15": 768, "sdxl": 2048}[family])
    (branch,) = patched.get_wrappers("apply_model", patcher.KEY)
    options = {"cond_or_uncond": [0, 1], "sigmas": sigma}
    return branch(Called(), torch.randn(2, 4, latent, latent), sigma, None, states, None, options)


def compare(model, family: str, patched: dict, ours: Callable[[str], ModuleType]) -> dict:
    """Milliseconds a step of both packs' branches, summed over all blocks that both reach."""
    patcher = ours("prefgen.comfy.patcher")
    blocks = blocks_of(model, family, patcher)
    options = {side: options_of(model, patched[side], family, patcher) for side in ("positive", "both")}
    register = patched["theirs"].model_options["transformer_options"]["patches_replace"]["attn2"]
    # ComfyUI looks for the transformer's own slot first, then for one that covers the whole block.
    theirs = {block.address: register.get(block.address, register.get(block.address[:2])) for block in blocks}
    shared = [block for block in blocks if theirs[block.address] is not None]
    spent = timed_rounds(shared, options, theirs)
    plain_ms = spent.pop("plain")
    own = {name: milliseconds - plain_ms for name, milliseconds in spent.items()}
    return {
        "blocks": {"ours": len(blocks), "both": len(shared)},
        "text_attention_ms": spread(plain_ms),
        **{f"{name}_ms": spread(values) for name, values in own.items()},
        "ours_to_theirs": spread(own["ours"] / own["theirs"], 3),
        "ours_both_to_theirs": spread(own["ours_both"] / own["theirs"], 3),
        "memory_mb": {
            side: memory_of(ours("prefgen.comfy.run"), options_of(model, patched[side], family, patcher), blocks)
            for side in ("positive", "both")
        },
    }


def timed_rounds(blocks: list[Block], options: dict, theirs: dict) -> dict[str, np.ndarray]:
    """{whose attention: milliseconds of all blocks in each of ROUNDS}, by turns."""
    import torch

    spent = {name: [] for name in ("ours", "ours_both", "theirs", "plain")}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            sums = dict.fromkeys(spent, 0.0)
            for block in blocks:
                q, k, v = block.inputs()
                attentions = {
                    "ours": (attention_of(options["positive"], block), options["positive"] | block.extra),
                    "ours_both": (attention_of(options["both"], block), options["both"] | block.extra),
                    "theirs": (theirs[block.address], options["positive"] | block.extra),
                    "plain": (plain_attention, block.extra),
                }
                names = list(attentions)
                # Whoever is first finds cold caches: another one each time.
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    attention, extra = attentions[name]
                    start = time.perf_counter()
                    attention(q, k, v, extra)
                    sums[name] += 1000 * (time.perf_counter() - start)
            # The first round projects K and V, and warms up.
            if turn:
                for name, total in sums.items():
                    spent[name].append(total)
    return {name: np.array(totals) for name, totals in spent.items()}


def attention_of(options: dict, block: Block) -> Callable:
    return options["patches_replace"]["attn2"][block.address]


def plain_attention(q, k, v, extra):
    """The attention without anybody's patch, as ComfyUI calls it."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)


def memory_of(run_module: ModuleType, options: dict, blocks: list[Block]) -> dict[str, float]:
    """Megabytes at fp16: what a run keeps on the device, the largest surplus in one block's attention, and both.

    options: of a model call whose K and V aren't on the device yet. With torch's attention, which ComfyUI takes on most
    GPUs: that of the CPU makes large temporaries of its own.
    """
    from comfy.ldm.modules.attention import attention_pytorch

    def plain(q, k, v, extra):
        return attention_pytorch(q, k, v, extra["n_heads"])

    chosen = run_module.optimized_attention
    run_module.optimized_attention = attention_pytorch
    try:
        stays = 0
        surplus = 0
        for block in blocks:
            q, k, v = block.inputs()
            extra = options | block.extra
            attention = attention_of(options, block)
            with live_memory() as first_call:
                attention(q, k, v, extra)
            stays += first_call.now
            peaks = []
            for each in (attention, plain):
                with live_memory() as alive:
                    each(q, k, v, extra)
                peaks.append(alive.peak)
            surplus = max(surplus, peaks[0] - peaks[1])
    finally:
        run_module.optimized_attention = chosen
    # Measured in fp32, told in fp16: half of it.
    megabytes = {"held": stays / 2**21, "moment": surplus / 2**21, "all": (stays + surplus) / 2**21}
    return {name: round(size, 2) for name, size in megabytes.items()}


def live_memory():
    """A dispatch mode that counts the bytes of all storages that operations made and that are still alive."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now = 0
            self.peak = 0
            self.alive: set[int] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            arguments = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in arguments and storage._cdata not in self.alive:
                        self.alive.add(storage._cdata)
                        self.now += storage.nbytes()
                        weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return result

        def free(self, key: int, size: int) -> None:
            self.alive.discard(key)
            self.now -= size

    return Live()


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    words = (
        "Milliseconds that a step takes longer in all cross-attention blocks that both packs "
        "reach, with the same files and tokens; median and the middle 80 % of 12 rounds, in which "
        "plain, ours and theirs take turns. IPAdapter_plus serves both halves and projects K and "
        "V at every step; PrefGen projects them once a run and by default serves the half with "
        "the prompt."
    )
    of_memory = (
        "The share is of the default. More memory: K and V that the run keeps on the device, and the largest "
        "surplus of living storages in one block's attention, counted by a dispatch mode with torch's "
        "attention, at fp16. The adapter's own weights stay on the CPU in a run: "
        "`tests/prefgen/comfy/test_cost.py` "
        "counts that nothing touches them once K and V are projected, that in a whole run a model call reads "
        "sigma once at most and nothing else is read, and that a compiled UNet with a card's attention has no graph "
        "breaks."
    )
    head = ["", "tokens", "ours", "ours, both halves", "theirs", "ours / theirs", "at most 1/3"]
    times = table([*head, "both halves / theirs"], [time_row(*each) for each in measured(rows)])
    head = ["", "tokens", "UNet step, s", "ours, share of it", "at most 3 %", "K and V, MB", "more memory, MB"]
    memory = table([*head, "at most 20 MB", "both halves, MB"], [memory_row(*each) for each in measured(rows)])
    runs = [
        f"{NAMES[r['family']]}: {r['machine']}, {r['threads']} threads, load average before the start\n"
        + f"{r['load_before']}, niceness {r['nice']}. {r['note']}".rstrip()
        for r in rows
    ]
    command = "`PREFGEN_NEIGHBOURS=... python benchmarks/branch_cost.py sd15 sdxl`"
    return "\n\n".join([command, wrapped(words), times, memory, wrapped(of_memory), *runs])


def measured(rows: list[dict]) -> list[tuple[dict, str, dict]]:
    """(row, tokens, what was measured with so many)."""
    return [(row, tokens, figures) for row in rows for tokens, figures in row["tokens"].items()]


def time_row(row: dict, tokens: str, figures: dict) -> list:
    ratio = figures["ours_to_theirs"]
    packs = [with_spread(figures[f"{name}_ms"]) for name in ("ours", "ours_both", "theirs")]
    verdict = reached(ratio["median"] <= MOST_OF_THEIRS)
    return [
        NAMES[row["family"]],
        tokens,
        *packs,
        with_spread(ratio),
        verdict,
        with_spread(figures["ours_both_to_theirs"]),
    ]


def memory_row(row: dict, tokens: str, figures: dict) -> list:
    step = " and ".join(map(str, row.get("step_seconds", []))) or "not measured"
    share = figures.get("share_of_step")
    shares = ["-", "-"] if share is None else [f"{100 * share:.1f} %", reached(share <= MOST_OF_STEP)]
    memory = figures["memory_mb"]["positive"]
    return [NAMES[row["family"]], tokens, step, *shares, str(memory["held"]), str(memory["all"])] + [
        reached(memory["all"] <= MOST_MEGABYTES),
        str(figures["memory_mb"]["both"]["all"]),
    ]


if __name__ == "__main__":
    main()
