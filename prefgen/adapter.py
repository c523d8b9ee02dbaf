"""The adapter file: everything between an encoded history and the UNet, in the layout of an IP-Adapter.

Keys: `image_proj.*` and `ip_adapter.{1,3,5...}.to_k_ip.weight` / `to_v_ip.weight` as IP-Adapter has them (stock
diffusers loads the file), `prefgen.*` for the aligner and normalisers, and one JSON header entry `prefgen`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .aligner import LayerStandardiser, SemanticAligner
from .encoded import EncodedPreference
from .files import write_atomic
from .fusion import UserProjection, core_part, semantic_part
from .header import FAMILY_NAMES, FORMAT_VERSION, AdapterError, AdapterHeader
from .ip_adapter import EMBEDDING, ImageAdapter, build_image_adapter, encoder_name, is_ip_adapter

AGAIN = "Download or export it again."


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
        digest: str = "",
    ):
        super().__init__()
        self.header, self.name, self.digest = header, name, digest
        self.projection, self.aligner, self.sem_norm, self.core_norm = projection, aligner, sem_norm, core_norm
        for side in ("to_k_ip", "to_v_ip"):
            setattr(
                self,
                side,
                nn.ModuleList(
                    nn.Linear(header.cross_attention_dim, width, bias=False) for width in header.block_widths
                ),
            )

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
    """Write the adapter file atomically, fp32."""
    tensors = {}
    for prefix, module in (
        ("image_proj.", adapter.projection),
        ("prefgen.aligner.", adapter.aligner),
        ("prefgen.sem_norm.", adapter.sem_norm),
        ("prefgen.core_norm.", adapter.core_norm),
    ):
        tensors |= {prefix + key: value for key, value in module.state_dict().items()}
    for i, (k, v) in enumerate(zip(adapter.to_k_ip, adapter.to_v_ip, strict=True)):
        tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = k.weight
        tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = v.weight
    data = save(
        {k: v.detach().contiguous() for k, v in tensors.items()},
        # One entry only: safetensors orders several at random, and equal adapters should be equal files.
        metadata={"prefgen": json.dumps(asdict(adapter.header))},
    )
    write_atomic(path, data)


def load_adapter(path: str | os.PathLike) -> UserAdapter | ImageAdapter:
    """Read and check an adapter file: a PrefGen export, or a public IP-Adapter file, known by its keys.

    Raises AdapterError with one sentence that names the file and what to do.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if "prefgen" in metadata:
        header, against = _header(path, metadata["prefgen"]), "its own header"
    elif is_ip_adapter(tensors):
        header, against = None, "each other"
    else:
        raise AdapterError(
            f"{path.name} is not a PrefGen adapter and not an IP-Adapter: choose a file from a PrefGen training export "
            "or an IP-Adapter for SD1.5 or SDXL."
        )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(f"{path.name} holds values that are not numbers (in {key}). {AGAIN}")
    try:
        return _build(path, tensors, header) if header else build_image_adapter(path.name, tensors)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path.name} is damaged: its weights don't match {against}. {AGAIN}") from error


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    if not path.is_file():
        raise AdapterError(
            f"The adapter {path.name} is not there any more: put it into models/prefgen or choose another."
        )
    if path.stat().st_size == 0:
        raise AdapterError(f"{path.name} is empty (0 bytes). {AGAIN}")
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        # Only now: a safetensors file starts with a length, which may happen to look like a pickle's first byte.
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK" or start in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"):
            raise AdapterError(
                f"{path.name} is a pickle under a .safetensors name, which PrefGen never opens: get a real "
                "safetensors file."
            ) from error
        raise AdapterError(f"{path.name} is damaged or not a whole safetensors file. {AGAIN}") from error


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
        if header.mllm:
            layers = [*header.mllm["sem_layers"], header.mllm["core_layer"]]
            if not all(layer in range(header.mllm.get("num_layers", max(layers) + 1)) for layer in layers):
                raise ValueError(f"layers {layers}")
    except AdapterError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path.name} has a mangled prefgen header. {AGAIN}") from error
    return header


def _build(path: Path, tensors: dict[str, torch.Tensor], header: AdapterHeader) -> UserAdapter:
    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}

    projection, aligner = part("image_proj."), part("prefgen.aligner.")
    hidden = projection["proj.0.weight"].shape[0]
    sem, core = part("prefgen.sem_norm."), part("prefgen.core_norm.")
    adapter = UserAdapter(
        header,
        UserProjection(header.user_width, header.cross_attention_dim, header.tokens, hidden),
        SemanticAligner(*sem["mean"].shape, header.semantic_width, aligner["mlp.0.weight"].shape[0]),
        LayerStandardiser(*sem["mean"].shape),
        LayerStandardiser(*core["mean"].shape),
        name=path.name,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    branch = {key for key in tensors if key.startswith("ip_adapter.")}
    sem_layers = header.mllm["sem_layers"] if header.mllm else sem["mean"]
    if (
        core["mean"].shape != (1, header.core_width)
        or len(branch) != 2 * len(header.block_widths)
        or len(sem_layers) != len(sem["mean"])
    ):
        raise AdapterError(
            f"{path.name} is damaged: its weights don't match its own header. Download or export it again."
        )
    adapter.projection.load_state_dict(projection)
    adapter.aligner.load_state_dict(aligner)
    adapter.sem_norm.load_state_dict(sem)
    adapter.core_norm.load_state_dict(core)
    for i, (k, v) in enumerate(zip(adapter.to_k_ip, adapter.to_v_ip, strict=True)):
        k.load_state_dict({"weight": tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"].float()})
        v.load_state_dict({"weight": tensors[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"].float()})
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
    width = encoded.clip_vision.get("width")
    if width is not None and width != header.image_width:
        raise AdapterError(
            f"This adapter needs CLIP vision embeddings of width {header.image_width} "
            f"({header.clip_vision.get('name', 'unknown')}); the connected CLIP vision model gives {width}. Connect "
            "the right one, or none."
        )


def _check_pictures(header: AdapterHeader, encoded: EncodedPreference) -> None:
    """The same for an IP-Adapter file, which needs one CLIP vision model and nothing else."""
    name, reads = header.clip_vision["name"], header.clip_vision["output"]
    if encoded.image_embed_liked is None:
        raise AdapterError(
            f"An IP-Adapter sees the history through CLIP vision alone: connect {name} to clip_vision in Encode "
            "Preference History."
        )
    width = encoded.clip_vision.get("width" if reads == EMBEDDING else "states_width")
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


def _described(mllm: dict) -> str:
    revision = str(mllm.get("revision", ""))[:8]
    lora = f", LoRA {mllm['lora'][:8]}" if mllm.get("lora") else ""
    layers = f"{mllm.get('num_layers', '?')} layers of {mllm.get('hidden_size', '?')}"
    return f"{mllm.get('name', '?')} ({layers}, {revision}{lora})"
