"""What one sampling run has computed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Cache:
    """Values by key. Several threads may ask at once, one for each card: every entry is complete when it is written."""

    def __init__(self):
        self._entries: dict[Hashable, tuple[Any, Any]] = {}

    def get(self, key: Hashable, compute: Callable[[], Any], source: Any = None) -> Any:
        """The value of a key, computed if there is none, or if the one that is there came of another `source`."""
        entry = self._entries.get(key)
        if entry is None or entry[0] != source:
            entry = (source, compute())
            self._entries[key] = entry
        return entry[1]
