"""PrefixMemory: which prompt prefixes a replica has lately been given, to send it their like.

Hashes of whole blocks in a chain, as a prefix cache names them. Owned by the router.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_BLOCKS = 128
"""Of a prompt: what is longer is told apart by its start."""


def hash_blocks(token_ids: Sequence[int], block_size: int) -> list[int]:
    """One hash for each whole block of the prompt's start, that depends on all before it."""
    hashes, previous = [], 0
    num_blocks = min(len(token_ids) // block_size, MAX_BLOCKS)
    for first in range(0, num_blocks * block_size, block_size):
        previous = hash((previous, tuple(token_ids[first : first + block_size])))
        hashes.append(previous)
    return hashes


class PrefixMemory:
    """The block hashes that were used last, at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._hashes)

    def num_known(self, hashes: Sequence[int]) -> int:
        """How many blocks from the first on are remembered."""
        for index, value in enumerate(hashes):
            if value not in self._hashes:
                return index
        return len(hashes)

    def remember(self, hashes: Sequence[int]) -> None:
        """Forgets what was not used for longest; of one prompt, its end before its start."""
        for value in reversed(hashes):
            self._hashes[value] = None
            self._hashes.move_to_end(value)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)
