"""A bounded cache that forgets what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict


class LeastRecentlyUsed(OrderedDict):
    """Mapping of at most `size` entries; reading or writing an entry makes it the newest."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def __getitem__(self, key):
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.size:
            # Python 3.10's popitem reads the entry, which would make it the newest.
            del self[next(iter(self))]
