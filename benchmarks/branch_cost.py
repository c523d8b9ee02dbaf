"""What the user branch costs in a step, beside ComfyUI_IPAdapter_plus at the same number of tokens.

    PREFGEN_NEIGHBOURS=/folder/with/it python benchmarks/branch_cost.py sd15 sdxl

At the shapes of SD1.5 at 512 and SDXL at 1024 pixels, batch 2 (prompt and negative prompt), published IP-Adapter
layouts at full width with made-up weights. Every cross-attention block is timed in turn without a patch, with ours and
with theirs: the two packs' own patches as their nodes leave them on the same model. Adds to
docs/performance-branch.json, from which docs/performance.md is written. CPU alone, fp32.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
from agents_scale import machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RECORD = ROOT / "docs/performance-branch.json"
PIXELS = {"sd15": 512, "sdxl": 1024}
LAYOUTS = {
    "sd15": {4: "ip-adapter_sd15", 16: "ip-adapter-plus_sd15"},
    "sdxl": {4: "ip-adapter_sdxl_vit-h", 16: "ip-adapter-plus_sdxl_vit-h"},
}
TEXT_TOKENS = 77
ROUNDS = 12


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/branch_cost.py", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="+", choices=list(PIXELS))
    parser.add_argument("--no-step", action="store_true", help="leave out the time of a whole UNet step")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    neighbour = Path(os.environ.get("PREFGEN_NEIGHBOURS", ""), "ComfyUI_IPAdapter_plus")
    if not neighbour.is_dir():
        raise SystemExit("PREFGEN_NEIGHBOURS must name a folder with a checkout of ComfyUI_IPAdapter_plus.")
    from tests import comfyui  # enters ComfyUI, on the CPU; before that, since it has a package `tests` too

    theirs = pack_of(neighbour)
    for family in args.families:
        row = measure(family, lambda name: importlib.import_module(f"{comfyui.PACK}.{name}"), theirs, args)
        record(row | {"note": args.note})
        print(json.dumps(row, indent=1))


def pack_of(folder: Path) -> tuple[ModuleType, ModuleType]:
    """The other pack's modules, imported as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[folder.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(importlib.import_module(f"{folder.name}.{part}") for part in ("IPAdapterPlus", "utils"))


def measure(family: str, pack, theirs, args) -> dict:
    import torch

    from tests.prefgen.comfy.tiny_models import clip_vision

    load = os.getloadavg()[0]
    model = full_size(family)
    row = {
        "family": family,
        "pixels": PIXELS[family],
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
    }
    if not args.no_step:
        row["step_seconds"] = steps(model, family)
    row["tokens"] = {}
    with tempfile.TemporaryDirectory() as folder:
        _, vision = clip_vision("CLIP ViT-H", Path(folder), 224)
        for tokens, name in LAYOUTS[family].items():
            row["tokens"][tokens] = compare(model, family, name, vision, Path(folder), pack, theirs)
            if not args.no_step:
                share = row["tokens"][tokens]["ours_ms"]["median"] / 1000 / float(np.median(row["step_seconds"]))
                row["tokens"][tokens]["share_of_step"] = round(share, 4)
    return row | {"machine": machine(), "nice": os.nice(0)}


def full_size(family: str):
    """ComfyUI's own UNet of the family, fp32, random weights, in its patcher."""
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    from tests.prefgen.comfy.tiny_models import COMFY, CPU

    shape = COMFY[family] | {"model_channels": 320}
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


