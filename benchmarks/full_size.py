"""SD1.5 and SDXL at their full size, from a graph, on the real server: random weights in the published layouts.

    python benchmarks/full_size.py sd15 sdxl --folder DIR

Writes a checkpoint (fp16, one file, as published), an IP-Adapter and a CLIP vision ViT-H to DIR (SD1.5 3 GB, SDXL 9 GB;
files that are there are used again), starts ComfyUI on the CPU, and queues one graph three times: without PrefGen, with
a user of weight 0, and with a user. Adds time, memory and what came out to docs/performance-full-size.json, from which
docs/performance.md is written. Needs Linux (/proc) and, for SDXL, 20 GB of free memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from processes import PeakMemory
from records import machine, parser_of, publish, reached, wrapped

from training.evaluation.tables import table

FAMILIES = {
    "sd15": {"pixels": 512, "adapter": "ip-adapter_sd15"},
    "sdxl": {"pixels": 1024, "adapter": "ip-adapter_sdxl_vit-h"},
}
# A step of SDXL takes minutes on a CPU.
STEPS = 2
WEIGHT = 0.8


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("families", nargs="+", choices=list(FAMILIES))
    parser.add_argument("--folder", type=Path, required=True, help="where models are kept and the server works")
    parser.add_argument("--pixels", type=int, help="another side of the picture, a multiple of 64")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)  # the models, in a process of its own
    args = parser.parse_args()
    for family in args.families:
        if args.write:
            write_models(family, args.folder / "models")
            continue
        code = os.spawnl(
            os.P_WAIT, sys.executable, sys.executable, __file__, family, "--folder", str(args.folder), "--write"
        )
        if code:
            raise SystemExit(f"The models of {family} could not be written to {args.folder}.")
        row = run(family, args.folder, args.pixels or FAMILIES[family]["pixels"]) | {"note": args.note}
        publish(args.out, "performance-full-size.json", row, ("family",), "Graphs at full size", page)


def write_models(family: str, models: Path) -> None:
    """Checkpoint, IP-Adapter and CLIP vision as ComfyUI's loaders expect them; what is there stays."""
    import torch
    from safetensors.torch import save_file

    from tests import comfyui  # noqa: F401  enters ComfyUI, on the CPU
    from tests.prefgen import ip_adapter_files

    for kind in ("checkpoints", "ipadapter", "clip_vision"):
        (models / kind).mkdir(parents=True, exist_ok=True)
    checkpoint = models / "checkpoints" / f"{family}.safetensors"
    if not checkpoint.exists():
        save_file(checkpoint_of(family), checkpoint)
    name = FAMILIES[family]["adapter"]
    if not (models / "ipadapter" / f"{name}.safetensors").exists():
        ip_adapter_files.write(models / "ipadapter", name, times=10, dtype=torch.float16)
    vision = models / "clip_vision/vit-h.safetensors"
    if not vision.exists():
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        config = CLIPVisionConfig(**shape, projection_dim=1024, patch_size=14, hidden_act="gelu")
        save_file(filled(CLIPVisionModelWithProjection(config).state_dict()), vision)


def checkpoint_of(family: str) -> dict:
    """{published key: random fp16 tensor}: UNet, VAE and text encoders, named by ComfyUI's own way of saving."""
    import comfy.supported_models
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from tests.prefgen.comfy.tiny_models import COMFY

    config = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](
        COMFY[family] | {"model_channels": 320}
    )
    config.set_inference_dtype(torch.float16, None)
    unet = config.get_model({}).diffusion_model.state_dict()
    vae_shape = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    vae_shape |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    vae = AutoencoderKL(ddconfig=vae_shape, embed_dim=4).state_dict()
    clip = config.clip_target({}).clip(device="cpu", dtype=torch.float16, model_options={}).state_dict()
    saved = config.process_unet_state_dict_for_saving(filled(unet))
    saved |= config.process_vae_state_dict_for_saving(filled(vae))
    saved |= config.process_clip_state_dict_for_saving(filled(clip))
    return {key: value.contiguous() for key, value in saved.items()}


