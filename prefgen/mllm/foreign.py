"""What a folder or file holds in place of a preference MLLM, in one sentence for the artist.

Advice that doesn't help costs a night of downloading, so every kind of folder that people have is named for what it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..files import visible_files

LFS = b"version https://git-lfs"
WEB_PAGE = re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE)
# What downloaders put beside or in place of a file that they aren't done with.
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download", ".!qb")
# Tensors that quantised checkpoints keep beside or in place of their matrices (AWQ and GPTQ, bitsandbytes, FP8 and
# compressed-tensors, Quanto).
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight_format|weight_scale|weight_scale_inv|weight_packed"
    r"|input_scale|_data|_scale|quant_state\..*)$"
)
PACKED_DTYPES = re.compile(r"F8_.*|F6_.*|F4(_.*)?|[IU](8|16|32)")
LORA_PLACE = "models/prefgen/mllm_lora"
# Files that are opened, so that a link to nowhere among them matters.
READ = (".json", ".safetensors", ".jinja", ".model", ".txt")
# Where an inner folder may be the model's own; the latter two are Hugging Face's cache.
INNER = ("*", "snapshots/*", "*/snapshots/*")
PLAIN = "the folder of the unquantised transformers model (config.json and .safetensors)"


def damage(file: Path, where: str) -> str | None:
    """What stands in a file that can't be read, if its first bytes tell. where: which folder, for the sentence."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(LFS):
        return (
            f"{file.name} of {where} is a Git LFS pointer that names a file without holding it: run `git lfs pull` in "
            "that folder, or download the file by itself."
        )
    if WEB_PAGE.match(start):
        return (
            f"{file.name} of {where} is a web page in place of the file: download it by the page's own download "
            "button, signed in if the model asks for it."
        )
    return None


def broken_link(folder: Path, where: str) -> str | None:
    """A link to nowhere among the files that count: to everybody who only asks whether it is there, it isn't."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in READ and file.is_symlink() and not file.exists():
            return (
                f"{file.name} of {where} is a link to a file that isn't there: copy the file itself into the folder, "
                "or put its target back."
            )
    return None


def unreadable(error: OSError, file: Path, where: str) -> str:
    """Why the operating system doesn't hand out a file that is there."""
    if isinstance(error, PermissionError):
        return f"{file.name} of {where} may not be read by ComfyUI: give its user the right to read that file."
    return f"{file.name} of {where} can't be read ({error.strerror or 'no reason given'}): look to its drive."


def lora_in_place_of_a_model(folder: Path) -> str | None:
    """A folder with a LoRA in it. transformers would apply it where peft is installed, and read without it elsewhere,
    so that training and ComfyUI wouldn't read the same."""
    if not (folder / "adapter_config.json").is_file():
        return None
    if not (folder / "config.json").is_file() or not _base_weights(folder):
        return (
            f"{folder.name} holds a LoRA alone, without its MLLM: move it to {LORA_PLACE}/{folder.name}, choose it "
            "there as lora, and choose the MLLM that it was made for."
        )
    return (
        f"The MLLM folder {folder.name} has a LoRA beside its weights: move adapter_config.json and its weights to "
        f"{LORA_PLACE}/<name> and choose it there as lora, or delete both to read without it."
    )


def _base_weights(folder: Path) -> list[Path]:
    return [file for file in visible_files(folder, "*.safetensors") if not file.name.startswith("adapter_")]


def without_config(folder: Path) -> str:
    """Of a folder that has no config.json."""
    if not folder.is_dir():
        there = "is a file, not a folder" if folder.exists() else "isn't there"
        return f"The MLLM folder {folder.name} {there}: choose a folder of a transformers model, with its config.json."
    if (folder / "model_index.json").is_file():
        return (
            f"The folder {folder.name} is a diffusers pipeline, which generates pictures: choose the folder of an MLLM."
        )
    inner = sorted({file.parent.relative_to(folder) for place in INNER for file in folder.glob(f"{place}/config.json")})
    if inner:
        return (
            f"The MLLM folder {folder.name} has no config.json, but its subfolder {inner[-1].as_posix()} does: choose "
            "that one, or move its contents one level up."
        )
    other = _other_weights(folder)
    if other:
        return f"The MLLM folder {folder.name} has no config.json and holds {other}: choose {PLAIN}."
    return f"The MLLM folder {folder.name} has no config.json: choose a folder of a transformers model."


