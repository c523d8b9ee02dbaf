"""Where artists keep things: adapters, MLLMs and histories, as combo entries and back.

Combo values arrive from anywhere, so a name is only ever looked up in the list that was offered and never joined to a
path.
"""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..atelier import users
from ..atelier.models import MLLM_FOLDER, WEIGHTS
from ..history_folder import HistoryFolder
from ..pictures import is_hidden

EMBEDDED = "atelier"
EXAMPLE = "example: "
NO_LORA = "none"
HISTORY_FOLDER = "prefgen"  # below ComfyUI's input folder

_MODELS = Path(folder_paths.models_dir)
folder_paths.add_model_folder_path("prefgen", str(_MODELS / "prefgen"))
folder_paths.add_model_folder_path("LLM", str(_MODELS / "LLM"))
folder_paths.add_model_folder_path("ipadapter", str(_MODELS / "ipadapter"))


class ChoiceError(ValueError):
    """A combo value that names nothing, in one sentence."""


def adapters() -> dict[str, Path]:
    """Combo entry -> adapter file: the embedded one, every .safetensors below the prefgen model folders, then those
    below the ipadapter folders as `ipadapter/<name>`."""
    found = {EMBEDDED: WEIGHTS / "adapter.safetensors"}
    for kind, prefix in (("prefgen", ""), ("ipadapter", "ipadapter/")):
        for root in map(Path, folder_paths.get_folder_paths(kind)):
            for path in sorted(root.rglob("*.safetensors")) if root.is_dir() else ():
                name = prefix + path.relative_to(root).as_posix()
                # MLLMs and their LoRAs below models/prefgen are folders of their own, not shelves of adapters.
                if not name.startswith(("mllm/", "mllm_lora/")):
                    found.setdefault(name, path)
    return found


def mllms() -> dict[str, Path]:
    """Combo entry -> folder of a transformers model: the embedded one, models/prefgen/mllm/*, models/LLM/*."""
    found = {EMBEDDED: MLLM_FOLDER}
    roots = [Path(root) / "mllm" for root in folder_paths.get_folder_paths("prefgen")]
    roots += [Path(root) for root in folder_paths.get_folder_paths("LLM")]
    for root in roots:
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if (path / "config.json").is_file():
                found.setdefault(path.name, path)
    return found


def mllm_loras() -> dict[str, Path | None]:
    """Combo entry -> folder that peft has saved: none, then models/prefgen/mllm_lora/*."""
    found: dict[str, Path | None] = {NO_LORA: None}
    for root in (Path(root) / "mllm_lora" for root in folder_paths.get_folder_paths("prefgen")):
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if (path / "adapter_config.json").is_file():
                found.setdefault(path.name, path)
    return found


def histories() -> dict[str, Path | int]:
    """Combo entry -> history folder with a liked picture, or the number of a bundled example user."""
    found: dict[str, Path | int] = {EXAMPLE + name: number for name, number in users.EXAMPLE_USERS.items()}
    for path in _history_folders():
        try:
            HistoryFolder(path).check()
        except (ValueError, OSError):  # empty, or not to be opened: choosing it by name says so
            continue
        found[path.name] = path
    return found


def _history_folders() -> list[Path]:
    root = Path(folder_paths.get_input_directory()) / HISTORY_FOLDER
    return sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path)) if root.is_dir() else []


def resolve(choices: dict, name: str, what: str, where: str):
    """What a combo entry stands for. Raises ChoiceError with one sentence for a name that was not offered."""
    if name not in choices:
        raise ChoiceError(f"There is no {what} named {name!r}: choose one from the list, or put it into {where}.")
    return choices[name]


def adapter_path(name: str) -> Path:
    return resolve(adapters(), name, "adapter", "models/prefgen or models/ipadapter")


def mllm_path(name: str) -> Path:
    return resolve(mllms(), name, "preference MLLM", "models/prefgen/mllm or models/LLM")


def mllm_lora_path(name: str) -> Path | None:
    return resolve(mllm_loras(), name, "MLLM LoRA", "models/prefgen/mllm_lora")


def history_of(name: str) -> Path | int:
    """ValueError says what a folder of this name lacks, ChoiceError that there is none."""
    for path in _history_folders():
        if path.name == name:
            HistoryFolder(path).check()
    return resolve(histories(), name, "history", f"input/{HISTORY_FOLDER}")


def history_fingerprint(name: str) -> str:
    """Changes whenever a picture of the history, a prompt or their order does."""
    history = history_of(name)
    return name if isinstance(history, int) else HistoryFolder(history).fingerprint()
