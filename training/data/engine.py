"""The local engine: the same function over many jobs, on all cores of one machine.

A function takes one job (a shard) and streams batch functions over Arrow tables to a file of its own; nothing but small
results travels between processes, so memory does not grow with the number of jobs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Protocol, TypeVar

from .errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Engine(Protocol):
    """`run` below, or that of `ray_engine`: a function over many jobs."""

    def __call__(
        self, function: Callable[[Job], Result], jobs: Iterable[Job], processes: int = 0
    ) -> Iterator[Result]: ...


def run(function: Callable[[Job], Result], jobs: Iterable[Job], processes: int = 0) -> Iterator[Result]:
    """Yield the results in the order in which they are ready.

    function: picklable. processes: 0 for all cores, 1 for a plain loop in this process. Jobs are handed out as workers
    come free. The first failure is raised once the jobs in flight have ended. DataError when a worker was killed.
    """
    processes = processes or cores()
    if processes == 1:
        yield from map(function, jobs)
        return
    jobs = iter(jobs)
    # Spawned, not forked: Arrow's and DuckDB's threads don't survive a fork.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)
    waits_for_workers = True
    try:
        in_flight = {pool.submit(function, job) for job in islice(jobs, processes)}
        while in_flight:
            ready, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in ready:
                in_flight |= {pool.submit(function, job) for job in islice(jobs, 1)}
                yield future.result()
    except BrokenProcessPool as error:
        raise DataError("A worker process was killed (out of memory?). The same command goes on from here.") from error
    except KeyboardInterrupt:
        waits_for_workers = False
        raise
    finally:
        pool.shutdown(wait=waits_for_workers, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
