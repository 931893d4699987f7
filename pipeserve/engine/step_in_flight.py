"""StepInFlight: what the scheduler remembers of a submitted step until it comes back."""

from __future__ import annotations

from dataclasses import dataclass

from pipeserve.engine.attention_cost import StepWork
from pipeserve.engine.sequence import Sequence
from pipeserve.engine.step_draft import StepDraft


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInFlight:
    """A submitted step: who is owed its tokens, each with its generation at that time."""

    step_id: int
    sampling: tuple[tuple[Sequence, int], ...]
    """But for the late ones."""
    work: StepWork

    @classmethod
    def of(cls, draft: StepDraft, *, step_id: int, work: StepWork) -> StepInFlight:
        sampling = ((each, each.generation) for each in draft.sampling if each not in draft.late)
        return cls(step_id=step_id, sampling=tuple(sampling), work=work)
