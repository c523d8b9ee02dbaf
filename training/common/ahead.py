"""Work that is done in a thread before it is needed: pictures are read and decoded while a device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """A function of a number whose next value is computed in a thread while the last one is used.

    function: pure, and safe beside what its caller does meanwhile. following: the number that will be asked for after
    this one, or None. What the function raises is raised where its value is asked for.
    """

    def __init__(self, function: Callable[[int], Result], following: Callable[[int], int | None]):
        self.function = function
        self.following = following
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._number: int | None = None
        self._future: Future[Result] | None = None

    def __call__(self, number: int) -> Result:
        future = self._future if self._number == number else None
        value = self.function(number) if future is None else future.result()
        self._number = self.following(number)
        self._future = None if self._number is None else self._thread.submit(self.function, self._number)
        return value


@dataclass(frozen=True)
class Spans:
    """The chunks of a cache (`cache.cached`): of `count` rows, `chunk` at a time, by turns of so many processes."""

    count: int
    chunk: int
    world_size: int = 1

    def rows(self, start: int) -> slice:
        """The chunk that begins at a row."""
        return slice(start, min(start + self.chunk, self.count))

    def following(self, start: int) -> int | None:
        """Where this process's next chunk begins."""
        after = start + self.chunk * self.world_size
        return after if after < self.count else None
