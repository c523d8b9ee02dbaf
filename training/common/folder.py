"""A run's folder: which run it belongs to, its checkpoints, whether it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from prefgen.files import disk_full, read_text, write_atomic

from . import chain, checkpoints
from .config.command import StageArgs, default_fingerprint
from .journal import Journal
from .sharded import gather, shard_state

# Keys that may change between two commands of one run: they say how a result is reached, not which.
FREE_KEYS = ("accumulate", "save_seconds", "heldout_every")


class RunFolder:
    """RUNS/STAGE with `config.json`, `lock`, `log.jsonl`, `tensorboard/`, `checkpoints/`, `samples/`, `done`.

    args: runs, stage, and fingerprint: what the result depends on, as JSON values. rank: number of this process; only
    process 0 writes. keep: how many checkpoints stay. made_of: digests of what the stage reads (`chain.made_of`).

    The folder belongs to the run once something of it is written: a command that fails before leaves no claim.
    """

    def __init__(self, args: StageArgs, rank: int = 0, keep: int = 2, made_of: Mapping[str, str] | None = None):
        self.args = args
        self.rank = rank
        self.keep = keep
        self.folder: Path = args.runs / args.stage
        self.checkpoints = self.folder / "checkpoints"
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        # One lock a process: after a stage that failed in this process, another of its Runs may take the folder again.
        self._lock = FileLock(self.folder / "lock", is_singleton=True)
        self.made_of = dict(made_of or {})
        self._refuse_another()
        self.journal = Journal(self.folder, args.config.trackers)
        self.parts: dict[str, Any] = {}
        self.step = 0
        self._claimed = False
        # One thread: checkpoints are written in their order.
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
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

    def claim(self) -> None:
        """Write down which run the folder belongs to, before the first file of that run."""
        if self.rank == 0 and not self._claimed:
            record = self.args.fingerprint | ({"made_of": self.made_of} if self.made_of else {})
            write_atomic(self.folder / "config.json", json.dumps(record, indent=1).encode())
        self._claimed = True

    def save(self) -> None:
        """Copy a checkpoint into memory, if there is none of this step, and let a thread write it.

        All processes have to call it, the first writes.
        """
        if self._saved_step == self.step:
            return
        self.claim()
        # One copy in memory at a time.
        self.wait()
        state = {name: gather(part.state_dict(), self.rank == 0) for name, part in self.parts.items()}
        if self.rank == 0:
            copy = checkpoints.copied(state) | {"step": self.step}
            self._writing = self._writer.submit(checkpoints.write, self.checkpoints, self.step, copy, self.keep)
        self._saved_step = self.step
        self._saved_at = time.monotonic()

    def wait(self, only_if_done: bool = False) -> None:
        """Wait until the last checkpoint is on the disk. SystemExit with one sentence where it had no room.

        only_if_done: don't wait for one that is still being written.
        """
        if self._writing is None or (only_if_done and not self._writing.done()):
            return
        writing = self._writing
        self._writing = None
        with self._disk_errors("the checkpoint", self._saved_step):
            writing.result()

    def finish(self, **figures) -> None:
        """Write the stage's figures to `done`; a finished stage is skipped by the pipeline."""
        self.claim()
        self.wait()
        if self.rank == 0:
            self.journal.close()
            write_atomic(self.folder / "done", json.dumps(figures, indent=1).encode())
            print(json.dumps({self.args.stage: figures}), flush=True)

    def _refuse_another(self) -> None:
        """SystemExit where the folder holds another run, or one that was made from something else than there is now."""
        path = self.folder / "config.json"
        if not path.exists():
            return
        made_of = chain.recorded(self.folder)
        then = _flat({key: value for key, value in json.loads(read_text(path)).items() if key != "made_of"})
        now = _flat(json.loads(json.dumps(self.args.fingerprint)))
        # A key that is newer than the folder: the run had its default.
        then = {k: v for k, v in _flat(default_fingerprint(self.args.stage)).items() if k in now} | then
        changed = sorted(k for k in then | now if then.get(k) != now.get(k) and k not in FREE_KEYS)
        if changed:
            differences = ", ".join(f"{k} ({then.get(k)} there, {now.get(k)} now)" for k in changed)
            raise SystemExit(
                f"{path} holds another configuration than this command: {differences}. "
                "Use another --runs folder, or delete this one."
            )
        if sentence := chain.stale(self.folder, made_of, self.made_of):
            raise SystemExit(sentence)

    @contextmanager
    def _disk_errors(self, what: str, step: int | None = None) -> Iterator[None]:
        """End the run in one sentence where the disk has no room for `what`, of this step or the current one."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = disk_full(error)
            if reason is None:
                raise
            number = self.step if step is None else step
            raise SystemExit(
                f"{self.args.stage}, step {number}: {what} can't be written to {self.folder} ({reason}). "
                f"{self._last_saved()} Make room; the same command goes on from there."
            ) from error

    def _last_saved(self) -> str:
        if self._writing is not None:
            # Whatever it raises, the run is ending for another reason.
            wait([self._writing])
        paths = checkpoints.listed(self.checkpoints)
        return f"The last checkpoint is {paths[0]}." if paths else "There is no checkpoint yet."


def _flat(config: dict, prefix: str = "") -> dict:
    """Nested sections as {"base.path": value}."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
