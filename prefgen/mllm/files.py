"""The folder of an MLLM: what is refused before anything of it is loaded, and what can be told from its headers."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

from ..compat import VISION_PARTS, transformers_knows, transformers_version
from ..errors import MendableError
from .families import FAMILY_NAMES, family_of

NF4_BYTES = 0.56  # a weight, with its share of the scales
UNPACKED = ("embed", "lm_head", *VISION_PARTS)
HEADER_LIMIT = 100 * 2**20  # bytes; safetensors' own limit
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


class MLLMError(MendableError, ValueError):
    """A folder or LoRA that can't be used as a preference MLLM, in one sentence for the artist."""


def check_folder(folder: Path) -> None:
    """Refuse a folder before anything of it is loaded. Raises MLLMError with one sentence."""
    if not (folder / "config.json").is_file():
        raise MLLMError(f"The MLLM folder {folder.name} has no config.json: choose a folder of a transformers model.")
    config = read_json(folder / "config.json", f"The config.json of the MLLM folder {folder.name}")
    if asks_for_code(folder, config):
        raise MLLMError(
            f"The MLLM folder {folder.name} asks to run code of its own, which PrefGen never does: choose a model "
            "that transformers knows."
        )
    model_type = config.get("model_type", "")
    if family_of(model_type) is None:
        raise MLLMError(
            f"The MLLM folder {folder.name} holds a {model_type or 'model'}, which PrefGen can't read histories with: "
            f"choose a {FAMILY_NAMES} model."
        )
    if not transformers_knows(model_type):
        raise MLLMError(
            f"The MLLM folder {folder.name} holds a {model_type}, which the installed transformers "
            f"{transformers_version()} doesn't know: update transformers, or choose another model."
        )
    if not list(folder.glob("*.safetensors")):
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        what = "only pickled weights, which PrefGen never opens" if pickles else "no weights"
        raise MLLMError(f"The MLLM folder {folder.name} has {what}: put its .safetensors files there.")
    missing = missing_shards(folder)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MLLMError(f"The MLLM folder {folder.name} lacks {missing[0]}{more}: download what is missing.")
    for file in sorted(folder.glob("*.safetensors")):
        header_of(file)


def asks_for_code(folder: Path, config: dict) -> bool:
    """Whether the model or its tokenizer comes with Python code. A model that transformers knows needs none of it."""
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in read_json(tokenizer, f"{tokenizer.name} of the MLLM folder {folder.name}"):
        return True
    return "auto_map" in config


def read_json(path: Path, what: str) -> dict:
    """A JSON object. Raises MLLMError naming `what` if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise MLLMError(f"{what} is damaged: download it again.") from error
    return content


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the index or the other shards' own names speak of and that aren't there."""
    present = {file.name for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    wanted = set()
    if index.is_file():
        content = read_json(index, f"{index.name} of the MLLM folder {folder.name}")
        try:
            wanted = {str(name) for name in content["weight_map"].values()}
        except (KeyError, AttributeError) as error:
            raise MLLMError(f"{index.name} of the MLLM folder {folder.name} is damaged: download it again.") from error
    for name in present:
        shard = SHARD.search(name)
        if shard:
            start, count = name[: shard.start()], int(shard.group(2))
            wanted |= {f"{start}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    return sorted(wanted - present)


def header_of(file: Path) -> dict[str, dict]:
    """Tensor name -> {"dtype", "shape", "data_offsets"} of a safetensors file, without reading weights. Raises
    MLLMError for a file that ends too early."""
    again = f"{file.name} of the MLLM folder {file.parent.name} is damaged or not fully downloaded: download it again."
    length = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if length < 8 or size > min(length - 8, HEADER_LIMIT):
            raise MLLMError(again)
        try:
            header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            if any(math.prod(entry["shape"]) < 0 for entry in header.values()):
                raise ValueError("negative size")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise MLLMError(again) from error
    if 8 + size + max(ends, default=0) != length:
        raise MLLMError(again)
    return header


def weight_bytes(folder: Path, itemsize: int, nf4: bool = False) -> int:
    """Bytes that the weights take in memory at `itemsize` bytes a number; nf4: the decoder's matrices at 4 bits."""
    total = 0.0
    for file in folder.glob("*.safetensors"):
        for name, entry in header_of(file).items():
            packed = nf4 and len(entry["shape"]) == 2 and not any(part in name for part in UNPACKED)
            total += math.prod(entry["shape"]) * (NF4_BYTES if packed else itemsize)
    return int(total)


def weights_digest(folder: Path, pieces: int = 64, size: int = 1 << 16) -> str:
    """sha256 over names, sizes and evenly spaced pieces of the weight files (small files whole): tells revisions apart
    without reading gigabytes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode())
        with file.open("rb") as stream:
            if length <= pieces * size * 4:
                digest.update(stream.read())
                continue
            for i in range(pieces):
                stream.seek(i * (length - size) // (pieces - 1))
                digest.update(stream.read(size))
    return digest.hexdigest()


def preprocessor_of(folder: Path) -> dict:
    """preprocessor_config.json of a folder, empty if it has none."""
    file = folder / "preprocessor_config.json"
    return read_json(file, f"{file.name} of the MLLM folder {folder.name}") if file.is_file() else {}


def chat_template_of(folder: Path) -> str | None:
    """The chat template that a folder keeps beside its tokenizer's files, as newer and processor-only folders do."""
    plain, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if wrapped.is_file():
        return read_json(wrapped, f"{wrapped.name} of the MLLM folder {folder.name}").get("chat_template")
    return None
