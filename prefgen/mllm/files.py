"""The folder of an MLLM: what is refused before anything of it is loaded, and what its headers say of its weights."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

from ..compat import VISION_PARTS, transformers_knows, transformers_version
from ..errors import MendableError
from ..files import safetensors_header, visible_files
from . import foreign
from .families import SUPPORTED, family_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of a weight: 4 bits, and a 32-bit scale for each block of 64 (QLoRA, arXiv 2305.14314).
NF4_BYTES = 0.56
UNPACKED = ("embed", "lm_head", *VISION_PARTS)
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


class MLLMError(MendableError, ValueError):
    """A folder or LoRA that can't be used as a preference MLLM, in one sentence for the artist."""


def check_folder(folder: Path) -> None:
    """Refuse a folder before anything of it is loaded. Raises MLLMError with one sentence."""
    refuse(foreign.broken_link(folder, _of(folder)))
    refuse(foreign.lora_in_place_of_a_model(folder))
    if not (folder / "config.json").is_file():
        raise MLLMError(foreign.without_config(folder))
    config = read_json(folder / "config.json", _of(folder))
    if asks_for_code(folder, config):
        raise MLLMError(
            f"The MLLM folder {folder.name} asks to run code of its own, which PrefGen never does: choose a model "
            "that transformers knows."
        )
    _check_family(folder, config)
    refuse(foreign.quantised(folder, config))
    _check_weights(folder)


def refuse(sentence: str | None) -> None:
    """Raise MLLMError with a sentence, if there is one."""
    if sentence:
        raise MLLMError(sentence)


def _of(folder: Path) -> str:
    return f"the MLLM folder {folder.name}"


def _check_family(folder: Path, config: dict) -> None:
    """The kind of model, by its config."""
    if "_diffusers_version" in config and "model_type" not in config:
        raise MLLMError(f"The folder {folder.name} is part of a diffusers model: choose the folder of an MLLM.")
    model_type = str(config.get("model_type") or "")
    if family_of(model_type) is None:
        raise MLLMError(
            f"The MLLM folder {folder.name} holds a {model_type[:40] or 'model'}, which PrefGen can't read histories "
            f"with: choose a {SUPPORTED} model."
        )
    if not transformers_knows(model_type):
        raise MLLMError(
            f"The MLLM folder {folder.name} holds a {model_type}, which the installed transformers "
            f"{transformers_version()} doesn't know: update transformers, or choose another model."
        )


def _check_weights(folder: Path) -> None:
    """The weight files, by their names and headers."""
    present = {file.name for file in visible_files(folder, "*.safetensors")}
    if not present:
        raise MLLMError(foreign.without_weights(folder))
    missing = missing_shards(folder)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MLLMError(f"The MLLM folder {folder.name} lacks {missing[0]}{more}: download what is missing.")
    waiting = foreign.unfinished(folder)
    # aria2 makes a file as long as it will be, of zeros, so that its header is there and wrong.
    if waiting and waiting.lower().endswith(".aria2"):
        raise MLLMError(foreign.without_weights(folder))
    if WEIGHTS not in present and not (folder / INDEX).is_file():
        rather = INDEX if any(SHARD.search(name) for name in present) else WEIGHTS
        raise MLLMError(
            f"The MLLM folder {folder.name} has no {rather}, by which transformers finds its weights "
            f"({min(present)[:60]} is there): get that file from where the model comes from."
        )
    for file in visible_files(folder, "*.safetensors"):
        header, metadata = read_header(file)
        refuse(foreign.quantised_tensors(folder, header))
        refuse(foreign.converted(folder, metadata))


def asks_for_code(folder: Path, config: dict) -> bool:
    """Whether the model or its tokenizer comes with Python code. A model that transformers knows needs none of it."""
    tokenizer = folder / "tokenizer_config.json"
    return "auto_map" in config or (tokenizer.is_file() and "auto_map" in read_json(tokenizer, _of(folder)))


def read_json(path: Path, where: str) -> dict:
    """A JSON object. where: which folder, for the sentence. Raises MLLMError if the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except OSError as error:
        raise MLLMError(foreign.unreadable(error, path, where)) from error
    except (ValueError, RecursionError) as error:
        refuse(foreign.damage(path, where))
        raise MLLMError(f"{path.name} of {where} is damaged: download it again.") from error
    return content


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the index or the other shards' own names speak of and that aren't there."""
    present = {file.name for file in visible_files(folder, "*.safetensors")}
    index = folder / INDEX
    listed = set()
    if index.is_file():
        content = read_json(index, _of(folder))
        try:
            listed = {str(name) for name in content["weight_map"].values()}
        except (KeyError, AttributeError) as error:
            raise MLLMError(f"{index.name} of the MLLM folder {folder.name} is damaged: download it again.") from error
    for name in present:
        shard = SHARD.search(name)
        if shard:
            start = name[: shard.start()]
            count = int(shard.group(2))
            listed |= {f"{start}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    return sorted(listed - present)


def read_header(file: Path) -> tuple[dict[str, dict], dict]:
    """`safetensors_header` of a weight file. Raises MLLMError for one that can't be read or ends too early."""
    where = _of(file.parent)
    try:
        return safetensors_header(file)
    except OSError as error:
        raise MLLMError(foreign.unreadable(error, file, where)) from error
    except ValueError as error:
        refuse(foreign.damage(file, where))
        raise MLLMError(f"{file.name} of {where} is damaged or not fully downloaded: download it again.") from error


def weight_bytes(folder: Path, itemsize: int, nf4: bool = False) -> int:
    """Bytes that the weights take in memory at `itemsize` bytes a number; nf4: the decoder's matrices at 4 bits."""
    total = 0.0
    for file in visible_files(folder, "*.safetensors"):
        header, _ = read_header(file)
        for name, entry in header.items():
            packed = nf4 and len(entry["shape"]) == 2 and not any(part in name for part in UNPACKED)
            total += math.prod(entry["shape"]) * (NF4_BYTES if packed else itemsize)
    return int(total)


def weights_digest(folder: Path, samples: int = 64, size: int = 1 << 16) -> str:
    """sha256 over names, sizes and evenly spaced samples of the weight files (all of small files): tells revisions
    apart without reading gigabytes. folder: one of weights, or the one file; size: bytes of a sample."""
    digest = hashlib.sha256()
    for file in [folder] if folder.is_file() else visible_files(folder, "*.safetensors"):
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode(errors="surrogatepass"))
        with file.open("rb") as stream:
            if length <= samples * size * 4:
                digest.update(stream.read())
                continue
            for i in range(samples):
                stream.seek(i * (length - size) // (samples - 1))
                digest.update(stream.read(size))
    return digest.hexdigest()
