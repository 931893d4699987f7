"""RunningSet: who runs, and which rows and KV blocks each holds, from admission to the end.

Owned by the engine thread. Knows not what a step computes, only what it has to be told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from pipeserve.core.batch import PipelineFacts
from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.cohorts import Cohorts
from pipeserve.engine.parking import Parking
from pipeserve.engine.precedence import Precedence
from pipeserve.engine.prefix_cache import PrefixCache
from pipeserve.engine.reserve import OutputReserve
from pipeserve.engine.room import Room
from pipeserve.engine.sequence import Sequence, SequenceStatus
from pipeserve.engine.step_draft import StepDraft
from pipeserve.engine.waiting_line import WaitingLine

MAX_LOOKED_AT = 64
"""Waiting sequences that are considered for one micro-batch."""


class RunningSet:
    """The sequences that hold a row, in the order in which they took it.

    A waiting one gets a row and the blocks of all its known tokens at once. When one that decodes
    finds no free block, the last in rank is preempted: it gives up row and blocks, and waits. The
    first in rank never is, so somebody always ends.
    """

    def __init__(
        self,
        facts: PipelineFacts,
        *,
        line: WaitingLine,
        parking: Parking,
        pool: BlockPool,
        prefix_cache: PrefixCache,
        reserve: OutputReserve,
        cohorts: Cohorts,
    ) -> None:
        """line, parking: where those go that lose their row. cohorts: left by whoever no longer
        decodes."""
        self._num_rows, self._block_size = facts.num_rows, facts.block_size
        self._line = line
        self._parking = parking
        self._pool = pool
        self._prefix_cache = prefix_cache
        self._reserve = reserve
        self._cohorts = cohorts
        self._sequences: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._free_rows = list(range(facts.num_rows - 1, -1, -1))
        self._precedence = Precedence(self._sequences.keys(), line=line, pool=pool)
        self._room = Room(
            self._sequences.keys(),
            line=line,
            pool=pool,
            reserve=reserve,
            block_size=facts.block_size,
        )
        self.num_preemptions = 0
        self.num_withdrawals = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def prefilling(self) -> Collection[Sequence]:
        """Of them, those with prompt left to compute."""
        return self._prefilling.keys()

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    def ranked(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """First in rank first: whom it preempts is behind it."""
        return sorted(sequences, key=self._precedence.ranks().__getitem__)

    def make_way(self) -> None:
        """Preempt for those who are owed a row, before anything of this step is planned."""
        num_rows, num_blocks = len(self._free_rows), self._pool.num_free
        looked_at: set[Sequence] = set()
        while (sequence := self._line.first(looked_at)) is not None:
            looked_at.add(sequence)
            if len(looked_at) > MAX_LOOKED_AT or not self._precedence.is_owed(sequence):
                return
            found = self._prefix_cache.find(sequence)
            if self._prefix_cache.who_computes(sequence, len(found)) is not None:
                continue
            num_blocks -= self._room.num_needed(sequence, found)
            shared = frozenset(found)
            victims = self._precedence.victims(
                sequence, found=shared, num_rows=num_rows, num_blocks=num_blocks
            )
            if victims is None or not self._room.leaves_reserve(sequence, num_blocks):
                return
            for victim in victims:
                num_blocks += self._precedence.num_freed(victim, shared)
                self.preempt(victim)
            num_rows += len(victims) - 1

    def start(self, sequence: Sequence, draft: StepDraft) -> Sequence | None:
        """Give a waiting sequence a row, and the blocks of all its known tokens.

        Returns it; or, still waiting, the one that is about to compute what it needs next, which
        should have its turn; None if there is no room.
        """
        found = self._prefix_cache.find(sequence)
        computing = self._prefix_cache.who_computes(sequence, len(found))
        if computing is not None:
            return computing
        if not self._free_rows or not self._room.fits(sequence, found):
            return None
        self.admit(sequence, found, draft)
        return sequence

    def admit(self, sequence: Sequence, found: list[int], draft: StepDraft) -> None:
        """There is a row for it, and room; `found` are its blocks in the prefix cache."""
        self._pool.share(found)
        taken = self._pool.allocate(self._room.num_blocks(sequence) - len(found))
        assert taken is not None, "there is room"
        self._line.note_start(sequence)
        sequence.start(self._free_rows.pop(), num_computed_tokens=len(found) * self._block_size)
        self._sequences[sequence] = self._prefilling[sequence] = None
        draft.add_start(sequence)
        draft.append_blocks(sequence, found + taken)
        self._prefix_cache.note_start(sequence, len(found))

    def end_prefill(self, sequence: Sequence) -> None:
        """The last of its prompt is being computed."""
        del self._prefilling[sequence]

    def grow(self, sequence: Sequence, draft: StepDraft) -> bool:
        """Make room for one more token, preempting the last in rank; False if that was itself."""
        if not self._is_full(sequence):
            return True
        while (taken := self._pool.allocate(1)) is None:
            ranks = self._precedence.ranks()
            victim = max(ranks, key=ranks.__getitem__)
            self._reserve.note_preemption()
            self.preempt(victim)
            if victim is sequence:
                return False
        draft.append_blocks(sequence, taken)
        return True

    def _is_full(self, sequence: Sequence) -> bool:
        """Whether its next token needs another block."""
        return sequence.num_computed_tokens >= len(sequence.block_table) * self._block_size

    def rewind(self, sequence: Sequence) -> None:
        """A free run has ended while steps beyond it are in flight: they were sampled without the
        mask that their tokens need, and are dropped."""
        self._cohorts.leave(sequence)
        sequence.rewind()
        self._prefilling[sequence] = None

    def withdraw(self, sequence: Sequence, num_tokens: int) -> None:
        """Its last known tokens were not to be written. It computes anew from the block of the last
        one that stays: in its row if there is a block for that, else as after a preemption."""
        num_whole = (len(sequence.token_ids) - num_tokens - 1) // self._block_size
        dropped = sequence.block_table[num_whole:]
        if self._pool.num_free or self._pool.count_private(dropped):
            self._cohorts.leave(sequence)
            self._pool.free(dropped)
            # Blocks that are full may have other users, or get some: none is written to again.
            taken = self._pool.allocate(1)
            assert taken is not None, "one is free"
            sequence.cut_back(num_tokens, num_whole, taken, block_size=self._block_size)
            self._prefilling[sequence] = None
        else:
            self.give_back(sequence)
            sequence.release(SequenceStatus.WAITING)
            sequence.withdraw(num_tokens, block_size=self._block_size)
            self._line.add(sequence)
        self.num_withdrawals += 1

    def preempt(self, sequence: Sequence) -> None:
        """It gives up its row and blocks, and waits to be computed again."""
        self.give_back(sequence)
        sequence.release(SequenceStatus.WAITING)
        self._parking.pass_by(sequence, self._line.add)
        self.num_preemptions += 1

    def give_back(self, sequence: Sequence) -> None:
        """Its row and blocks are free; the caller says what becomes of it."""
        assert sequence.row is not None, "a running sequence has a row"
        self._cohorts.leave(sequence)
        del self._sequences[sequence]
        self._prefilling.pop(sequence, None)
        self._free_rows.append(sequence.row)
        self._line.note_stop(sequence)
        self._prefix_cache.note_end(sequence)
        self._pool.free(sequence.block_table)

    def check_integrity(self) -> None:
        """Assert that rows and blocks are each held once; for tests and idle moments."""
        held = [block_id for sequence in self._sequences for block_id in sequence.block_table]
        self._pool.check_integrity(held)
        rows = {sequence.row for sequence in self._sequences} | set(self._free_rows)
        assert len(rows) == self._num_rows, "a row is lost"
        assert len(self) + len(self._free_rows) == len(rows), "a row is held twice"
        unfinished = {
            sequence for sequence in self._sequences if sequence.num_remaining_prefill > 0
        }
        assert unfinished == set(self._prefilling), "a prompt is forgotten"
