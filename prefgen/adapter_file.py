"""Reading and writing adapter files, in the layout of an IP-Adapter.

Keys: `image_proj.*` and `ip_adapter.{1,3,5...}.to_k_ip.weight` / `to_v_ip.weight` as IP-Adapter has them (stock
diffusers loads the file), `prefgen.*` for the aligner and normalisers, and one JSON header entry `prefgen`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save

from .adapter import FLUX, FORMAT_VERSION, AdapterFile, AdapterHeader, UserAdapter, new_projection
from .adapter_weights import AGAIN, assign, check_dtypes, check_to_write, read_header, read_weights, weight_of
from .aligner import LayerStandardiser, SemanticAligner
from .errors import AdapterError
from .files import safetensors_header, write_atomic
from .flux_adapter import build_flux_adapter, is_flux, is_sd3
from .ip_adapter import ImageAdapter, build_image_adapter, is_ip_adapter

# One of the two weights of FLUX.1 Redux.
REDUX = "redux_up.weight"


# ComfyUI runs nodes in inference mode, and what is made there is of no use to a gradient ever after.
@torch.inference_mode(False)
def load_adapter(path: str | os.PathLike) -> UserAdapter | ImageAdapter:
    """Read and check an adapter file: a PrefGen export, or a public IP-Adapter file, recognised by its keys.

    Raises AdapterError with one sentence that names the file and what to do.
    """
    path = Path(path)
    # Its state first: if it is written over while it is read, its digest is refused later.
    file = AdapterFile.of(path) if path.is_file() else None
    dtypes, metadata = read_header(path)
    header = _parse_header(path, metadata["prefgen"]) if "prefgen" in metadata else None
    weights, names = read_weights(path, dtypes)
    try:
        if header is None:
            return _build_image_adapter(path.name, weights, names, file)
        return _build_user_adapter(path.name, weights, header, file)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        against = "each other" if header is None else "its own header"
        raise AdapterError(f"{path.name} is damaged: its weights don't match {against}. {AGAIN}") from error


def adapter_header(path: str | os.PathLike) -> AdapterHeader:
    """What an adapter is for, by its file's header alone: no weight is read. Raises AdapterError with one sentence for
    a file that isn't an adapter, or that `load_adapter` would refuse for its names, dtypes or shapes."""
    path = Path(path)
    dtypes, metadata = read_header(path)
    if "prefgen" in metadata:
        return _parse_header(path, metadata["prefgen"])
    check_dtypes(path.name, dtypes)
    try:
        entries = safetensors_header(path)[0] if dtypes else {}
        shapes = {name: torch.empty(entry["shape"], device="meta") for name, entry in entries.items()}
        return _build_image_adapter(path.name, shapes, list(shapes), None).header
    except (OSError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path.name} is damaged: its weights don't match each other. {AGAIN}") from error


_last: dict[AdapterFile, UserAdapter | ImageAdapter] = {}


def load_adapter_once(path: str | os.PathLike) -> UserAdapter | ImageAdapter:
    """`load_adapter`, but the file that was read last is not read again until it is replaced. Don't change what is
    returned: the next caller gets the same."""
    if not os.path.isfile(path):
        return load_adapter(path)
    file = AdapterFile.of(path)
    if file not in _last:
        # Before the next one is read: two of SDXL's are 2.7 GB.
        _last.clear()
        _last[file] = load_adapter(path)
    return _last[file]


def save_adapter(adapter: UserAdapter, path: str | os.PathLike) -> None:
    """Write the adapter file atomically, fp32. Raises AdapterError for weights that `load_adapter` would refuse, before
    anything is written."""
    tensors = {
        prefix + key: value.detach().contiguous()
        for prefix, module in adapter.parts().items()
        for key, value in module.state_dict().items()
    }
    check_to_write(Path(path).name, tensors)
    # One entry only: safetensors orders several at random, and equal adapters should be equal files.
    write_atomic(path, save(tensors, metadata={"prefgen": json.dumps(asdict(adapter.header))}))