def compare(patcher, family: str, layout: str, vision, folder: Path, pack, theirs) -> dict:
    """Milliseconds a step of both packs' branches, summed over all blocks that both reach."""
    import torch

    from tests.prefgen import ip_adapter_files

    path = ip_adapter_files.write(folder, layout, times=10, dtype=torch.float16)
    pictures = [torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    history = pack("prefgen.history").PreferenceHistory.from_images(pictures[:1], pictures[1:])
    patch = pack("prefgen.comfy.patcher")
    with torch.no_grad():
        read = pack("prefgen.comfy.encoding").encode_history(history, None, vision)
        user = pack("prefgen.fusion").fuse_user(pack("prefgen.adapter_file").load_adapter(path), read)
        node = theirs[0].IPAdapterAdvanced().apply_ipadapter
        reference = {"image": pictures[0], "clip_vision": vision}
        weights = theirs[1].ipadapter_model_loader(str(path))
        other = node(patcher, weights, weight=0.8, weight_type="linear", **reference)[0]
    register = other.model_options["transformer_options"]["patches_replace"]["attn2"]
    runs = {}
    for side in ("positive", "both"):
        branch = patch.apply_user(patcher, user, 0.8, apply_to=side).get_wrappers("apply_model", patch.KEY)[0]
        runs[side] = pack("prefgen.comfy.run").Run(branch.applications, branch.blocks, patcher.model.model_sampling, {})
    sigma = patcher.model.model_sampling.sigmas[500].repeat(2)
    options = {"cond_or_uncond": [0, 1], "sigmas": sigma}
    calls = {side: run.call(sigma, options, 2) for side, run in runs.items()}
    blocks = []
    latent = PIXELS[family] // 8
    for (kind, number, index), attention in patch.cross_attention_blocks(patcher):
        at = (kind, number, index)
        queries = latent * latent // halvings(family, kind, number) ** 2
        extra = options | {
            "n_heads": attention.heads,
            "block": (kind, number),
            "transformer_index": index,
            "original_shape": [2, 4, latent, latent],
        }
        width = attention.heads * attention.dim_head
        blocks.append((at, width, queries, extra, register.get(at, register.get(at[:2]))))
    both = [b for b in blocks if b[4] is not None]
    with torch.inference_mode():
        spent = interleaved(both, runs, calls)
        memory_mb = {side: memory_of(pack("prefgen.comfy.run"), run, calls[side], blocks) for side, run in runs.items()}
    plain_ms = spent.pop("plain")
    own = {name: total - plain_ms for name, total in spent.items()}
    return {
        "layout": layout,
        "blocks": {"ours": len(blocks), "both": len(both)},
        "text_attention_ms": spread(plain_ms),
        **{f"{name}_ms": spread(values) for name, values in own.items()},
        "ours_to_theirs": spread(own["ours"] / own["theirs"], 3),
        "ours_both_to_theirs": spread(own["ours_both"] / own["theirs"], 3),
        "memory_mb": memory_mb,
    }


def interleaved(blocks: list, runs: dict, calls: dict) -> dict[str, np.ndarray]:
    """Milliseconds of every round in all blocks, with our branch on one half and on both, with theirs, with none."""
    import torch

    spent = {name: [] for name in ("ours", "ours_both", "theirs", "plain")}
    for turn in range(ROUNDS + 1):  # the first warms up
        sums = dict.fromkeys(spent, 0.0)
        for at, width, queries, extra, prior in blocks:
            q, k, v = (torch.randn(2, n, width) for n in (queries, TEXT_TOKENS, TEXT_TOKENS))
            with_call = {side: extra | {"prefgen_call": call} for side, call in calls.items()}
            attentions = {
                "ours": (runs["positive"].patch(at, None), with_call["positive"]),
                "ours_both": (runs["both"].patch(at, None), with_call["both"]),
                "theirs": (prior, extra),
                "plain": (plain, extra),
            }
            # In turn, since the first of a round meets cold caches.
            names = list(attentions)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                attention, options = attentions[name]
                start = time.perf_counter()
                attention(q, k, v, options)
                sums[name] += 1000 * (time.perf_counter() - start)
        if turn:
            for name, total in sums.items():
                spent[name].append(total)
    return {name: np.array(total) for name, total in spent.items()}


def halvings(family: str, kind: str, number: int) -> int:
    """By what the latent's sides are divided at a block."""
    if family == "sd15":
        return {"input": lambda n: 2 ** (n // 3), "output": lambda n: 2 ** (3 - n // 3), "middle": lambda n: 8}[kind](
            number
        )
    return {"input": lambda n: 2 ** (n // 3), "output": lambda n: 2 ** (2 - n // 3), "middle": lambda n: 4}[kind](
        number
    )


def plain(q, k, v, extra):
    """The attention without anybody's patch, as ComfyUI calls it."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)


def memory_of(module, run, call, blocks: list) -> dict[str, float]:
    """Megabytes at fp16: what a run keeps on the device, the largest surplus in one block's attention, and both.

    With torch's attention, which ComfyUI takes on most GPUs: that of the CPU makes large temporaries of its own.
    """
    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    def plain_attention(q, k, v, extra):
        return attention_pytorch(q, k, v, extra["n_heads"])

    chosen = module.optimized_attention
    module.optimized_attention = attention_pytorch
    try:
        surplus = 0
        for at, width, queries, extra, _ in blocks:
            q, k, v = (torch.randn(2, n, width) for n in (queries, TEXT_TOKENS, TEXT_TOKENS))
            ours = run.patch(at, None)
            peaks = []
            ours(q, k, v, extra | {"prefgen_call": call})  # K and V come to the device
            for attention in (ours, plain_attention):
                with live_memory() as alive:
                    result = attention(q, k, v, extra | {"prefgen_call": call})
                del result
                peaks.append(alive.peak)
            surplus = max(surplus, peaks[0] - peaks[1])
    finally:
        module.optimized_attention = chosen
    stored = sum(x.numel() * x.element_size() for pair in run._keys_values.values() for x in pair)
    megabytes = {"held": stored / 2**21, "moment": surplus / 2**21, "all": (stored + surplus) / 2**21}  # fp32 to fp16
    return {name: round(size, 2) for name, size in megabytes.items()}


def live_memory():
    """A dispatch mode that counts the bytes of all storages that operations made and that are still alive."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now = self.peak = 0
            self.alive: set[int] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in inputs and storage._cdata not in self.alive:
                        self.alive.add(storage._cdata)
                        self.now += storage.nbytes()
                        weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return result

        def free(self, key: int, size: int) -> None:
            self.alive.discard(key)
            self.now -= size

    return Live()


def spread(values: np.ndarray, digits: int = 2) -> dict:
    low, high = np.percentile(values, [10, 90])
    return {
        "median": round(float(np.median(values)), digits),
        "p10_p90": [round(float(x), digits) for x in (low, high)],
    }


def record(row: dict) -> None:
    """Add or replace a row, then write the page anew."""
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    rows = sorted([r for r in rows if r["family"] != row["family"]] + [row], key=lambda r: r["family"])
    RECORD.write_text(json.dumps(rows, indent=1) + "\n")
    import performance_page

    performance_page.write()


if __name__ == "__main__":
    main()
