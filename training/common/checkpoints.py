"""Checkpoints: `step-XXXXXXXX.pt` and beside each a JSON note with its SHA-256.

A file is written under another name, forced to the disk, and renamed; its note is there before it is. So a process may
be killed and a machine switched off at any moment: what is listed is complete, or its note says that it isn't, and the
one before is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from pathlib import Path

import torch

from prefgen.files import file_sha256, read_text, write_atomic


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def write(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`. Any error leaves the earlier ones as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".pt.tmp")
    try:
        with open(temporary, "wb") as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)
            # Before the rename: else a machine that is switched off may have the name on its disk and not the bytes.
            file.flush()
            os.fsync(file.fileno())
        note = {"step": step, "sha256": hashed.digest.hexdigest(), "bytes": hashed.size}
        # Before the checkpoint has its name: one without a note counts as damaged.
        write_atomic(path.with_suffix(".json"), json.dumps(note).encode())
        os.replace(temporary, path)
        _to_disk(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Last of all: until the new one is on the disk, the earlier ones are all there is.
    newest = {p.stem for p in listed(folder)[:keep]}
    old = [p for p in folder.glob("step-*") if p.suffix in (".pt", ".json") and p.stem not in newest]
    for other in (*old, *folder.glob("*.tmp")):  # and what a killed write left behind
        other.unlink(missing_ok=True)
    return path


def copied(state):
    """A nested state whose tensors are copies on the CPU, so that training may go on while they are written."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(copied, state))
    return state


def read(folder: Path, quiet: bool = False) -> dict | None:
    """The newest checkpoint that is complete, tensors on the CPU; None where there never was one.

    A damaged newer one is named in one sentence and put aside. If none is complete: SystemExit, and all stay.
    """
    damaged = []
    for path in listed(folder):
        state, fault = _read(path)
        if state is None:
            damaged.append((path, fault))
            continue
        if damaged and not quiet:
            names = " and ".join(f"{p.name} ({fault})" for p, fault in damaged)
            print(f"{folder}: {names} can't be used; going on from {path.name}.", flush=True)
            for other, _ in damaged:
                with contextlib.suppress(FileNotFoundError):
                    other.rename(other.with_suffix(".damaged"))
        return state
    if damaged:
        names = ", ".join(f"{p.name} ({fault})" for p, fault in damaged)
        raise SystemExit(f"No checkpoint in {folder} is whole: {names}. Put a copy back, or move the folder away.")
    return None


def last_state(stage: Path) -> dict:
    """The last state of a stage's run folder, such as runs/atelier/train_alignment: {part: its state, "step": int}."""
    state = read(stage / "checkpoints", quiet=True)
    if state is None:
        raise SystemExit(f"{stage} has no checkpoint: run `python -m training.{stage.name}` first.")
    return state


def _read(path: Path) -> tuple[dict | None, str]:
    """(state, "") of a complete checkpoint, (None, what is wrong with it) of any other."""
    try:
        note = json.loads(read_text(path.with_suffix(".json")))
        if file_sha256(path) != note["sha256"]:
            return None, "its checksum is another than the one noted"
        return torch.load(path, map_location="cpu", weights_only=True), ""
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        return None, f"it can't be read: {type(error).__name__}"


class _Hashed:
    """A file that hashes and counts what is written into it."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _to_disk(folder: Path) -> None:
    """Force a rename to the disk, where folders can be opened (not on Windows)."""
    with contextlib.suppress(PermissionError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
