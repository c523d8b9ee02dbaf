"""Where artists keep things: adapters, MLLMs and histories, as combo entries and back.

Combo values arrive from anywhere, so a name is only ever looked up in the list that was offered and never joined to a
path.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..atelier import users
from ..atelier.models import MLLM_FOLDER, WEIGHTS
from ..errors import AdapterError
from ..files import file_state, is_hidden, reason_of, visible_files, write_atomic
from ..fusion import FusedUser
from ..history_folder import HistoryFolder
from ..tastes.names import checked_name, file_name
from ..tastes.taste import Taste
from ..user_file import user_bytes

EMBEDDED = "atelier"
EXAMPLE = "example: "
NO_LORA = "none"
REVISION = re.compile("[0-9a-f]{8}")  # behind a taste's name and an @
HISTORY_FOLDER = "prefgen"  # below ComfyUI's input folder
SUFFIXES = (".safetensors", ".sft")
USERS = "users"  # below models/prefgen
NOT_ADAPTERS = ("mllm", "mllm_lora", USERS)  # folders of models/prefgen for other things

_MODELS = Path(folder_paths.models_dir)
folder_paths.add_model_folder_path("prefgen", str(_MODELS / "prefgen"))
folder_paths.add_model_folder_path("LLM", str(_MODELS / "LLM"))
folder_paths.add_model_folder_path("ipadapter", str(_MODELS / "ipadapter"))


class ChoiceError(ValueError):
    """A combo value that names nothing, in one sentence."""


def make_folders() -> None:
    """Make the folders that artists are told of, so that they find them; where that isn't allowed, they are missing."""
    wanted = [Path(folder_paths.get_input_directory()) / HISTORY_FOLDER]
    wanted += [Path(folder_paths.get_folder_paths(kind)[0]) for kind in ("prefgen", "ipadapter")]
    for folder in wanted:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)


def adapters() -> dict[str, Path]:
    """Combo entry -> adapter file: the embedded one, every .safetensors and .sft file below the prefgen model folders,
    then those below the ipadapter folders as `ipadapter/<name>`. A name in two folders is the first one's, as in core.
    """
    choices = {EMBEDDED: WEIGHTS / "adapter.safetensors"}
    for kind, prefix, reserved in (("prefgen", "", NOT_ADAPTERS), ("ipadapter", "ipadapter/", ())):
        for name, path in _weight_files(_roots(kind), reserved).items():
            choices.setdefault(prefix + name, path)
    return choices


def clip_visions() -> dict[str, Path | None]:
    """Combo entry -> CLIP vision file: the embedded one (None), then those that Load CLIP Vision offers and that are
    safetensors."""
    choices: dict[str, Path | None] = {EMBEDDED: None}
    for name in folder_paths.get_filename_list("clip_vision"):
        path = folder_paths.get_full_path("clip_vision", name)
        if path is not None and os.path.splitext(name)[1].lower() in SUFFIXES:
            choices.setdefault(name.replace("\\", "/"), Path(path))
    return choices


def clip_vision_path(name: str) -> Path | None:
    return resolve(clip_visions(), name, "CLIP vision model", "models/clip_vision")


def users_saved() -> dict[str, Path]:
    """Combo entry -> user file: every .safetensors file below the folders prefgen/users."""
    return _weight_files([os.path.join(root, USERS) for root in _roots("prefgen")])


def user_path(name: str) -> Path:
    return resolve(users_saved(), name, "user", "models/prefgen/users")


def save_user_as(user: FusedUser, name: str, taste: str) -> Path:
    """Write a user file into the first folder prefgen/users, under a name that no other user has. Returns it. Raises
    AdapterError where that folder can't be written."""
    name = checked_name(name)
    folder = Path(_roots("prefgen")[0]) / USERS
    data = user_bytes(user, name, taste)
    for path in visible_files(folder, "*.safetensors"):
        with suppress(OSError):  # gone meanwhile, or not to be read: then it is no user that could be saved again
            if path.stat().st_size == len(data) and path.read_bytes() == data:
                return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / file_name(f"{name}.safetensors", ".safetensors", os.listdir(folder))
        write_atomic(target, data)
    except OSError as error:
        reason = reason_of(error)
        raise AdapterError(
            f"The user {name} was not saved into models/prefgen/users: {reason}. Make room there or let ComfyUI write."
        ) from error
    return target


def mllms() -> dict[str, Path]:
    """Combo entry -> folder of a transformers model: the embedded one, those below prefgen/mllm and LLM."""
    roots = [os.path.join(root, "mllm") for root in _roots("prefgen")] + _roots("LLM")
    embedded = {EMBEDDED: MLLM_FOLDER}
    return embedded | _folders_with("config.json", roots) | embedded


def mllm_loras() -> dict[str, Path | None]:
    """Combo entry -> folder that peft has saved: none, then those below models/prefgen/mllm_lora."""
    roots = [os.path.join(root, "mllm_lora") for root in _roots("prefgen")]
    none: dict[str, Path | None] = {NO_LORA: None}
    return none | _folders_with("adapter_config.json", roots) | none


def _roots(kind: str) -> list[str]:
    """Model folders of a kind in core's order, as text: other packs add paths of their own."""
    return [os.fspath(root) for root in folder_paths.get_folder_paths(kind)]


def _weight_files(roots: list[str], reserved: Collection[str] = ()) -> dict[str, Path]:
    """Combo entry -> every file below the roots with one of SUFFIXES; reserved: as of `_walk`."""
    choices: dict[str, Path] = {}
    for root in roots:
        for folder, _, files in _walk(root, reserved):
            for file in files:
                path = os.path.join(folder, file)
                # A link whose file is gone counts as a file for os.walk.
                if os.path.splitext(file)[1].lower() in SUFFIXES and os.path.isfile(path):
                    choices.setdefault(_name(path, root), Path(path))
    return choices