def filled(state: dict) -> dict:
    """Random fp16 weights: matrices keep the size of what goes through them, norms are one, biases zero."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        if value.ndim > 1:
            fan_in = value[0].numel()
            state[key] = torch.randn(value.shape, generator=generator).mul_(0.7 * fan_in**-0.5).half()
        else:
            state[key] = torch.full(value.shape, float(key.endswith("weight")), dtype=torch.float16)
    return state


def graph_of(family: str, pixels: int, weight: float | None) -> dict:
    """Checkpoint to latent; weight: None leaves PrefGen out."""
    conditions = {
        name: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["checkpoint", 1], "text": text}}
        for name, text in (("positive", "a sailing boat"), ("negative", "blurry"))
    }
    sampler = {"seed": 1, "steps": STEPS, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0]}
    graph = conditions | {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"{family}.safetensors"}},
        "empty": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": pixels, "height": pixels, "batch_size": 1},
        },
        "sampler": {"class_type": "KSampler", "inputs": {"model": ["checkpoint", 0]} | sampler | links},
        "save": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["sampler", 0], "filename_prefix": f"{family}/{weight}"},
        },
    }
    if weight is None:
        return graph
    graph["sampler"]["inputs"]["model"] = ["apply", 0]
    adapter = f"ipadapter/{FAMILIES[family]['adapter']}.safetensors"
    parts = {"semantic": 1.0, "core": 1.0, "image": 1.0}
    window = {"start_at": 0.0, "end_at": 1.0, "apply_to": "positive only"}
    return graph | {
        "history": {"class_type": "PrefGen_LoadPreferenceHistory", "inputs": {"history": "example: ada"}},
        "vision": {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "vit-h.safetensors"}},
        "encode": {
            "class_type": "PrefGen_EncodePreferenceHistory",
            "inputs": {"liked": ["history", 0], "disliked": ["history", 1], "clip_vision": ["vision", 0]},
        },
        "fuse": {
            "class_type": "PrefGen_FuseUserVector",
            "inputs": {"preference": ["encode", 0], "adapter": adapter} | parts,
        },
        "apply": {
            "class_type": "PrefGen_ApplyUserCrossAttention",
            "inputs": {"model": ["checkpoint", 0], "user": ["fuse", 0], "weight": weight} | window,
        },
    }


def run(family: str, folder: Path, pixels: int) -> dict:
    """Queue the three graphs on one server."""
    from safetensors.torch import load_file

    from scripts.comfy_server import ComfyServer
    from scripts.setup_env import find_comfyui

    load = os.getloadavg()[0]
    times = {}
    peaks = {}
    latents = {}
    with ComfyServer(find_comfyui(), folder) as server, server.client() as client:
        # In this order: the first loads the checkpoint, the second CLIP vision and the adapter.
        for name, weight in (("plain", None), ("weight 0", 0.0), ("user", WEIGHT)):
            peak = PeakMemory(server.process.pid)
            start = time.monotonic()
            client.run(graph_of(family, pixels, weight), seconds=3000)
            times[name] = round(time.monotonic() - start, 1)
            peaks[name] = peak.stop()
            path = max((folder / "output" / family).glob(f"{weight}_*.latent"), key=lambda p: p.stat().st_mtime)
            latents[name] = load_file(str(path))["latent_tensor"].float()
    plain = latents["plain"]
    user = latents["user"]
    return {
        "family": family,
        "pixels": pixels,
        "steps": STEPS,
        "seconds": times,
        "peak_memory_gb": {name: round(peak / 2**30, 2) for name, peak in peaks.items()},
        "weight_0_is_plain": bool((latents["weight 0"] == plain).all()),
        "finite": bool(user.isfinite().all()),
        "change": round(float((user - plain).abs().mean() / plain.std()), 4),
        "checkpoint_gb": round((folder / f"models/checkpoints/{family}.safetensors").stat().st_size / 2**30, 2),
        "machine": machine(),
        "load_before": round(load, 2),
    }


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    words = (
        "Checkpoints in the published layout with random weights (fp16), loaded by "
        "CheckpointLoaderSimple on the real server; three graphs in a row, of which the first "
        "loads the checkpoint and the second CLIP vision and the adapter (an IP-Adapter of the "
        "published size with made-up weights), which the third still holds. Seconds are of whole "
        "graphs, with loading, each run once beside other work: no measure of the branch's time."
    )
    head = ["", "picture", "steps", "without, s", "weight 0, s", "with user, s", "peak memory, GB"]
    graphs = table(
        [*head, "of it with user, GB", "weight 0 is plain", "change by the user"],
        [
            [r["family"], f"{r['pixels']} px", r["steps"], *map(str, r["seconds"].values())]
            + [str(r["peak_memory_gb"][graph]) for graph in ("plain", "user")]
            + [reached(r["weight_0_is_plain"]), f"{r['change']} of the latent's deviation"]
            for r in rows
        ],
    )
    runs = [
        f"{r['family']}: {r['machine']}, load average before {r['load_before']}. {r['note']}".rstrip() for r in rows
    ]
    command = "`python benchmarks/full_size.py sd15 sdxl --folder DIR`"
    return "\n\n".join([command, wrapped(words), graphs, *runs])


if __name__ == "__main__":
    main()