def _build_image_adapter(
    name: str, weights: dict[str, torch.Tensor], names: list[str], file: AdapterFile | None
) -> ImageAdapter:
    """The image-only adapter of a file, refused for one that is no adapter of any kind. names: of all its tensors."""
    if REDUX in names:
        raise AdapterError(
            f"{name} is FLUX.1 Redux, which makes text of a picture and has no branch: put it into models/style_models "
            "and use ComfyUI's own Load Style Model, CLIP Vision Encode and Apply Style Model."
        )
    if is_sd3(names):
        raise AdapterError(
            f"{name} is an IP-Adapter for SD3.5, whose tokens change at every step and whose norms no hook of ComfyUI "
            "reaches: put the taste into words with Describe Preference, or paint with SDXL or Flux.1."
        )
    if is_flux(names):
        return build_flux_adapter(name, weights, file)
    if not is_ip_adapter(names):
        raise AdapterError(
            f"{name} is not a PrefGen adapter and not an IP-Adapter: choose a file from a PrefGen training export or "
            "an IP-Adapter for SD1.5, SDXL or Flux.1."
        )
    return build_image_adapter(name, weights, file)


def _parse_header(path: Path, entry: str) -> AdapterHeader:
    """The header entry of a PrefGen export, checked on its own. Raises AdapterError."""
    try:
        raw = json.loads(entry)
        version = int(raw["format_version"])
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"{path.name} is of format {version}, newer than this PrefGen reads ({FORMAT_VERSION}): update PrefGen."
            )
        # Entries that a later version adds without changing the format are passed over.
        names = {field.name for field in fields(AdapterHeader)}
        header = AdapterHeader(**{key: value for key, value in raw.items() if key in names})
        _check_header(header)
    except AdapterError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path.name} has a mangled prefgen header. {AGAIN}") from error
    return header


def _check_header(header: AdapterHeader) -> None:
    """Raises ValueError, TypeError or KeyError for entries that no export writes."""
    if header.kind != "prefgen" or not isinstance(header.base_family, str):
        raise ValueError(f"{header.kind} for {header.base_family}")
    if not all(isinstance(part, dict) for part in (header.mllm or {}, header.clip_vision, header.training)):
        raise TypeError("a part of the header isn't an object")
    if header.mllm:
        core = header.mllm["core_layer"]
        layers = [*header.mllm["sem_layers"], *([] if core is None else [core])]
        if bool(header.mllm["sem_layers"]) < bool(header.semantic_width) or (core is None and header.core_width):
            raise ValueError(f"layers {layers} for parts that read others")
        if not all(layer in range(header.mllm.get("num_layers", max(layers, default=0) + 1)) for layer in layers):
            raise ValueError(f"layers {layers}")


def _build_user_adapter(
    name: str, weights: dict[str, torch.Tensor], header: AdapterHeader, file: AdapterFile | None
) -> UserAdapter:
    """The adapter of a PrefGen export. Raises AdapterError for a weight that is missing, too many or of another shape,
    RuntimeError, TypeError or ValueError for a header that speaks of impossible ones."""

    def size(key: str) -> torch.Size:
        return weight_of(name, weights, key, 2).shape

    aligner = sem_norm = core_norm = None
    projection_hidden = None if header.base_family == FLUX else size("image_proj.proj.0.weight")[0]
    # On the meta device nothing is drawn at random that the file replaces.
    with torch.device("meta"):
        if header.semantic_width:
            sem_layers, width = size("prefgen.sem_norm.mean")
            if header.mllm and len(header.mllm["sem_layers"]) != sem_layers:
                raise AdapterError(f"{name} is damaged: prefgen.sem_norm.mean doesn't match its own header. {AGAIN}")
            aligner_hidden = size("prefgen.aligner.mlp.0.weight")[0]
            aligner = SemanticAligner(sem_layers, width, header.semantic_width, aligner_hidden)
            sem_norm = LayerStandardiser(sem_layers, width)
        if header.core_width:
            core_norm = LayerStandardiser(1, header.core_width)
        adapter = UserAdapter(
            header,
            new_projection(header, projection_hidden),
            aligner,
            sem_norm,
            core_norm,
            name=name,
            file=file,
        )
    parts = adapter.parts()
    for prefix, module in parts.items():
        assign(name, module, prefix, weights)
    extra = next((key for key in weights if not key.startswith(tuple(parts))), None)
    if extra is not None:
        raise AdapterError(f"{name} is damaged: its own header has no place for {extra}. {AGAIN}")
    return adapter.eval().requires_grad_(False)
