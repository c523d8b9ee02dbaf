"""What `python -m prefgen.check` does inside ComfyUI: a picture without a taste and with it, and what must be equal."""

from __future__ import annotations

import argparse
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import comfy.model_management as management
import comfy.sample
import comfy.sd
import folder_paths
import torch
from comfy import cli_args
from comfy.ldm.modules import attention
from PIL import Image

from .apply_taste import apply_taste
from .atelier_models import load_atelier
from .auto import Request

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "comfyui-frontend-package", "bitsandbytes")
CFG = 5.0


def report(args: argparse.Namespace) -> tuple[bool, str]:
    """(whether all is well, the report in Markdown) for the options of `prefgen.check`."""
    lines = ["### PrefGen check", *(f"- {name}: {value}" for name, value in machine().items())]
    checks: dict[str, bool] = {}
    try:
        with torch.inference_mode():  # as ComfyUI runs a graph
            for name, value in tried(args, checks):
                lines.append(f"- {name}: {value}")
    except Exception as error:  # whatever it is belongs in the report
        checks["it ran to the end"] = False
        lines += ["", "```", *traceback.format_exc().splitlines()[-12:], "```", f"stopped: {error}"]
    lines += ["", *(f"- [{'x' if passed else ' '}] {name}" for name, passed in checks.items())]
    sound = all(checks.values())
    lines += ["", "All is well." if sound else "Something is wrong: paste this report into an issue."]
    return sound, "\n".join(lines)


def machine() -> dict[str, str]:
    """What is told of the machine, and of the ComfyUI in it."""
    import comfyui_version

    device = management.get_torch_device()
    memory = f"{management.get_total_memory(device) / 2**30:.1f} GiB"
    return {
        "ComfyUI": comfyui_version.__version__,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {installed}" for name in LIBRARIES if (installed := version_of(name))),
        "device": f"{management.get_torch_device_name(device)}, {memory}, {management.vram_state.name}",
        "attention": attention.optimized_attention.__name__,
    }


def version_of(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def tried(args: argparse.Namespace, checks: dict[str, bool]) -> Iterator[tuple[str, str]]:
    """Load, paint, compare: what is said of each step, and into `checks` whether it came out as it must."""
    with timed() as spent:
        model, clip, vae = load(args.checkpoint)
    pixels = args.pixels or pixels_of(model)
    yield "model", f"{args.checkpoint or 'the atelier'}, {model.model_dtype()}, {spent()}"
    conds = [[encoded(clip, words)] for words in (args.prompt, "")]

    def paint(patched) -> torch.Tensor:
        return painted(patched, conds, pixels, args.steps, args.seed)

    with timed() as spent:
        plain = paint(model)
    yield "without", f"{args.steps} steps of {pixels} px in {spent()}, {memory_now()}"
    with timed() as spent:
        applied = apply_taste(model, args.taste, args.strength, Request(args.adapter, args.mllm, args.clip_vision))
    yield "taste", f"{args.taste}, read in {spent()}"
    yield "chosen", "; ".join(applied.chosen.splitlines())
    with timed() as spent:
        bent = paint(applied.model)
    yield "with", f"{args.steps} steps in {spent()}, {memory_now()}"
    change = float((bent - plain).std() / plain.std())
    yield "change", f"{change:.3f} of the latent's deviation"
    checks["every number is finite"] = bool(torch.isfinite(plain).all() and torch.isfinite(bent).all())
    checks["at strength 0 the model is the plain one"] = apply_taste(model, args.taste, 0, Request()).model is model
    checks["the plain picture is the same afterwards"] = close(paint(model), plain)
    if applied.positive_words:
        yield "in words", f"{applied.positive_words} | {applied.negative_words}"
    else:
        checks["the taste changes the picture"] = change > 0.001
        checks["the same seed paints the same picture"] = close(paint(applied.model), bent)
    for name, latents in (("without", plain), ("with", bent)):
        yield f"picture {name}", str(saved(vae, latents, name))


def load(checkpoint: str | None) -> tuple:
    """(MODEL, CLIP, VAE) of a file of models/checkpoints, or of the atelier."""
    if checkpoint is None:
        return load_atelier()[:3]
    path = folder_paths.get_full_path_or_raise("checkpoints", checkpoint)
    folders = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True, embedding_directory=folders)[
        :3
    ]


def pixels_of(model) -> int:
    """The side of the pictures that a model is made for."""
    config = model.model.model_config
    if getattr(type(config), "prefgen_family", "") == "atelier":
        return 128
    return 1024 if config.unet_config.get("context_dim") == 2048 else 512


def encoded(clip, words: str) -> list:
    states, pooled = clip.encode_from_tokens(clip.tokenize(words), return_pooled=True)
    return [states, {"pooled_output": pooled}]


def painted(model, conds: list, pixels: int, steps: int, seed: int) -> torch.Tensor:
    """Latents, on the CPU, by the sampler that KSampler starts with."""
    side = pixels // 8
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, side, side))
    noise = comfy.sample.prepare_noise(empty, seed)
    settings = {"disable_pbar": True, "seed": seed}
    return comfy.sample.sample(model, noise, steps, CFG, "euler", "normal", *conds, empty, **settings).cpu()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two latents are the same but for rounding: kernels of a card may add up in another order each time."""
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


def saved(vae, latents: torch.Tensor, name: str) -> Path:
    """Write a picture into ComfyUI's output folder."""
    # ComfyUI's own start, which isn't run here, moves the folder where a flag says so.
    output = cli_args.args.output_directory or folder_paths.get_output_directory()
    folder = Path(output, "prefgen-check")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    picture = vae.decode(latents)[0].clamp(0, 1) * 255
    Image.fromarray(picture.round().byte().cpu().numpy()).save(path)
    return path


@contextmanager
def timed() -> Iterator[Callable[[], str]]:
    """A function that says how long the block took, once the device is done."""
    start = time.perf_counter()
    seconds = 0.0
    yield lambda: f"{seconds:.1f} s"
    if not management.is_device_cpu(management.get_torch_device()) and torch.accelerator.is_available():
        torch.accelerator.synchronize()
    seconds = time.perf_counter() - start


def memory_now() -> str:
    """What is free on the device now."""
    device = management.get_torch_device()
    return f"{management.get_free_memory(device) / 2**30:.1f} GiB free"
