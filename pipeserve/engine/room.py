"""Room: whether the KV cache has blocks for one more sequence, now and later.

Owned by the engine thread. Decides only; the scheduler allocates.
"""

from __future__ import annotations

from collections.abc import Collection

from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.reserve import OutputReserve
from pipeserve.engine.sequence import Sequence
from pipeserve.engine.waiting_line import WaitingLine


class Room:
    """Measures against the running sequences, of which `running` is the scheduler's own
    collection."""

    def __init__(
        self,
        running: Collection[Sequence],
        *,
        line: WaitingLine,
        pool: BlockPool,
        reserve: OutputReserve,
        block_size: int,
    ) -> None:
        self._running = running
        self._line = line
        self._pool = pool
        self._reserve = reserve
        self._block_size = block_size

    def num_blocks(self, sequence: Sequence) -> int:
        """Blocks of all its known tokens."""
        return -(-len(sequence.token_ids) // self._block_size)

    def num_needed(self, sequence: Sequence, found: Collection[int]) -> int:
        """Free blocks that these take, where `found` are in the prefix cache."""
        return self.num_blocks(sequence) - len(found) + self._pool.count_free(found)

    def fits(self, sequence: Sequence, found: Collection[int]) -> bool:
        """Whether it can be admitted: there are blocks for it, one for each running sequence, or
        somebody would be preempted at once, and a reserve for what they will come to want."""
        num_left = self._pool.num_free - self.num_needed(sequence, found)
        if not self._running:
            assert num_left >= 0, "an empty pool holds any sequence"
            return True
        return num_left >= len(self._running) and self.leaves_reserve(sequence, num_left)

    def leaves_reserve(self, sequence: Sequence, num_left: int) -> bool:
        """Whether so many free blocks, beside its own, do for the outputs to come.

        For an interactive sequence those of the background class are as good as free. The first
        sequence of an account, and one that has waited too long, need no reserve.
        """
        if num_left >= self._reserve.most_blocks(len(self._running) + 1):
            return True
        if self._line.need_not_wait(sequence):
            return True
        rivals = self._running
        if self._line.num_background > 0 and not sequence.admission.is_background:
            background = [each for each in self._running if each.admission.is_background]
            num_left += sum(self._pool.count_private(each.block_table) for each in background)
            rivals = [each for each in self._running if not each.admission.is_background]
        return num_left >= self._reserve.num_blocks([*rivals, sequence])
