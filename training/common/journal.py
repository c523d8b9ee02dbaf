"""What a run writes down: `log.jsonl` always, TensorBoard where it is installed, and where a step's time goes."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from prefgen.files import write_atomic


class Journal:
    """The log of one run folder. Time is collected in `seconds` by name, over the steps counted in `steps`."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"
        self.board_folder = folder / "tensorboard"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._since = time.perf_counter()
        self._first_step = 0
        self._board: Any = None  # False where there is no TensorBoard

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
        if board := self.board():
            for prefix, numbers in (("", values), ("grad/", gradients), ("seconds/", seconds)):
                for name, value in numbers.items():
                    board.add_scalar(prefix + name, value, step)
        self.seconds.clear()
        self.steps = 0
        self._since = now

    def picture(self, name: str, grid: torch.Tensor, step: int) -> None:
        """A picture, uint8 [3, H, W], for TensorBoard."""
        if board := self.board():
            board.add_image(name, grid, step)

    def board(self):
        """TensorBoard's writer, or None without TensorBoard (said once)."""
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                print("No TensorBoard here (pip install tensorboard): the log is log.jsonl alone.", file=sys.stderr)
                self._board = False
            else:
                # What an earlier process logged from that step on is hidden: those steps are done again.
                self._board = SummaryWriter(str(self.board_folder), purge_step=self._first_step)
        return self._board or None

    def close(self) -> None:
        """Write out what TensorBoard's writer has in memory."""
        if self._board:
            self._board.close()


def _step_of(line: str) -> float:
    """The step of a log line; infinity if it was torn while being written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
