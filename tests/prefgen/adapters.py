"""A PrefGen adapter of random weights, and files of it with some of it replaced."""

import json
from importlib import import_module

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SEMANTIC, CORE, IMAGE = 12, 16, 8
SEM_LAYERS, CORE_LAYER, LAYERS = [2, 3, 4, 5], 3, 6
TOKENS = 4


def random_adapter(
    block_widths,
    text_width,
    widths=(SEMANTIC, CORE, IMAGE),
    aligner_hidden=20,
    fitted=False,
    package=import_module,
    **header,
):
    """An adapter for these blocks, drawn from torch's global generator.

    widths: of ĕ_sem, e_core and e_img, 0 for a part that wasn't trained. fitted: normalisers of random statistics.
    package: gives PrefGen's modules by name, such as ComfyUI's copy of them. header: entries for the usual ones.
    """
    modules, aligner = package("prefgen.adapter"), package("prefgen.aligner")
    semantic, core, image = widths
    entries = {
        "format_version": modules.FORMAT_VERSION,
        "kind": "prefgen",
        "base_family": "sdxl",
        "semantic_width": semantic,
        "core_width": core,
        "image_width": image,
        "cross_attention_dim": text_width,
        "tokens": TOKENS,
        "block_widths": list(block_widths),
        "mllm": {
            "name": "tiny",
            "num_layers": LAYERS,
            "hidden_size": core or CORE,
            "sem_layers": SEM_LAYERS,
            "core_layer": CORE_LAYER,
        },
        "clip_vision": {"name": "tiny", "width": image},
    } | header
    if not semantic and not core:
        entries["mllm"] = None
    elif entries["mllm"] is not None:
        absent = ({} if semantic else {"sem_layers": []}) | ({} if core else {"core_layer": None})
        entries["mllm"] = entries["mllm"] | absent
    layers = len((entries["mllm"] or {"sem_layers": SEM_LAYERS})["sem_layers"])
    sem_norm = aligner.LayerStandardiser(layers, core or CORE) if semantic else None
    core_norm = aligner.LayerStandardiser(1, core) if core else None
    if fitted and sem_norm:
        sem_norm.fit(torch.randn(32, layers, core or CORE) * 3 + 1)
    if fitted and core_norm:
        core_norm.fit(torch.randn(32, 1, core) * 5 - 2)
    projection = modules.UserProjection(semantic + core + image, text_width, TOKENS)
    mlp = aligner.SemanticAligner(layers, core or CORE, semantic, aligner_hidden) if semantic else None
    adapter = modules.UserAdapter(modules.AdapterHeader(**entries), projection, mlp, sem_norm, core_norm, name="tiny")
    return adapter.eval().requires_grad_(False)


def header_of(path) -> dict:
    """The header entry of a PrefGen export."""
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["prefgen"])


def rewrite(path, tensors=None, header=None, metadata=None):
    """Write a PrefGen export again with some of it replaced; a tensor replaced by None is left out."""
    merged = {key: value for key, value in (load_file(path) | (tensors or {})).items() if value is not None}
    if metadata is None:
        metadata = {"prefgen": json.dumps(header_of(path) | (header or {}))}
    save_file(merged, path, metadata=metadata)