def _folders_with(file: str, roots: list[str]) -> dict[str, Path]:
    """Combo entry -> every folder below the roots that holds `file`; what lies inside such a folder is its own."""
    choices: dict[str, Path] = {}
    for root in roots:
        for folder, inner, _ in _walk(root):
            if folder != root and os.path.isfile(os.path.join(folder, file)):
                inner.clear()
                choices.setdefault(_name(folder, root), Path(folder))
    return choices


def _walk(root: str, reserved: Collection[str] = ()) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk in order of name, through links and junctions as core's `folder_paths.recursive_search` goes.

    Two things are otherwise than there. A link back to a folder that was come through, or to one above it, is passed
    over: core goes round until the system stops it, and two such links never end. Hidden names are passed over: the
    `._x.safetensors` of macOS, bins, `.cache`. Folders that can't be read are empty. reserved: folders of the root to
    leave out.
    """
    come_through: dict[str, tuple[str, ...]] = {root: (os.path.realpath(root),)}
    for folder, inner, files in os.walk(root, followlinks=True):
        trail = come_through.pop(folder)
        onward = []
        for name in sorted(inner):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            leads_back = any(passed == real or passed.startswith(os.path.join(real, "")) for passed in trail)
            if not is_hidden(Path(path)) and not leads_back and not (folder == root and name.lower() in reserved):
                come_through[path] = (*trail, real)
                onward.append(name)
        inner[:] = onward
        yield folder, inner, sorted(name for name in files if not is_hidden(Path(folder, name)))


def _name(path: str, root: str) -> str:
    """Combo entry of something below a root, with slashes on Windows too: graphs travel."""
    return Path(os.path.relpath(path, root)).as_posix()


def histories() -> dict[str, Path | int]:
    """Combo entry -> history folder with a liked picture, or the number of a bundled example user."""
    choices: dict[str, Path | int] = {EXAMPLE + name: number for name, number in users.EXAMPLE_USERS.items()}
    for path in _history_folders():
        try:
            HistoryFolder(path).check()
        except (ValueError, OSError):  # empty, or not to be opened: choosing it by name says so
            continue
        choices[path.name] = path
    return choices


def _history_folders() -> list[Path]:
    root = Path(folder_paths.get_input_directory()) / HISTORY_FOLDER
    return sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path)) if root.is_dir() else []


def resolve(choices: dict, name: str, what: str, where: str):
    """What a combo entry stands for. Raises ChoiceError with one sentence for a name that was not offered; one with the
    backslashes of Windows, as core writes names there, is taken for the same with slashes."""
    if isinstance(name, str) and name not in choices:
        name = name.replace("\\", "/")
    if not isinstance(name, str) or name not in choices:
        raise ChoiceError(f"There is no {what} named {name!r}: choose one from the list, or put it into {where}.")
    return choices[name]


def adapter_path(name: str) -> Path:
    return resolve(adapters(), name, "adapter", "models/prefgen or models/ipadapter")


def file_fingerprint(name: str, path: Path) -> str:
    """Of a combo entry and the file that it stands for: changes when the file is replaced. OSError if it is gone."""
    return " ".join(map(str, (name, *file_state(path))))


def mllm_path(name: str) -> Path:
    return resolve(mllms(), name, "preference MLLM", "models/prefgen/mllm or models/LLM")


def mllm_lora_path(name: str) -> Path | None:
    return resolve(mllm_loras(), name, "MLLM LoRA", "models/prefgen/mllm_lora")


class Revision(NamedTuple):
    """A taste as it once was: NAME@1a2b3c4d."""

    path: Path
    revision: str


def history_of(name: str) -> Path | Revision | int:
    """ValueError says what a folder of this name lacks, ChoiceError that there is none."""
    base, _, revision = name.rpartition("@") if isinstance(name, str) else ("", "", "")
    if base and REVISION.fullmatch(revision):
        path = resolve({path.name: path for path in _history_folders()}, base, "taste", f"input/{HISTORY_FOLDER}")
        Taste(path).frozen(revision)
        return Revision(path, revision)
    for path in _history_folders():
        if path.name == name:
            HistoryFolder(path).check()
    return resolve(histories(), name, "history", f"input/{HISTORY_FOLDER}")


def history_fingerprint(name: str) -> str:
    """Changes whenever a picture of the history, a prompt, their order or a word of the taste does."""
    history = history_of(name)
    if isinstance(history, Path):
        return HistoryFolder(history).fingerprint()
    # A bundled user never changes, and of a revision its words alone.
    words = Taste(history.path).words().digest() if isinstance(history, Revision) else ""
    return f"{name} {words}"


def mllm_fingerprint(name: str, lora: str | None = NO_LORA) -> str:
    """Changes whenever a file of the MLLM's folder or of its LoRA's does: names, sizes and times."""
    digest = hashlib.sha256()
    for root in (mllm_path(name), mllm_lora_path(lora or NO_LORA)):
        if root is not None:
            # One level below, too: additional_chat_templates.
            files = [*root.iterdir(), *root.glob("*/*.jinja")]
            for file in sorted(file for file in files if file.is_file()):
                status = file.stat()
                place = file.relative_to(root).as_posix()
                digest.update(
                    f"{root.name}/{place} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogatepass")
                )
        digest.update(b"\n")
    return digest.hexdigest()
