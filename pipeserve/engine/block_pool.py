"""BlockPool: which KV blocks are free and how many sequences use each of the others.

Owned by the engine thread. One block id stands for the same block on every stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockPool:
    """Hands out block ids 0 to num_blocks - 1; a block returns when its last user frees it."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, "a pool has at least one block"
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._num_users = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, each with one user; None (and nothing taken) if too few are free."""
        if count > len(self._free):
            return None
        taken = [self._free.popleft() for _ in range(count)]
        for block_id in taken:
            self._num_users[block_id] = 1
        return taken

    def free(self, block_ids: Iterable[int]) -> None:
        """One user of each of these blocks is gone."""
        for block_id in block_ids:
            assert self._num_users[block_id] > 0, f"block {block_id} is freed but has no user"
            self._num_users[block_id] -= 1
            if self._num_users[block_id] == 0:
                self._free.append(block_id)

    def check_integrity(self) -> None:
        """Assert that every block is either free, once, or in use."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        for block_id, num_users in enumerate(self._num_users):
            assert (block_id in free) == (num_users == 0), f"block {block_id} is lost or shared"
