"""Policies: who decides what the next step computes, ours and the plain one to compare with.

No clock and no torch. The simulator sees requests by number, steps by their work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from pipeserve.bench.arrivals import Request
from pipeserve.bench.schedule_run import StepWork, row_work, total_work, work_of
from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import PipelineFacts, Span, StepOutput
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.policy import AdmissionPolicy
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


class Policy(Protocol):
    """A scheduler, and what it remembers."""

    @property
    def num_preemptions(self) -> int: ...

    def tell_time(self, now_s: float) -> None:
        """What the clock says."""

    def add(self, seq_id: int, request: Request) -> None:
        """A request has come."""

    def schedule(self) -> PlannedStep | None:
        """The next step, or None if the pipeline is full or there is nothing to do."""

    def complete(self, stage_spans: tuple[Span, ...]) -> StepTokens:
        """The oldest step in flight has come back, after so much time on each stage."""


class OurPolicy:
    """The engine's scheduler, as the engine uses it."""

    def __init__(self, facts: PipelineFacts, *, mixes_prefill: bool = True) -> None:
        self._scheduler = Scheduler(facts, AdmissionPolicy(mixes_prefill=mixes_prefill))
        self._in_flight: deque[tuple[int, int]] = deque()  # step_id, tokens that it samples

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    def tell_time(self, now_s: float) -> None:
        self._scheduler.tell_time(now_s)

    def add(self, seq_id: int, request: Request) -> None:
        # Prompts differ from the first token on, so that nothing is computed but once.
        prompt = (seq_id, *(0,) * (request.num_prompt_tokens - 1))
        sampling = SamplingParams(max_tokens=request.num_output_tokens, seed=0)
        admission = AdmissionParams(account=request.key, priority=request.priority)
        self._scheduler.add(
            Sequence(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling, admission=admission)
        )

    def schedule(self) -> PlannedStep | None:
        batch = self._scheduler.schedule()
        if batch is None:
            return None
        work = work_of(batch)
        self._in_flight.append((batch.step_id, work.num_rows))
        return PlannedStep(step_id=batch.step_id, work=work, needs_step=batch.needs_step)

    def complete(self, stage_spans: tuple[Span, ...]) -> StepTokens:
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


@dataclass(slots=True, eq=False, kw_only=True)
class _Row:
    """A running sequence of the plain policy."""

    seq_id: int
    request: Request
    num_computed: int = 0
    num_sampled: int = 0
    is_sampling: bool = False
    """A step in flight samples its next token."""
    last_step: int | None = None
    """That sampled for it."""

    def take(self, most_tokens: int, step_id: int) -> StepWork:
        """What it computes in a step that has room for so many tokens."""
        num_remaining = self.request.num_prompt_tokens - self.num_computed
        is_decode = num_remaining <= 0
        num_tokens = 1 if is_decode else min(num_remaining, most_tokens)
        samples = is_decode or num_tokens == num_remaining
        work = row_work(
            first_position=self.num_computed,
            num_tokens=num_tokens,
            samples=samples,
            is_decode=is_decode,
        )
        self.num_computed += num_tokens
        if samples:
            self.is_sampling, self.last_step = True, step_id
        return work


@dataclass(slots=True, eq=False)
class PlainPolicy:
    """All that can run goes into one batch, up to max_batch_tokens: running sequences in their
    order, then new ones, prompts in chunks. As many batches in flight as there are stages, none
    ahead of its tokens. So pipelined engines schedule that grew from one device; whoever was in a
    batch together stays together.

    KV for prompt and output is reserved on admission, so that nothing is ever preempted.
    """

    facts: PipelineFacts
    num_preemptions: int = 0
    _waiting: deque[_Row] = field(default_factory=deque)
    _running: list[_Row] = field(default_factory=list)
    _in_flight: deque[list[_Row]] = field(default_factory=deque)
    """Of each step, the rows that sample."""
    _num_steps: int = 0
    _num_blocks: int = 0
    """Reserved."""

    def tell_time(self, now_s: float) -> None:
        """It has no use for it."""

    def add(self, seq_id: int, request: Request) -> None:
        self._waiting.append(_Row(seq_id=seq_id, request=request))

    def schedule(self) -> PlannedStep | None:
        if len(self._in_flight) >= self.facts.num_stages:
            return None
        step_id, space = self._num_steps, self.facts.max_batch_tokens
        parts: list[StepWork] = []
        sampling: list[_Row] = []
        needs_step: int | None = None
        for row in self._candidates():
            awaited = row.last_step
            parts.append(row.take(space, step_id))
            space -= parts[-1].num_prefill_tokens or 1
            if row.is_sampling:
                sampling.append(row)
            if awaited is not None:
                needs_step = max(awaited, -1 if needs_step is None else needs_step)
            if space == 0:
                break
        if not parts:
            return None
        self._in_flight.append(sampling)
        self._num_steps += 1
        return PlannedStep(step_id=step_id, work=total_work(parts), needs_step=needs_step)

    def _candidates(self) -> Iterator[_Row]:
        yield from [row for row in self._running if not row.is_sampling]
        while self._waiting and len(self._running) < self.facts.num_rows:
            num_blocks = self._blocks_of(self._waiting[0])
            if self._num_blocks + num_blocks > self.facts.num_blocks:
                return
            self._num_blocks += num_blocks
            self._running.append(self._waiting.popleft())
            yield self._running[-1]

    def _blocks_of(self, row: _Row) -> int:
        num_tokens = row.request.num_prompt_tokens + row.request.num_output_tokens
        return -(-num_tokens // self.facts.block_size)

    def complete(self, stage_spans: tuple[Span, ...]) -> StepTokens:
        sampled = self._in_flight.popleft()
        for row in sampled:
            row.is_sampling = False
            row.num_sampled += 1
        ended = [row for row in sampled if row.num_sampled == row.request.num_output_tokens]
        for row in ended:
            self._running.remove(row)
            self._num_blocks -= self._blocks_of(row)
        return StepTokens(
            seq_ids=tuple(row.seq_id for row in sampled), ended=tuple(row.seq_id for row in ended)
        )


POLICIES: dict[str, Callable[[PipelineFacts], Policy]] = {
    "ours": OurPolicy,
    "unmixed": partial(OurPolicy, mixes_prefill=False),
    "plain": PlainPolicy,
}
"""By the names that the command takes; unmixed is ours with mix_prefill off."""
