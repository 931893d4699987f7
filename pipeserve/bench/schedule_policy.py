"""SimulatedPolicy: a scheduler as the simulator uses it.

Requests by number, steps by their work. No clock and no torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from pipeserve.bench.arrivals import Request
from pipeserve.bench.schedule_run import StepWork, work_of
from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import Span, StepOutput
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A step for the pipeline."""

    step_id: int
    """Consecutive from 0."""
    work: StepWork
    needs_step: int | None
    """The newest earlier step whose sampled tokens this one reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """One token for each of these sequences, and those for which it was the last."""

    seq_ids: tuple[int, ...]
    ended: tuple[int, ...]


class SimulatedPolicy:
    """A scheduler that is used as the engine uses it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._in_flight: deque[tuple[int, int]] = deque()  # step_id, tokens that it samples

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    def tell_time(self, now_s: float) -> None:
        """What the clock says."""
        self._scheduler.tell_time(now_s)

    def add(self, seq_id: int, request: Request) -> None:
        """A request has come."""
        # Prompts differ from the first token on, so that nothing is computed but once.
        prompt = (seq_id, *(0,) * (request.num_prompt_tokens - 1))
        sampling = SamplingParams(max_tokens=request.num_output_tokens, seed=0)
        admission = AdmissionParams(account=request.key, priority=request.priority)
        self._scheduler.add(
            Sequence(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling, admission=admission)
        )

    def schedule(self) -> PlannedStep | None:
        """The next step, or None if the pipeline is full or there is nothing to do."""
        batch = self._scheduler.schedule()
        if batch is None:
            return None
        work = work_of(batch)
        self._in_flight.append((batch.step_id, work.num_rows))
        return PlannedStep(step_id=batch.step_id, work=work, needs_step=batch.needs_step)

    def complete(self, stage_spans: tuple[Span, ...]) -> StepTokens:
        """The oldest step in flight has come back, after so much time on each stage."""
        step_id, num_sampled = self._in_flight.popleft()
        events = self._scheduler.update(
            StepOutput(
                step_id=step_id,
                token_ids=np.zeros(num_sampled, np.int32),
                logprobs=None,
                stage_spans=stage_spans,
            )
        )
        reasons = zip(events.seq_ids, events.finish_reasons, strict=True)
        ended = tuple(seq_id for seq_id, reason in reasons if reason is not None)
        return StepTokens(seq_ids=events.seq_ids, ended=ended)
