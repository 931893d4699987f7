"""Precedence: which running sequences give way, to whom, and in which order.

Owned by the engine thread. Decides only; the scheduler preempts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.sequence import Sequence
from pipeserve.engine.waiting_line import WaitingLine, standing

Rank = tuple[bool, int, bool, int]


class Precedence:
    """Ranks the running sequences, of which `running` is the scheduler's own collection."""

    def __init__(self, running: Collection[Sequence], *, line: WaitingLine, pool: BlockPool):
        self._running = running
        self._line = line
        self._pool = pool

    def ranks(self) -> dict[Sequence, Rank]:
        """Smaller goes on, the largest is preempted: by class, by priority, by arrival, and the
        first of each account before all others of the same priority."""
        first: dict[str, Sequence] = {}
        for sequence in sorted(self._running, key=standing):
            first.setdefault(sequence.admission.account, sequence)
        return {
            sequence: (
                sequence.admission.is_background,
                sequence.admission.priority,
                first[sequence.admission.account] is not sequence,
                sequence.ordinal,
            )
            for sequence in self._running
        }

    def is_owed(self, sequence: Sequence) -> bool:
        """Whether others have to make way for a waiting sequence, be it only those in the
        background."""
        if self._line.num_background > 0 and not sequence.admission.is_background:
            return True
        return self._line.need_not_wait(sequence)

    def victims(
        self, sequence: Sequence, *, found: Collection[int], num_rows: int, num_blocks: int
    ) -> list[Sequence] | None:
        """Whom to preempt so that an owed sequence can start; None if that would not be enough.

        found: the blocks that it would share. num_rows, num_blocks: what is free now; blocks for
        the sequence itself are taken off.
        """
        victims: list[Sequence] = []
        is_overdue = self._line.is_overdue(sequence)
        num_running = Counter(each.admission.account for each in self._running)
        num_left = len(self._running)

        def is_enough() -> bool:
            return num_rows > 0 and num_blocks >= num_left  # a block in reserve for each

        if is_enough():
            return victims
        ranks = self.ranks()
        for victim in sorted(ranks, key=ranks.__getitem__, reverse=True):
            num_own = num_running[victim.admission.account]
            if not self._yields(victim, sequence, num_own, is_overdue=is_overdue):
                continue
            victims.append(victim)
            num_running[victim.admission.account] -= 1
            num_left -= 1
            num_rows += 1
            num_blocks += self.num_freed(victim, found)
            if is_enough():
                return victims
        return None

    def num_freed(self, victim: Sequence, found: Collection[int]) -> int:
        """Blocks that a victim leaves, but for those that a newcomer would share anyway."""
        return self._pool.count_private([each for each in victim.block_table if each not in found])

    def _yields(
        self, victim: Sequence, sequence: Sequence, num_running: int, *, is_overdue: bool
    ) -> bool:
        """num_running: sequences of the victim's account, as long as it still runs."""
        if victim.admission.is_background:
            return True
        if is_overdue:
            return victim.ordinal > sequence.ordinal
        return (
            self._line.num_running(sequence) == 0
            and num_running >= 2
            and victim.admission.priority >= sequence.admission.priority
            # Or it would be next in the line again, and take the row back.
            and self._line.tag(victim) >= self._line.tag(sequence)
        )
