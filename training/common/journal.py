"""What a run writes down: `log.jsonl` always, TensorBoard and W&B by accelerate's trackers, and where a step's time
goes.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from prefgen.files import write_atomic


class Journal:
    """The log of one run folder. Time is collected in `seconds` by name, over the steps counted in `steps`.

    trackers: of accelerate's, by their names, that show the same.
    """

    def __init__(self, folder: Path, trackers: Sequence[str] = ("tensorboard",)):
        self.folder = folder
        self.path = folder / "log.jsonl"
        self.names = trackers
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._since = time.perf_counter()
        self._first_step = 0
        self._trackers: list | None = None

    def begin(self, step: int) -> None:
        """Go on at `step`: lines from there on belong to steps about to be done again, a torn one to none."""
        self._first_step = step
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            earlier = [line for line in lines if _step_of(line) < step]
            write_atomic(self.path, "".join(line + "\n" for line in earlier).encode())

    def write(self, step: int, values: dict[str, float], gradients: dict[str, float]) -> None:
        """One line: the values, the gradient norm of every group, and the mean seconds of a step since the last line
        (`step` is the whole of it, pictures and checkpoints too)."""
        now = time.perf_counter()
        count = max(1, self.steps)
        self.seconds["step"] = now - self._since
        seconds = {name: round(total / count, 4) for name, total in self.seconds.items()}
        line = {"step": step, "time": round(time.time(), 1)} | values | {"grad": gradients, "seconds": seconds}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown: dict[str, float] = {}
        for prefix, numbers in (("", values), ("grad/", gradients), ("seconds/", seconds)):
            shown |= {prefix + name: value for name, value in numbers.items()}
        self._show(shown, step)
        self.seconds.clear()
        self.steps = 0
        self._since = now

    def write_figures(self, step: int, figures: dict[str, float]) -> None:
        """One line of figures that don't come with every step."""
        line = {"step": step, "time": round(time.time(), 1)} | figures
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._show(figures, step)

    def picture(self, name: str, grid: torch.Tensor, step: int) -> None:
        """A picture, uint8 [3, H, W], for the trackers."""
        pictures = grid.movedim(0, -1)[None].numpy()  # [1, H, W, 3]
        for tracker in self.trackers():
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pictures}, step=step, **layout)

    def trackers(self) -> list:
        """accelerate's trackers of these names, as far as their packages are installed (said once where one isn't)."""
        if self._trackers is None:
            self._trackers = [tracker for name in self.names if (tracker := self._started(name)) is not None]
        return self._trackers

    def close(self) -> None:
        """Write out what the trackers have in memory."""
        for tracker in self._trackers or ():
            tracker.finish()

    def _show(self, numbers: dict[str, float], step: int) -> None:
        for tracker in self.trackers():
            tracker.log(numbers, step=step)

    def _started(self, name: str):
        """One tracker, or None where its package isn't installed."""
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        try:
            import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
            if name == "tensorboard":
                # What an earlier process logged from that step on is hidden: those steps are done again.
                tracker = TensorBoardTracker("tensorboard", logging_dir=self.folder, purge_step=self._first_step)
            else:
                run = f"{self.folder.parent.name}-{self.folder.name}"
                # Called the same, a resumed run goes on in the same curves.
                tracker = WandBTracker("prefgen", name=run, id=run, resume="allow", dir=str(self.folder))
            # Before accelerate 1.10 a tracker started when it was made.
            if hasattr(tracker, "start"):
                tracker.start()
        except ImportError:
            package = {"tensorboard": "TensorBoard", "wandb": "W&B"}[name]
            print(f"No {package} here (pip install {name}): the log is log.jsonl alone.", file=sys.stderr)
            return None
        return tracker


def _step_of(line: str) -> float:
    """The step of a log line; infinity if it was torn while being written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
