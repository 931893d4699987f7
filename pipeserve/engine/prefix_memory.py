"""PrefixMemory: which prompt prefixes a replica has lately been given, to send it their like.

By the names that its prefix cache has for their blocks. Owned by the router.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_BLOCKS = 128
"""Of a prompt: what is longer is told apart by its start."""


class PrefixMemory:
    """The block hashes that were used last, at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._hashes)

    def num_known(self, hashes: Sequence[bytes]) -> int:
        """How many blocks from the first on are remembered."""
        for index, value in enumerate(hashes):
            if value not in self._hashes:
                return index
        return len(hashes)

    def remember(self, hashes: Sequence[bytes]) -> None:
        """Forgets what was not used for longest; of one prompt, its end before its start."""
        for value in reversed(hashes):
            self._hashes[value] = None
            self._hashes.move_to_end(value)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)
