"""The models of a diffusers folder, loaded one by one, so that a fault names its folder and what helps.

A pipeline that loads them itself draws at random what a file lacks, and says so in a warning that scrolls past.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from prefgen.clip import BROKEN_FOLDER
from prefgen.compat import absent, dtype_option, from_safetensors, has_vocabulary
from prefgen.errors import out_of_memory
from prefgen.files import read_text, visible_files
from prefgen.mllm import foreign

from .base import BaseError

# What diffusers and transformers raise for a broken folder, or for a package that isn't installed.
CANT_LOAD = (*BROKEN_FOLDER, TypeError, ImportError)
HALF = "fp16"


def load_models(folder: Path, dtype: torch.dtype | None, without: Collection[str] = ()) -> dict[str, torch.nn.Module]:
    """{component: model} of all models that model_index.json names, but those of `without`. dtype: None takes the
    libraries' own choice. BaseError with one sentence, also for a tokenizer beside them that has no words."""
    _refuse_empty_tokenizers(folder)
    kinds = _model_classes(folder)
    return {name: _load(kind, folder, name, dtype) for name, kind in kinds.items() if name not in without}


def _refuse_empty_tokenizers(folder: Path) -> None:
    """BaseError for a tokenizer of a diffusers folder that has no words, to which every prompt would be the same."""
    for name, entry in _index(folder).items():
        is_tokenizer = isinstance(entry, list) and "Tokenizer" in str(entry[-1])
        if is_tokenizer and not has_vocabulary(folder / name):
            raise BaseError(
                f"{folder / name} has no words of a tokenizer (tokenizer.json, or vocab.json with merges.txt): "
                "download them from where the model comes from."
            )


def load_model(folder: Path, name: str, dtype: torch.dtype | None, **options: Any) -> torch.nn.Module:
    """One model of a diffusers folder, from safetensors. options: of `from_pretrained`. BaseError with one sentence,
    also where the files hold fewer weights than the model has."""
    kind = _model_classes(folder).get(name)
    if kind is None:
        raise BaseError(f"{folder} has no {name} in its model_index.json: take the whole diffusers folder.")
    return _load(kind, folder, name, dtype, **options)


def _load(kind, folder: Path, name: str, dtype: torch.dtype | None, **options: Any) -> torch.nn.Module:
    place = folder / name
    if dtype is not None:
        options |= {"torch_dtype": dtype} if issubclass(kind, diffusers.ModelMixin) else dtype_option(dtype)
    # A repository may be downloaded with its half-precision files alone.
    weights = visible_files(place, "*.safetensors") if place.is_dir() else []
    if weights and all(f".{HALF}" in file.name for file in weights):
        options["variant"] = HALF
    try:
        model, loading = from_safetensors(kind, folder, subfolder=name, **options)
    except CANT_LOAD as error:
        raise BaseError(_what_helps(place, error)) from error
    lacking = absent(loading)
    if lacking:
        more = f" and {len(lacking) - 1} more weights" if lacking[1:] else ""
        raise BaseError(
            f"{place} lacks {lacking[0]}{more}, which would be random: take config.json and all weights from one "
            "release of the model."
        )
    return model


def _index(folder: Path) -> dict[str, Any]:
    """What model_index.json says: {component: [library, class]} and more."""
    try:
        return json.loads(read_text(folder / "model_index.json"))
    except (OSError, ValueError) as error:
        raise BaseError(
            f"{folder / 'model_index.json'} can't be read ({first_line(error)}): download that file again."
        ) from error


def _model_classes(folder: Path) -> dict[str, Any]:
    """{component: its class} of the models that model_index.json names and the folder doesn't leave out."""
    libraries = {"diffusers": diffusers, "transformers": transformers}
    classes: dict[str, Any] = {}
    for name, entry in _index(folder).items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] in libraries:
            kind = getattr(libraries[entry[0]], str(entry[1]), None)
            if kind is None:
                raise BaseError(f"{folder}'s {name} is a {entry[1]}, which the installed {entry[0]} lacks: update it.")
            if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
                classes[name] = kind
    return classes


def _what_helps(place: Path, error: Exception) -> str:
    """Why a model can't be loaded and what to do, in one sentence."""
    if out_of_memory(error):
        return f"Memory ran out while {place} was loaded: close other programs, or set a half precision such as bf16."
    if isinstance(error, ImportError):
        return f"{place} can't be loaded without a package that isn't installed ({first_line(error)})."
    return _bad_file(place) or (
        f"{place} can't be loaded ({first_line(error)}): take config.json and all weights from one release of the "
        "model."
    )


def _bad_file(place: Path) -> str | None:
    """A file of a model's folder that is missing or holds something else, in one sentence."""
    if not place.is_dir():
        return f"{place.parent} has no folder {place.name}: take the whole diffusers folder."
    where = str(place)
    if sentence := foreign.broken_link(place, where):
        return sentence
    if not (place / "config.json").is_file():
        return f"{where} has no config.json: download that file from where the model comes from."
    weights = visible_files(place, "*.safetensors")
    if not weights and (waiting := foreign.unfinished(place)):
        return f"{where} isn't downloaded yet, {waiting} is still there: let the download finish first."
    if not weights and [*place.glob("*.bin"), *place.glob("*.pt"), *place.glob("*.ckpt")]:
        return (
            f"{where} has only pickled weights, which PrefGen never opens: take the model's safetensors files from "
            "where it comes from."
        )
    if not weights:
        return f"{where} has no weights: put its .safetensors files there."
    for file in [*sorted(place.glob("*.json")), *weights]:
        if sentence := _damage(file, where):
            return sentence
    return None


def _damage(file: Path, where: str) -> str | None:
    try:
        if sentence := foreign.damage(file, where):
            return sentence
        if file.suffix == ".json":
            json.loads(read_text(file))
        else:
            with safe_open(str(file), "pt"):
                pass
    except PermissionError:
        return f"{file} may not be read: give your user the right to read that file."
    except (OSError, ValueError, SafetensorError) as error:
        return f"{file} is damaged or cut off ({first_line(error)}): download that file again."
    return None


def first_line(error: Exception) -> str:
    """What an error says first, short enough to stand in a sentence."""
    text = str(error).strip()
    return text.splitlines()[0][:160].rstrip(" .:") if text else type(error).__name__
