"""A run's folder: which run it belongs to, its checkpoints, whether it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from prefgen.files import disk_full, read_text, write_atomic

from . import checkpoints
from .config.command import StageArgs
from .journal import Journal
from .sharded import gather, shard_state

# Keys that may change between two commands of one run: they say how a result is reached, not which.
FREE_KEYS = ("accumulate",)


class RunFolder:
    """RUNS/STAGE with `config.json`, `lock`, `log.jsonl`, `tensorboard/`, `checkpoints/`, `samples/`, `done`.

    args: runs, stage, and fingerprint: what the result depends on, as JSON values. rank: number of this process; only
    process 0 writes. keep: how many checkpoints stay.
    """

    def __init__(self, args: StageArgs, rank: int = 0, keep: int = 2):
        self.args = args
        self.rank = rank
        self.keep = keep
        self.folder: Path = args.runs / args.stage
        self.checkpoints = self.folder / "checkpoints"
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        # One lock a process: after a stage that failed in this process, another of its Runs may take the folder again.
        self._lock = FileLock(self.folder / "lock", is_singleton=True)
        self._identify(json.loads(json.dumps(args.fingerprint)))
        self.journal = Journal(self.folder)
        self.parts: dict[str, Any] = {}
        self.step = 0
        self._saved_step = -1
        self._saved_at = time.monotonic()

    def lock(self) -> None:
        """Refuse a folder that another command is writing, until `unlock` or the end of this process."""
        if self.rank > 0:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SystemExit(
                f"{self.folder} is being written by another command: wait for it or stop it, or use another --runs "
                "folder."
            ) from None
        except (OSError, NotImplementedError):  # a file system without locks
            pass

    def unlock(self) -> None:
        """Let another command write the folder."""
        self._lock.release(force=True)

    @property
    def finished(self) -> bool:
        """Whether the stage is done: the same command then leaves the folder as it is."""
        return (self.folder / "done").exists()

    def warm_start(self, module: nn.Module, name: str) -> None:
        """Load `name`.safetensors of --start-from into a module, if that option is given and there is no checkpoint."""
        folder = self.args.start_from
        if folder is None or checkpoints.listed(self.checkpoints):
            return
        from safetensors.torch import load_file

        state = {key: value.float() for key, value in load_file(str(folder / f"{name}.safetensors")).items()}
        missing = module.load_state_dict(state, strict=False).missing_keys
        if self.rank == 0:
            source = f"{folder}/{name}.safetensors"
            print(f"{self.args.stage} starts from {source} ({len(missing)} tensors are new)", flush=True)

    def resume(self, **parts) -> None:
        """Name the parts of a checkpoint (modules, optimisers, whatever has a state_dict), and load the last if any."""
        self.parts = parts
        state = checkpoints.read(self.checkpoints, quiet=self.rank > 0)
        if state is not None:
            if missing := parts.keys() - state.keys():
                raise SystemExit(
                    f"{self._last_saved()} It has no {' and no '.join(sorted(missing))}: use another --runs folder."
                )
            for name, part in parts.items():
                part.load_state_dict(shard_state(part, state[name]))
            self.step = self._saved_step = state["step"]
        if self.rank == 0:
            self.journal.begin(self.step)

    def save(self) -> None:
        """Write a checkpoint, if there is none of this step. All processes have to call it, the first writes."""
        if self._saved_step == self.step:
            return
        state = {name: gather(part.state_dict(), self.rank == 0) for name, part in self.parts.items()}
        if self.rank == 0:
            with self._disk_errors("the checkpoint"):
                checkpoints.write(self.checkpoints, self.step, state | {"step": self.step}, self.keep)
        self._saved_step = self.step
        self._saved_at = time.monotonic()

    def finish(self, **figures) -> None:
        """Write the stage's figures to `done`; a finished stage is skipped by the pipeline."""
        if self.rank == 0:
            self.journal.close()
            write_atomic(self.folder / "done", json.dumps(figures, indent=1).encode())
            print(json.dumps({self.args.stage: figures}), flush=True)

    def _identify(self, config: dict) -> None:
        """Refuse a folder that holds another run."""
        path = self.folder / "config.json"
        if path.exists():
            try:
                then = _flat(json.loads(read_text(path)))
            except (ValueError, AttributeError) as error:
                raise SystemExit(f"{path} is damaged: use another --runs folder, or put a copy back.") from error
            now = _flat(config)
            changed = sorted(k for k in then | now if then.get(k) != now.get(k) and k not in FREE_KEYS)
            if changed:
                differences = ", ".join(f"{k} ({then.get(k)} there, {now.get(k)} now)" for k in changed)
                raise SystemExit(
                    f"{path} holds another configuration than this command: {differences}. "
                    "Use another --runs folder, or delete this one."
                )
        if self.rank == 0:
            write_atomic(path, json.dumps(config, indent=1).encode())

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        """End the run in one sentence where the disk has no room for `what`."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = disk_full(error)
            if reason is None:
                raise
            raise SystemExit(
                f"{self.args.stage}, step {self.step}: {what} can't be written to {self.folder} ({reason}). "
                f"{self._last_saved()} Make room; the same command goes on from there."
            ) from error

    def _last_saved(self) -> str:
        paths = checkpoints.listed(self.checkpoints)
        return f"The last checkpoint is {paths[0]}." if paths else "There is no checkpoint yet."


def _flat(config: dict, prefix: str = "") -> dict:
    """Nested sections as {"base.path": value}."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
