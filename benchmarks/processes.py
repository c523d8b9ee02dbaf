"""Time and memory of a command and of all that it starts, from Linux's /proc."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

from records import ROOT

SECONDS_BETWEEN_LOOKS = 0.25


class PeakMemory:
    """The most memory, in bytes, that a process and its children have had, looked at four times a second."""

    def __init__(self, pid: int):
        self.pid = pid
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self.peak = max(self.peak, sum(map(memory, descendants(self.pid))))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak


def watched(line: list[str]) -> dict:
    """Run a command to its end: seconds, CPU seconds (with its workers) and peak memory of all its processes, bytes."""
    start = time.monotonic()
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    memory = PeakMemory(process.pid)
    # Not process.wait(): only wait4 says how much time the process and those it waited for have used.
    _, status, usage = os.wait4(process.pid, 0)
    peak = memory.stop()
    if status:
        raise SystemExit(f"{' '.join(line)} failed")
    return {"seconds": time.monotonic() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": peak}


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    pids = [pid]
    for parent in pids:
        try:
            pids += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        except OSError:
            pass  # it has just ended
    return pids


def memory(pid: int) -> int:
    """Resident bytes of a process; pages that processes share are divided among them (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
