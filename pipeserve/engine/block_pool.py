"""BlockPool: which KV blocks are free, who shares the others, and what the named ones hold.

Owned by the engine thread. One block id stands for the same block on every stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out block ids 0 to num_blocks - 1; a block is free once its last user is gone.

    A free block keeps its name and content until it is handed out again. Nameless blocks go
    first, then the named one that was freed longest ago.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, "a pool has at least one block"
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_users = [0] * num_blocks
        self._names: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without a user, named ones included."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, each with one user; None (and nothing taken) if too few are free."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in taken:
            self._num_users[block_id] = 1
            name = self._names.pop(block_id, None)
            if name is not None:
                del self._blocks[name]
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Each of these named blocks has one more user."""
        for block_id in block_ids:
            assert block_id in self._names, f"block {block_id} is shared but has no name"
            if self._num_users[block_id] == 0:
                del self._free[block_id]
            self._num_users[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """One user of each of these blocks, in the order of a sequence, is gone.

        Of one sequence the last block is handed out first: without the first, none can be found.
        """
        for block_id in reversed(block_ids):
            assert self._num_users[block_id] > 0, f"block {block_id} is freed but has no user"
            self._num_users[block_id] -= 1
            if self._num_users[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._names:
                    self._free.move_to_end(block_id, last=False)

    def name(self, block_id: int, name: bytes) -> None:
        """A used block's content is final; nothing changes if another block holds the same."""
        assert self._num_users[block_id] > 0, f"block {block_id} is named but has no user"
        if name not in self._blocks:
            self._blocks[name] = block_id
            self._names[block_id] = name

    def find(self, name: bytes) -> int | None:
        """The block with this name."""
        return self._blocks.get(name)

    def count_free(self, block_ids: Iterable[int]) -> int:
        """How many of these have no user."""
        return sum(self._num_users[block_id] == 0 for block_id in block_ids)

    def count_private(self, block_ids: Iterable[int]) -> int:
        """How many of these have one user, so that they would be free without it."""
        return sum(self._num_users[block_id] == 1 for block_id in block_ids)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that `held`, all users' blocks together, is what was handed out; for tests."""
        num_users = [0] * self.num_blocks
        for block_id in held:
            num_users[block_id] += 1
        assert num_users == self._num_users, "a block is lost, or has other users than it should"
        free = {block_id for block_id, count in enumerate(num_users) if count == 0}
        assert free == set(self._free), "a block is free and in use, or neither"
        assert {name: block_id for block_id, name in self._names.items()} == self._blocks