def _other_weights(folder: Path) -> str | None:
    """Weights of other programs in a folder without safetensors."""
    if list(folder.glob("*.gguf")):
        return "GGUF files of llama.cpp, which transformers doesn't run here"
    if [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")]:
        return "ONNX files, which have no hidden states to read"
    if [*folder.glob("*.xml"), *folder.glob("*.npz"), *folder.glob("*.mlpackage")]:
        return "weights of another program"
    return None


def without_weights(folder: Path) -> str:
    """Of a folder that has no safetensors file."""
    waiting = unfinished(folder)
    if waiting:
        return (
            f"The MLLM folder {folder.name} isn't downloaded yet, {waiting} is still there: let the download finish "
            "first."
        )
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    other = _other_weights(folder)
    if other and not pickles:
        return f"The MLLM folder {folder.name} holds {other}: choose {PLAIN}."
    what = "only pickled weights, which PrefGen never opens" if pickles else "no weights"
    return f"The MLLM folder {folder.name} has {what}: put its .safetensors files there."


def unfinished(folder: Path) -> str | None:
    """The name of a weight file that a downloader is still at, or None."""
    places = (folder, folder / ".cache" / "huggingface" / "download")
    for place in places:
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            name = file.name.lower()
            # Hugging Face's own partial files are named by hashes.
            if name.endswith(UNFINISHED) and (".safetensors" in name or name.endswith(".incomplete")):
                return file.name
    return None


def quantised(folder: Path, config: dict) -> str | None:
    """A folder whose config says that its weights are quantised, by which method."""
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):
            settings = part.get(key)
            if settings:
                return quantised_sentence(folder, _method(settings, key))
    return None


def _method(settings: object, key: str) -> str:
    """The field's name for what a quantization_config asks for."""
    if not isinstance(settings, dict):
        return str(settings)[:20]
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "")
    if method == "bitsandbytes" or "load_in_4bit" in settings or "load_in_8bit" in settings:
        return "bitsandbytes, " + ("4 bits" if settings.get("load_in_4bit") else "8 bits")
    return method or ("MLX" if key == "quantization" else "an unnamed method")


def quantised_sentence(folder: Path, method: str) -> str:
    return (
        f"The MLLM folder {folder.name} is quantised ({method}), and adapters need the states of its full-precision "
        "weights: choose the unquantised one of the same model."
    )


def quantised_tensors(folder: Path, header: dict[str, dict]) -> str | None:
    """A weight file with quantised tensors, whatever its config says."""
    for name, entry in header.items():
        dtype = str(entry.get("dtype"))
        packed = PACKED_DTYPES.fullmatch(dtype) and len(entry["shape"]) == 2
        if packed or PACKED.search(name):
            return quantised_sentence(folder, f"{name} is {dtype}")
    return None


def converted(folder: Path, metadata: dict) -> str | None:
    """A weight file that was written for another framework, with other names and transposed kernels."""
    framework = metadata.get("format") if isinstance(metadata, dict) else None
    if framework in (None, "pt"):
        return None
    return (
        f"The MLLM folder {folder.name} was converted for {str(framework)[:20]}: choose the original that transformers "
        "reads, whose weights are saved by PyTorch."
    )


def lora_in_place(folder: Path, adapter: str, weights: str) -> str:
    """Of a folder chosen as a LoRA that has no adapter_config.json."""
    if not folder.is_dir():
        return f"The LoRA folder {folder.name} isn't there: choose a folder that peft has saved, or none."
    if (folder / "config.json").is_file():
        return (
            f"{folder.name} is a whole model, not a LoRA: move it to models/prefgen/mllm/{folder.name} and choose it "
            "there as mllm."
        )
    inner = sorted(file.parent.relative_to(folder) for file in folder.glob(f"*/{adapter}"))
    if inner:
        return (
            f"The LoRA folder {folder.name} has no {adapter}, but its subfolder {inner[-1].as_posix()} does: move its "
            "contents one level up."
        )
    if [file for file in visible_files(folder, "*.safetensors") if file.name != weights]:
        return (
            f"The LoRA folder {folder.name} has no {adapter}: LoRAs of picture models don't fit an MLLM, so choose one "
            "that peft has saved, or none."
        )
    return f"The LoRA folder {folder.name} has no {adapter}: choose a folder that peft has saved."
