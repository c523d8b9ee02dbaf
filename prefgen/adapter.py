"""The adapter file: everything between an encoded history and the UNet, in the layout of an IP-Adapter.

Keys: `image_proj.*` and `ip_adapter.{1,3,5...}.to_k_ip.weight` / `to_v_ip.weight` as IP-Adapter has them (stock
diffusers loads the file), `prefgen.*` for the aligner and normalisers, and one JSON header entry `prefgen`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from .adapter_file import AGAIN, AdapterFile, assign, check_to_write, read_header, read_weights, weight_of
from .aligner import LayerStandardiser, SemanticAligner
from .encoded import EncodedPreference
from .files import write_atomic
from .fusion import UserProjection, core_part, semantic_part
from .header import FAMILY_NAMES, FORMAT_VERSION, AdapterError, AdapterHeader
from .image_encoder import CLIP, spoken_of
from .ip_adapter import STATES, ImageAdapter, build_image_adapter, encoder_name, is_ip_adapter, other_width_of


class UserAdapter(nn.Module):
    """The trained parts of one adapter file. `to_k_ip`, `to_v_ip`: bias-free projections of every block, file order."""

    def __init__(
        self,
        header: AdapterHeader,
        projection: UserProjection,
        aligner: SemanticAligner,
        sem_norm: LayerStandardiser,
        core_norm: LayerStandardiser,
        name: str = "",
        file: AdapterFile | None = None,
    ):
        super().__init__()
        self.header, self.name, self.file = header, name, file
        self.projection, self.aligner, self.sem_norm, self.core_norm = projection, aligner, sem_norm, core_norm
        for side in ("to_k_ip", "to_v_ip"):
            setattr(
                self,
                side,
                nn.ModuleList(
                    nn.Linear(header.cross_attention_dim, width, bias=False) for width in header.block_widths
                ),
            )

    def parts(self) -> dict[str, nn.Module]:
        """Every module by the prefix of its keys in the file."""
        parts = {
            "image_proj.": self.projection,
            "prefgen.aligner.": self.aligner,
            "prefgen.sem_norm.": self.sem_norm,
            "prefgen.core_norm.": self.core_norm,
        }
        for i, (k, v) in enumerate(zip(self.to_k_ip, self.to_v_ip, strict=True)):
            parts |= {f"ip_adapter.{2 * i + 1}.to_k_ip.": k, f"ip_adapter.{2 * i + 1}.to_v_ip.": v}
        return parts

    @property
    def digest(self) -> str:
        """sha256 of the file that it was read from, read when asked for; empty without one. Raises AdapterError if the
        file has changed since."""
        return self.file.digest if self.file else ""

    def semantic(self, hidden: torch.Tensor) -> torch.Tensor:
        """ĕ_sem [B, C] from H [B, layers, D]."""
        return semantic_part(self.aligner, self.sem_norm(hidden[:, self.header.mllm["sem_layers"]]))

    def core(self, hidden: torch.Tensor) -> torch.Tensor:
        """e_core [B, D] from H [B, layers, D]."""
        return core_part(self.core_norm(hidden[:, [self.header.mllm["core_layer"]]]))

    def user_tokens(self, vector: torch.Tensor) -> torch.Tensor:
        """[B, C + D + I] -> [B, N, X]."""
        return self.projection(vector)

    def keys_values(self, vector: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(K [B, N, width], V [B, N, width]) of every block in file order, for user vectors [B, C + D + I]."""
        tokens = self.user_tokens(vector)
        return [(k(tokens), v(tokens)) for k, v in zip(self.to_k_ip, self.to_v_ip, strict=True)]


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


@torch.inference_mode(False)
def load_adapter(path: str | os.PathLike) -> UserAdapter | ImageAdapter:
    """Read and check an adapter file: a PrefGen export, or a public IP-Adapter file, known by its keys.

    Raises AdapterError with one sentence that names the file and what to do.
    """
    path = Path(path)
    file = AdapterFile.of(path) if path.is_file() else None  # as it was before it is read
    dtypes, metadata = read_header(path)
    header = _header(path, metadata["prefgen"]) if "prefgen" in metadata else None
    weights, names = read_weights(path, dtypes)
    if header is None and not is_ip_adapter(names):
        raise AdapterError(
            f"{path.name} is not a PrefGen adapter and not an IP-Adapter: choose a file from a PrefGen training export "
            "or an IP-Adapter for SD1.5 or SDXL."
        )
    try:
        if header is None:
            return build_image_adapter(path.name, weights, file)
        return _build(path.name, weights, header, file)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        against = "each other" if header is None else "its own header"
        raise AdapterError(f"{path.name} is damaged: its weights don't match {against}. {AGAIN}") from error


