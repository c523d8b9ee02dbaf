"""The engine past one machine: the same function over many jobs, as a Ray Data pipeline (`pip install "ray[data]"`).

Jobs are shards and every shard is written completely or not at all, so a task that dies with its worker is simply done
again and the bytes are those of the local engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator

from .engine import Job, Result, cores
from .errors import DataError


def run(
    function: Callable[[Job], Result], jobs: Iterable[Job], processes: int = 0, address: str | None = None
) -> Iterator[Result]:
    """Yield the results in the order in which they are ready; like `engine.run`.

    address: of a running cluster, whose machines see the set's folder under the same path and can import PrefGen; None
    for one of this machine's cores (`processes` of them, 0 for all), started here and ended with it. DataError when Ray
    is missing or unreachable, and the function's own.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported home
    try:
        import ray
    except ImportError as error:
        raise DataError('--engine ray needs Ray: pip install "ray[data]".') from error
    jobs = list(jobs)
    if not jobs:
        return
    starts_ray = not ray.is_initialized()
    if starts_ray:
        options = {} if address else {"num_cpus": processes or cores(), "include_dashboard": False}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DataError(f"Can't reach a Ray cluster at {address}: {error}") from error
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items([{"job": number} for number in range(len(jobs))], override_num_blocks=len(jobs))
        for row in rows.map(_Task(function, jobs)).iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            yield row["result"]
    finally:
        if starts_ray:
            ray.shutdown()


class _Task:
    """{job: its number} -> {result, error}: what a person can mend travels as text, all else is Ray's to report."""

    def __init__(self, function: Callable, jobs: list):
        self.function = function
        self.jobs = jobs

    def __call__(self, row: dict) -> dict:
        try:
            return {"result": self.function(self.jobs[row["job"]]), "error": ""}
        except DataError as error:
            return {"result": None, "error": str(error)}
