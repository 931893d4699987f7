"""Cohorts: decoding sequences in as many groups as there are stages, one micro-batch of each in
flight, so that every stage has a group to work on. Owned by the engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeserve.engine.late_rows import LateRows
from pipeserve.engine.sequence import Sequence

UNEVENNESS = 16
"""A sequence moves once the largest cohort has this part of its sequences more than the smallest:
steps that differ by less cost less than moving."""


@dataclass(slots=True, eq=False)
class Cohort:
    """Sequences that decode in the same micro-batch."""

    index: int
    sequences: list[Sequence] = field(default_factory=list)
    last_step: int = -1
    """The newest step that was scheduled for this cohort."""


class Cohorts:
    """Keeps the cohorts equal in size, unless told not to, and takes turns among them.

    `num_look_ahead` is how many tokens of a sequence may be on their way when its next step is
    scheduled.
    """

    def __init__(
        self, *, count: int, num_look_ahead: int, late_rows: LateRows, is_balanced: bool = True
    ) -> None:
        """is_balanced: else newcomers join one cohort after the other, and stay."""
        self._cohorts = [Cohort(index) for index in range(count)]
        self._is_balanced = is_balanced
        self._num_joined = 0
        self._num_look_ahead = num_look_ahead
        self._late_rows = late_rows

    @property
    def num_lanes(self) -> int:
        """Cohorts that have sequences."""
        return sum(1 for cohort in self._cohorts if cohort.sequences)

    def join(self, sequence: Sequence) -> None:
        """A sequence begins to decode: the smallest cohort takes it."""
        cohort = self._cohorts[self._num_joined % len(self._cohorts)]
        self._num_joined += 1
        if self._is_balanced:
            cohort = min(self._cohorts, key=lambda each: len(each.sequences))
        self._put(sequence, cohort)

    def leave(self, sequence: Sequence) -> None:
        """A sequence ended or lost its row; the cohorts are evened out again."""
        if sequence.cohort is None:
            return
        self._cohorts[sequence.cohort].sequences.remove(sequence)
        sequence.cohort = None
        if not self._is_balanced:
            return
        largest = max(self._cohorts, key=lambda cohort: len(cohort.sequences))
        smallest = min(self._cohorts, key=lambda cohort: len(cohort.sequences))
        surplus = len(largest.sequences) - len(smallest.sequences)
        # One that moves waits for another cohort's turn; newcomers join the smallest in any case.
        if surplus >= max(2, len(largest.sequences) // UNEVENNESS):
            self._put(largest.sequences.pop(), smallest)

    @staticmethod
    def _put(sequence: Sequence, cohort: Cohort) -> None:
        sequence.cohort = cohort.index
        cohort.sequences.append(sequence)

    def take_turn(self, step_id: int) -> list[Sequence]:
        """The sequences that decode in this step: those of the cohort that waited longest.

        Empty if no cohort has a sequence that can take a step now.
        """
        num_lanes = self._num_lanes_ahead()
        for cohort in sorted(self._cohorts, key=lambda cohort: cohort.last_step):
            ready = [s for s in cohort.sequences if self._can_step(s, step_id, num_lanes)]
            if ready and not self._should_wait(ready, cohort):
                cohort.last_step = step_id
                return ready
        return []

    def _num_lanes_ahead(self) -> int:
        """Cohorts that take turns whatever comes back; others have late rows alone."""
        if not self._late_rows.is_on:
            return self.num_lanes
        holds_up = self._late_rows.holds_up
        return sum(1 for each in self._cohorts if not all(map(holds_up, each.sequences)))

    def _should_wait(self, ready: list[Sequence], cohort: Cohort) -> bool:
        """Sequences whose masks or tokens came late wait for the others of their cohort, whose
        tokens are on their way: a step of their own would hold those up."""
        return all(map(self._comes_late, ready)) and any(
            sequence.wants_token and not self._comes_late(sequence) for sequence in cohort.sequences
        )

    def _comes_late(self, sequence: Sequence) -> bool:
        """Whether its next token cannot be looked ahead."""
        return sequence.is_masked or self._late_rows.holds_up(sequence)

    def _can_step(self, sequence: Sequence, step_id: int, num_lanes: int) -> bool:
        if not sequence.may_run_on:
            return False
        if sequence.num_in_flight == 0 or self._comes_late(sequence):
            return sequence.num_in_flight == 0
        # The first stage waits for the token that is on its way. That costs nothing if the other
        # cohorts' steps lie between; sooner, the stage would idle with their work behind it.
        assert sequence.last_sample_step is not None
        return (
            sequence.num_in_flight <= self._num_look_ahead
            and step_id - sequence.last_sample_step >= num_lanes
        )