_last: dict[AdapterFile, UserAdapter | ImageAdapter] = {}


def load_adapter_once(path: str | os.PathLike) -> UserAdapter | ImageAdapter:
    """`load_adapter`, but the file that was read last is not read again until it is replaced. Don't change what is
    returned: the next caller gets the same."""
    if not os.path.isfile(path):
        return load_adapter(path)
    file = AdapterFile.of(path)
    if file not in _last:
        _last.clear()  # before the next one is read: two of SDXL's are 2.7 GB
        _last[file] = load_adapter(path)
    return _last[file]


def _header(path: Path, entry: str) -> AdapterHeader:
    """The header entry of a PrefGen export, checked on its own."""
    try:
        raw = json.loads(entry)
        version = int(raw["format_version"])
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"{path.name} is of format {version}, newer than this PrefGen reads ({FORMAT_VERSION}): update PrefGen."
            )
        known = {f.name for f in fields(AdapterHeader)}
        header = AdapterHeader(**{k: v for k, v in raw.items() if k in known})
        if header.kind != "prefgen" or not isinstance(header.base_family, str):
            raise ValueError(f"{header.kind} for {header.base_family}")
        if not all(isinstance(part, dict) for part in (header.mllm or {}, header.clip_vision, header.training)):
            raise TypeError("a part of the header is no object")
        if header.mllm:
            layers = [*header.mllm["sem_layers"], header.mllm["core_layer"]]
            if not all(layer in range(header.mllm.get("num_layers", max(layers) + 1)) for layer in layers):
                raise ValueError(f"layers {layers}")
    except AdapterError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path.name} has a mangled prefgen header. {AGAIN}") from error
    return header


def _build(name: str, weights: dict[str, torch.Tensor], header: AdapterHeader, file: AdapterFile | None) -> UserAdapter:
    def size(key: str) -> torch.Size:
        return weight_of(name, weights, key, 2).shape

    sem_layers, width = size("prefgen.sem_norm.mean")
    if header.mllm and len(header.mllm["sem_layers"]) != sem_layers:
        raise AdapterError(f"{name} is damaged: prefgen.sem_norm.mean doesn't match its own header. {AGAIN}")
    hidden, aligner_hidden = size("image_proj.proj.0.weight")[0], size("prefgen.aligner.mlp.0.weight")[0]
    with torch.device("meta"):  # nothing is drawn at random that the file replaces
        adapter = UserAdapter(
            header,
            UserProjection(header.user_width, header.cross_attention_dim, header.tokens, hidden),
            SemanticAligner(sem_layers, width, header.semantic_width, aligner_hidden),
            LayerStandardiser(sem_layers, width),
            LayerStandardiser(1, header.core_width),
            name=name,
            file=file,
        )
    for prefix, module in adapter.parts().items():
        assign(name, module, prefix, weights)
    extra = next((key for key in weights if not key.startswith(tuple(adapter.parts()))), None)
    if extra is not None:
        raise AdapterError(f"{name} is damaged: its own header speaks of no {extra}. {AGAIN}")
    return adapter.eval().requires_grad_(False)


def check_compatible(header: AdapterHeader, block_widths: Sequence[int], cross_dim: int, family_hint: str = "") -> None:
    """Raise AdapterError when the adapter doesn't fit a UNet with these cross-attention widths (file order) and text
    width. family_hint: what people call the connected model."""
    if list(block_widths) == list(header.block_widths) and cross_dim == header.cross_attention_dim:
        return
    made_for = FAMILY_NAMES.get(header.base_family, header.base_family)
    connected = FAMILY_NAMES.get(family_hint, family_hint) or f"a UNet with text width {cross_dim}"
    if made_for == connected:
        connected = (
            f"another variant of it ({len(block_widths)} cross-attentions instead of {len(header.block_widths)})"
        )
    raise AdapterError(
        f"This adapter is for {made_for}; the model you connected is {connected}. Choose an adapter for that model."
    )


