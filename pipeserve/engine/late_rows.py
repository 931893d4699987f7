"""LateRows: which rows are sampled behind their step, beside the next one, and who is owed a token
in this way.

Owned by the engine thread. A chain of samplers takes milliseconds in which no further step could
begin: sequences without one must not wait for it. Alone, those that have one are looked ahead.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeserve.engine.sequence import Sequence
from pipeserve.engine.step_draft import StepDraft

Owed = tuple[tuple[Sequence, int], ...]
"""Sequences, each with its generation when it was scheduled."""


class LateRows:
    """Told of every step before it is planned, when it is, and of every LateOutput."""

    def __init__(self, *, is_used: bool) -> None:
        """is_used: as PipelineFacts.samples_late."""
        self._is_used = is_used
        self._has_chains = False
        """Whether any sequence ever had one: before, nothing need be looked for."""
        self._owed: dict[int, Owed] = {}
        self.is_on = False
        """Whether rows with a chain are late in the step that is being planned."""

    def __len__(self) -> int:
        """Steps whose late tokens have not come."""
        return len(self._owed)

    @property
    def oldest_step_id(self) -> int | None:
        """Of those."""
        return next(iter(self._owed), None)

    def note_arrival(self, sequence: Sequence) -> None:
        self._has_chains |= self._is_used and sequence.has_chain

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Whoever decodes without a chain must not wait for one, in whichever cohort that is."""
        self.is_on = self._has_chains and any(
            sequence.sampling.chain is None and sequence.is_decoding for sequence in running
        )

    def holds_up(self, sequence: Sequence) -> bool:
        """Whether its next step has to wait for its tokens on the way."""
        return sequence.sampling.chain is not None and (self.is_on or sequence.is_late)

    def settle(self, draft: StepDraft) -> None:
        """All is planned. A prompt that ends in this step may be of the first sequence without a
        chain: then those that looked ahead wait for the next step, since tokens that are sampled
        in the step and late ones of one sequence could come in the wrong order."""
        if not self._has_chains:
            return
        if not self.is_on and any(c.samples and not c.sequence.has_chain for c in draft.prefill):
            self.is_on = True
            draft.decode = [c for c in draft.decode if c.sequence.num_in_flight == 0]
        if self.is_on:
            draft.late = {sequence for sequence in draft.sampling if sequence.has_chain}

    def expect(self, step_id: int, draft: StepDraft) -> None:
        """A step was submitted."""
        if draft.late:
            late = (sequence for sequence in draft.sampling if sequence in draft.late)
            self._owed[step_id] = tuple((sequence, sequence.generation) for sequence in late)

    def take(self, step_id: int) -> Owed:
        """The late tokens of a step have come: whose they are."""
        return self._owed.pop(step_id)
