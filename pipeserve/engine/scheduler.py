"""Scheduler: which sequences compute which tokens in the next micro-batch.

Owned by the engine thread; no clock, no thread, no torch: a pure function of what it was told.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pipeserve.core.batch import MicroBatch, PipelineFacts, StepLogprobs, StepOutput
from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.cohorts import Cohorts
from pipeserve.engine.messages import FinishReason, TokenEvents, TokenLogprobs
from pipeserve.engine.sequence import Sequence, SequenceStatus
from pipeserve.engine.step_draft import Chunk, StepDraft

PREFILL_ITERATIONS = 8
"""While others decode, waiting prompt tokens are spread over about this many micro-batches, so
that no step is much longer than the next (token throttling, gLLM, arXiv 2504.14775)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepInFlight:
    """A submitted step: who is owed its tokens, each with its generation at that time."""

    step_id: int
    sampling: tuple[tuple[Sequence, int], ...]


class Scheduler:
    """Admits, schedules, preempts and ends sequences on one pipeline.

    Waiting sequences are admitted in order of arrival as soon as a row and the KV blocks of all
    their known tokens are free. When a decoding sequence finds no free block, the newest running
    sequence is preempted: it gives up its row and blocks and is computed again later.
    """

    def __init__(self, facts: PipelineFacts) -> None:
        assert facts.context_length <= facts.num_blocks * facts.block_size, (
            "a single sequence of full length fits the KV cache"
        )
        assert facts.num_rows <= facts.max_batch_tokens, "every row can decode in one step"
        self.facts = facts
        self.pool = BlockPool(facts.num_blocks)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest admission first
        self._free_rows = list(range(facts.num_rows - 1, -1, -1))
        self._cohorts = Cohorts(count=facts.num_stages, num_look_ahead=facts.num_look_ahead)
        self._in_flight: deque[_StepInFlight] = deque()
        self._next_step_id = 0
        self._num_admissions = 0
        self._num_waiting_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_steps(self) -> int:
        """Steps submitted so far."""
        return self._next_step_id

    @property
    def has_steps_in_flight(self) -> bool:
        return bool(self._in_flight)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        assert (
            sequence.num_prompt_tokens + sequence.sampling.max_tokens <= self.facts.context_length
        ), "prompt and output fit the context"
        self._waiting.append(sequence)
        self._num_waiting_tokens += len(sequence.token_ids)

    def end(self, sequence: Sequence, status: SequenceStatus) -> None:
        """FINISHED or ABORTED: free all that the sequence holds; what is in flight is dropped."""
        if sequence.status is SequenceStatus.RUNNING:
            self._give_back(sequence)
        else:
            self._waiting.remove(sequence)
            self._num_waiting_tokens -= len(sequence.token_ids)
        sequence.release(status)

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        sequence.release(SequenceStatus.WAITING)
        self._waiting.appendleft(sequence)
        self._num_waiting_tokens += len(sequence.token_ids)
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        assert sequence.row is not None, "a running sequence has a row"
        self._cohorts.leave(sequence)
        self._running.remove(sequence)
        self._free_rows.append(sequence.row)
        self.pool.free(sequence.block_table)

    def schedule(self) -> MicroBatch | None:
        """The next micro-batch, or None if the pipeline is full or there is nothing to do."""
        if len(self._in_flight) >= self.facts.num_stages + self.facts.num_look_ahead:
            return None
        draft = StepDraft()
        self._plan_decode(draft)
        self._plan_prefill(draft)
        if not draft.chunks:
            return None
        batch = draft.build(self._next_step_id)
        self._advance(draft.chunks)
        return batch

    def _plan_decode(self, draft: StepDraft) -> None:
        while not draft.decode and (ready := self._cohorts.take_turn(self._next_step_id)):
            # Oldest first: whoever a growing sequence preempts is newer, so not in the draft yet.
            for sequence in sorted(ready, key=lambda sequence: sequence.admission):
                if sequence.status is SequenceStatus.RUNNING and self._grow(sequence, draft):
                    draft.decode.append(Chunk(sequence=sequence, num_tokens=1, samples=True))
            # Again if all of this cohort were preempted, the last for want of a block that an older
            # one of another cohort holds: that one must go on, or nobody would.

    def _grow(self, sequence: Sequence, draft: StepDraft) -> bool:
        """Make room for one more token, preempting newer sequences; False if it was preempted."""
        if sequence.num_computed_tokens < len(sequence.block_table) * self.facts.block_size:
            return True
        while (taken := self.pool.allocate(1)) is None:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        draft.append_blocks(sequence, taken)
        return True

    def _plan_prefill(self, draft: StepDraft) -> None:
        budget = self._prefill_budget(len(draft.decode))
        prefilling = deque(s for s in self._running if s.num_remaining_prefill > 0)
        while budget > 0:
            sequence = prefilling.popleft() if prefilling else self._admit_next(draft)
            if sequence is None:
                return
            num_tokens = min(sequence.num_remaining_prefill, budget)
            budget -= num_tokens
            is_last = num_tokens == sequence.num_remaining_prefill
            draft.prefill.append(Chunk(sequence=sequence, num_tokens=num_tokens, samples=is_last))

    def _prefill_budget(self, num_decode_rows: int) -> int:
        """Prompt tokens for this step: enough to keep up, not so many that decoding stalls."""
        space = self.facts.max_batch_tokens - num_decode_rows
        num_pending = self._num_waiting_tokens
        num_pending += sum(s.num_remaining_prefill for s in self._running)
        is_anyone_decoding = any(s.is_decoding for s in self._running)
        num_parts = PREFILL_ITERATIONS if is_anyone_decoding else self.facts.num_stages
        least = self.facts.max_batch_tokens // PREFILL_ITERATIONS
        return min(space, max(-(-num_pending // num_parts), least))

    def _admit_next(self, draft: StepDraft) -> Sequence | None:
        """Give the longest-waiting sequence a row and the blocks of all its known tokens."""
        if not self._waiting or not self._free_rows:
            return None
        sequence = self._waiting[0]
        num_needed = -(-len(sequence.token_ids) // self.facts.block_size)
        # One block in reserve per running sequence, or the newcomer would soon be preempted.
        if self._running and num_needed + len(self._running) > self.pool.num_free:
            return None
        block_ids = self.pool.allocate(num_needed)
        assert block_ids is not None, "an empty pool holds any sequence"
        self._waiting.popleft()
        self._num_waiting_tokens -= len(sequence.token_ids)
        sequence.start(self._free_rows.pop(), self._num_admissions)
        self._num_admissions += 1
        self._running.append(sequence)
        draft.add_start(sequence)
        draft.append_blocks(sequence, block_ids)
        return sequence

    def _advance(self, chunks: list[Chunk]) -> None:
        """Record the submitted step: its tokens count as computed, its samples as on their way."""
        step_id = self._next_step_id
        self._next_step_id += 1
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed_tokens += chunk.num_tokens
            if chunk.samples:
                sequence.num_in_flight += 1
                sequence.last_sample_step = step_id
                if sequence.cohort is None:
                    self._cohorts.join(sequence)
        self._in_flight.append(
            _StepInFlight(
                step_id=step_id,
                sampling=tuple((c.sequence, c.sequence.generation) for c in chunks if c.samples),
            )
        )

    def update(self, output: StepOutput) -> TokenEvents:
        """Take in what a step sampled, end the sequences that are complete, and say what is new.

        Steps come back in the order in which they were scheduled.
        """
        step = self._in_flight.popleft()
        assert step.step_id == output.step_id, "steps come back in order"
        assert len(step.sampling) == len(output.token_ids), "one token per sampling row"
        seq_ids: list[int] = []
        token_ids: list[int] = []
        reasons: list[FinishReason | None] = []
        logprobs: list[TokenLogprobs | None] = []
        for index, (sequence, generation) in enumerate(step.sampling):
            if sequence.generation != generation:  # it ended or was preempted meanwhile
                continue
            token_id = int(output.token_ids[index])
            seq_ids.append(sequence.seq_id)
            token_ids.append(token_id)
            reasons.append(self._append_token(sequence, token_id))
            logprobs.append(_token_logprobs(sequence, output.logprobs, index))
        self.num_generated_tokens += len(token_ids)
        return TokenEvents(
            seq_ids=tuple(seq_ids),
            token_ids=tuple(token_ids),
            finish_reasons=tuple(reasons),
            logprobs=tuple(logprobs),
        )

    def _append_token(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if sequence.num_output_tokens == 0:
            self.num_prompt_tokens += sequence.num_prompt_tokens
        sequence.token_ids.append(token_id)
        sequence.num_in_flight -= 1
        if token_id in sequence.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif sequence.num_output_tokens == sequence.sampling.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return None
        self.end(sequence, SequenceStatus.FINISHED)
        return reason

    def check_integrity(self) -> None:
        """Assert that rows and blocks are each held once; for tests and idle moments."""
        self.pool.check_integrity()
        held = [block_id for s in self._running for block_id in s.block_table]
        assert len(held) == len(set(held)), "a block is held by two sequences"
        assert len(held) + self.pool.num_free == self.pool.num_blocks, "a block is lost"
        rows = {s.row for s in self._running} | set(self._free_rows)
        assert len(rows) == self.facts.num_rows, "a row is lost"
        assert len(self._running) + len(self._free_rows) == len(rows), "a row is held twice"
        waiting_tokens = sum(len(s.token_ids) for s in self._waiting)
        assert waiting_tokens == self._num_waiting_tokens, "waiting tokens are miscounted"


def _token_logprobs(
    sequence: Sequence, logprobs: StepLogprobs | None, index: int
) -> TokenLogprobs | None:
    count = sequence.sampling.num_logprobs
    if count is None:
        return None
    assert logprobs is not None, "a row that asks for log-probabilities gets them"
    return TokenLogprobs(
        logprob=float(logprobs.token_S[index]),
        top_ids=tuple(logprobs.top_ids_SK[index, :count].tolist()),
        top_logprobs=tuple(logprobs.top_SK[index, :count].tolist()),
    )