def check_encoded(header: AdapterHeader, encoded: EncodedPreference) -> None:
    """Raise AdapterError when a history was read by other models than the adapter was trained with."""
    if header.kind == "ip_adapter":
        return _check_pictures(header, encoded)
    made, used = header.mllm, encoded.mllm
    if encoded.hidden is None and not header.image_width:
        raise AdapterError(
            "This adapter sees the history through its MLLM alone: connect Load Preference MLLM to Encode Preference "
            "History."
        )
    if made and encoded.hidden is not None:
        for key in ("num_layers", "hidden_size", "revision", "lora", "prompt_version"):
            if key in made and made[key] != used.get(key):
                raise AdapterError(
                    f"This adapter was trained with the MLLM {_described(made)}; the history was read by "
                    f"{_described(used)}. Choose that MLLM in Load Preference MLLM, or an adapter for this one."
                )
        _check_reading(made, used)
    if encoded.clip_vision:
        _check_encoder(header, encoded.clip_vision)


def _check_encoder(header: AdapterHeader, used: dict) -> None:
    """Raise AdapterError when the pictures of a PrefGen adapter were read by another encoder than in its training."""
    made, width = header.clip_vision, used.get("width")
    name = made.get("name", "unknown")
    if used.get("architecture", CLIP) != CLIP:
        raise AdapterError(
            f"This adapter needs CLIP vision embeddings of width {header.image_width} ({name}); the connected model is "
            f"{spoken_of(used)}, which sees pictures in other terms. Connect the right one, or none."
        )
    if width is not None and width != header.image_width:
        raise AdapterError(
            f"This adapter needs CLIP vision embeddings of width {header.image_width} ({name}); the connected CLIP "
            f"vision model gives {width}. Connect the right one, or none."
        )
    differences = {"hidden_size": "is another one of equal width", "digest": "has the same shape and other weights"}
    for key, what in differences.items():
        if made.get(key) and used.get(key) and made[key] != used[key]:
            raise AdapterError(
                f"This adapter was trained with the CLIP vision model {name}; the connected one {what}. Connect {name} "
                "in Encode Preference History, or none."
            )


def _check_reading(made: dict, used: dict) -> None:
    """The same MLLM reads another way with another chat template, tokenizer or image processor. Adapters of before
    this was written down don't know."""
    if made.get("reading") and used.get("reading") and made["reading"] != used["reading"]:
        raise AdapterError(
            f"The folder of the MLLM {used.get('name', '?')} has another chat template, tokenizer or image processor "
            "than the one that this adapter was trained with: put those files back as the MLLM was released, or choose "
            "an adapter for this one."
        )


def _check_pictures(header: AdapterHeader, encoded: EncodedPreference) -> None:
    """The same for an IP-Adapter file, which needs one CLIP vision model and nothing else."""
    name, reads, used = header.clip_vision["name"], header.clip_vision["output"], encoded.clip_vision
    if used.get("architecture", CLIP) != CLIP:
        raise AdapterError(
            f"This IP-Adapter reads {name} (width {header.image_width}); the connected model is {spoken_of(used)}, "
            f"which sees pictures in other terms: connect {name} in Encode Preference History."
        )
    if encoded.image_embed_liked is None:
        raise AdapterError(
            f"An IP-Adapter sees the history through CLIP vision alone: connect {name} to clip_vision in Encode "
            "Preference History."
        )
    width, other_width = used.get("width"), used.get("states_width")
    if reads == STATES:
        width, other_width = other_width, width
    if width is None:
        raise AdapterError(
            f"This IP-Adapter reads the hidden states of {name}; the connected CLIP vision model gives none: connect "
            f"{name} in Encode Preference History, or choose a base IP-Adapter."
        )
    if width != header.image_width:
        raise AdapterError(
            f"This IP-Adapter reads {name} (width {header.image_width}); the connected CLIP vision model is "
            f"{encoder_name(reads, width)} (width {width}): connect {name} in Encode Preference History."
        )
    right = other_width_of(reads, width)
    if right is not None and other_width is not None and other_width != right:
        raise AdapterError(
            f"This IP-Adapter reads {name} (widths {width} and {right}); the connected CLIP vision model has {width} "
            f"and {other_width}, so it is another one: connect {name} in Encode Preference History."
        )


def _described(mllm: dict) -> str:
    revision = str(mllm.get("revision", ""))[:8]
    lora = f", LoRA {str(mllm['lora'])[:8]}" if mllm.get("lora") else ""
    layers = f"{mllm.get('num_layers', '?')} layers of {mllm.get('hidden_size', '?')}"
    return f"{mllm.get('name', '?')} ({layers}, {revision}{lora})"
