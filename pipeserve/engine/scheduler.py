"""Scheduler: which sequences compute which tokens in the next micro-batch.

Owned by the engine thread; no clock, no thread, no torch: a pure function of what it was told.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection

from pipeserve.core.batch import LateOutput, MicroBatch, PipelineFacts, StepOutput
from pipeserve.core.constraint import FreeRun, TextWatch, WordArray
from pipeserve.engine.attention_cost import AttentionCost, StepWork
from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.cohorts import Cohorts
from pipeserve.engine.event_draft import EventDraft
from pipeserve.engine.late_rows import LateRows, Owed
from pipeserve.engine.messages import FinishReason, TokenEvents
from pipeserve.engine.parking import Parking
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.prefill_budget import PrefillBudget
from pipeserve.engine.prefix_cache import PrefixCache
from pipeserve.engine.reserve import OutputReserve
from pipeserve.engine.running_set import MAX_LOOKED_AT, RunningSet
from pipeserve.engine.sequence import Sequence, SequenceStatus
from pipeserve.engine.step_draft import Chunk, StepDraft
from pipeserve.engine.step_in_flight import StepInFlight
from pipeserve.engine.waiting_line import WaitingLine
from pipeserve.engine.watched_output import WatchedOutput

MOST_SCORED = 256
"""Prompt tokens of a sequence in one step if they are scored: each passes the head as well."""
TAIL = 1 / 4
"""Of a chunk: so little more ends the prompt with it, rather than with a step of its own."""
TURN_BY_ARRIVAL = 8
"""Of so many steps, one computes prompts in the order of arrival: whose turn never comes by
priority and shares, holds its row not for ever."""


class Scheduler:
    """Admits, schedules and ends sequences on one pipeline.

    Who waits is admitted in the order of the waiting line, as soon as a row is free and the KV
    blocks of all its known tokens, with a reserve for the outputs to come.
    """

    def __init__(self, facts: PipelineFacts, policy: AdmissionPolicy | None = None) -> None:
        assert facts.context_length <= facts.num_blocks * facts.block_size, (
            "a single sequence of full length fits the KV cache"
        )
        assert facts.num_rows <= facts.max_batch_tokens, "every row can decode in one step"
        self.facts = facts
        self.policy = policy or AdmissionPolicy()
        self.pool = BlockPool(facts.num_blocks)
        self.prefix_cache = PrefixCache(
            self.pool, block_size=facts.block_size, is_shared=self.policy.shares_prefixes
        )
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._line = WaitingLine(max_wait_s=self.policy.max_wait_s)
        self.reserve = OutputReserve(block_size=facts.block_size, is_kept=self.policy.keeps_reserve)
        self._budget = PrefillBudget(facts, is_throttled=self.policy.throttles_prefill)
        self._attention = AttentionCost(is_learned=self.policy.weighs_attention)
        self._late_rows = LateRows(is_used=facts.samples_late)
        self._cohorts = Cohorts(
            count=facts.num_stages,
            num_look_ahead=facts.num_look_ahead,
            late_rows=self._late_rows,
            is_balanced=self.policy.balances_cohorts,
        )
        self._parking = Parking()
        self._running = RunningSet(
            facts,
            line=self._line,
            parking=self._parking,
            pool=self.pool,
            prefix_cache=self.prefix_cache,
            reserve=self.reserve,
            cohorts=self._cohorts,
        )
        self._in_flight: deque[StepInFlight] = deque()
        self._next_step_id = 0
        self._constrained_tokens: list[tuple[Sequence, tuple[int, ...]]] = []
        self._stuck: list[Sequence] = []
        self._num_decode_steps = 0  # since the last step with prompt chunks only
        self._num_prompt_steps = 0  # steps in which prompts had their turn

    @property
    def num_waiting(self) -> int:
        return len(self._line) + len(self._parking)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_preemptions(self) -> int:
        return self._running.num_preemptions

    @property
    def num_withdrawals(self) -> int:
        """Times that a watched sequence's last tokens were not to be written."""
        return self._running.num_withdrawals

    @property
    def num_steps(self) -> int:
        """Steps submitted so far."""
        return self._next_step_id

    @property
    def has_steps_in_flight(self) -> bool:
        return bool(self._in_flight)

    @property
    def has_late_in_flight(self) -> bool:
        """Whether late tokens are to come."""
        return len(self._late_rows) > 0

    @property
    def oldest_late_step_id(self) -> int | None:
        """The first step whose late tokens are to come."""
        return self._late_rows.oldest_step_id

    @property
    def is_owed(self) -> bool:
        """Whether anything is to come from the pipeline."""
        return self.has_steps_in_flight or self.has_late_in_flight

    def tell_time(self, now_s: float) -> None:
        """What the clock says; sequences that arrive are taken to arrive now."""
        self._line.now_s = now_s

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; a constrained one from its first mask on, a watched one from its
        watch on."""
        assert (
            sequence.num_prompt_tokens + sequence.sampling.max_tokens <= self.facts.context_length
        ), "prompt and output fit the context"
        self._late_rows.note_arrival(sequence)
        self._parking.pass_by(sequence, self._line.arrive)

    def watch(self, sequence: Sequence, watch: TextWatch) -> None:
        """What sees which tokens of a watched sequence are to be withdrawn."""
        sequence.watched = WatchedOutput(watch, vocab_size=self.facts.vocab_size)
        self._parking.leave(sequence)

    def allow(self, sequence: Sequence, allowed: WordArray | FreeRun) -> None:
        """What a constrained sequence's next token, or tokens, may be."""
        sequence.allow(allowed)
        self._parking.leave(sequence)

    def take_constrained_tokens(self) -> list[tuple[Sequence, tuple[int, ...]]]:
        """Constrained sequences whose masks are wanted next, and their tokens since the last."""
        taken, self._constrained_tokens = self._constrained_tokens, []
        return [(sequence, token_ids) for sequence, token_ids in taken if not sequence.is_ended]

    def take_stuck(self) -> list[Sequence]:
        """Those that found since the last call that nothing likely is left to them."""
        stuck, self._stuck = self._stuck, []
        return stuck

    def end(self, sequence: Sequence, status: SequenceStatus) -> None:
        """FINISHED or ABORTED: free all that the sequence holds; what is in flight is dropped."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.give_back(sequence)
        elif not self._parking.remove(sequence):
            self._line.remove(sequence)
        if status is SequenceStatus.FINISHED:
            self.reserve.note_finished(sequence.num_output_tokens)
        sequence.release(status)

    def schedule(self) -> MicroBatch | None:
        """The next micro-batch, or None if the pipeline is full or there is nothing to do."""
        if len(self._in_flight) >= self.facts.num_stages + self.facts.num_look_ahead:
            return None
        draft = StepDraft()
        self._late_rows.begin_step(self._running)
        self._plan(draft)
        if not draft.chunks:
            return None
        self._late_rows.settle(draft)
        batch = draft.build(self._next_step_id)
        self._advance(draft)
        return batch

    def _plan(self, draft: StepDraft) -> None:
        """Choose what the next step computes."""
        self._running.make_way()
        if self.policy.mixes_prefill:
            self._plan_decode(draft)
            self._plan_prefill(draft)
        else:
            self._plan_either(draft)

    def _plan_either(self, draft: StepDraft) -> None:
        """Decode rows or prompt chunks: chunks once every cohort has had a turn."""
        plans = [self._plan_decode, self._plan_prefill]
        if self._num_decode_steps >= self._cohorts.num_lanes:
            plans.reverse()
        for plan in plans:
            if not draft.chunks:
                plan(draft)
        self._num_decode_steps = self._num_decode_steps + 1 if draft.decode else 0

    def _plan_decode(self, draft: StepDraft) -> None:
        while not draft.decode and (ready := self._cohorts.take_turn(self._next_step_id)):
            if len(ready) > self.pool.num_free:
                ready = self._running.ranked(ready)  # whom one preempts is not in the draft yet
            for sequence in ready:
                if sequence.status is SequenceStatus.RUNNING and self._running.grow(
                    sequence, draft
                ):
                    draft.decode.append(Chunk(sequence=sequence, num_tokens=1, samples=True))
            # Again if all of this cohort were preempted, the last for want of a block that one of
            # another cohort holds: that one must go on, or nobody would.

    def _plan_prefill(self, draft: StepDraft) -> None:
        self._num_prompt_steps += 1
        budget: float = self._budget.num_tokens(
            num_decode_rows=len(draft.decode),
            num_pending=self._line.num_tokens
            + sum(sequence.num_remaining_prefill for sequence in self._running.prefilling),
            is_decoding=any(
                sequence.wants_token
                for sequence in self._running
                if sequence not in self._running.prefilling
            ),
        )
        self._line.begin_step(self._running.prefilling)
        going_on = {each: None for each in self._running.prefilling if not each.awaits_mask}
        looked_at: set[Sequence] = set()
        may_start = True
        while budget >= 1.0:
            waiting = self._line.first(looked_at) if may_start else None
            sequence = self._next_prompt(going_on, waiting)
            if sequence is None:
                return
            if sequence is waiting:
                looked_at.add(sequence)
                sequence = self._running.start(sequence, draft)
                may_start = sequence is not None and len(looked_at) < MAX_LOOKED_AT
                if sequence is None or (sequence is not waiting and sequence not in going_on):
                    continue
            going_on.pop(sequence, None)
            budget = self._add_chunk(sequence, budget, draft)

    def _next_prompt(
        self, going_on: Collection[Sequence], waiting: Sequence | None
    ) -> Sequence | None:
        """Which of the prompts that are being computed goes on, or whether `waiting` starts.

        One that was rewound is first: it holds a row for the sake of a single token.
        """
        rewound = next((each for each in going_on if each.is_rewound), None)
        if rewound is not None:
            return rewound
        if waiting is not None and (not going_on or self._line.is_overdue(waiting)):
            return waiting
        if going_on and self._num_prompt_steps % TURN_BY_ARRIVAL == 0:
            return min(going_on, key=lambda each: (each.admission.is_background, each.ordinal))
        candidates = going_on if waiting is None else (*going_on, waiting)
        return min(candidates, key=self._line.order, default=None)

    def _add_chunk(self, sequence: Sequence, budget: float, draft: StepDraft) -> float:
        """Compute as much of its prompt as the budget allows; returns what is left of that."""
        if sequence.is_rewound:
            draft.add_restart(sequence)
            sequence.is_rewound = False
        first, remaining = sequence.num_computed_tokens, sequence.num_remaining_prefill
        num_tokens = min(remaining, self._attention.num_tokens(first, budget))
        if remaining - num_tokens <= TAIL * num_tokens and remaining <= self._space(draft):
            num_tokens = remaining
        if sequence.sampling.num_prompt_logprobs is not None:
            num_tokens = min(num_tokens, MOST_SCORED)
        is_last = num_tokens == sequence.num_remaining_prefill
        draft.prefill.append(Chunk(sequence=sequence, num_tokens=num_tokens, samples=is_last))
        self._line.charge(sequence.admission.account, num_tokens)
        if is_last:
            self._running.end_prefill(sequence)
        return budget - self._attention.cost(first, num_tokens)

    def _space(self, draft: StepDraft) -> int:
        """Tokens that the step has room for."""
        return self.facts.max_batch_tokens - sum(chunk.num_tokens for chunk in draft.chunks)

    def _advance(self, draft: StepDraft) -> None:
        """Record the submitted step: its tokens count as computed, its samples as on their way."""
        step_id, work = self._next_step_id, StepWork.of(draft)
        self._next_step_id += 1
        for chunk in draft.chunks:
            sequence = chunk.sequence
            sequence.num_computed_tokens += chunk.num_tokens
            if chunk.samples:
                sequence.num_in_flight += 1
                sequence.last_sample_step = step_id
                sequence.is_late = sequence in draft.late
                if sequence.cohort is None:
                    self._cohorts.join(sequence)
        for chunk in draft.prefill:
            self.prefix_cache.name_computed(chunk.sequence)
        self._in_flight.append(StepInFlight.of(draft, step_id=step_id, work=work))
        self._late_rows.expect(step_id, draft)

    def update(self, output: StepOutput) -> TokenEvents:
        """Take in what a step sampled, end the sequences that are complete, and say what is new.

        Steps come back in the order in which they were scheduled.
        """
        step = self._in_flight.popleft()
        assert step.step_id == output.step_id, "steps come back in order"
        if output.stage_spans:
            self._attention.note(step.work, max(span.length_s for span in output.stage_spans))
        return self._take_tokens(step.sampling, output)

    def update_late(self, output: LateOutput) -> TokenEvents:
        """The same of what was sampled late."""
        return self._take_tokens(self._late_rows.take(output.step_id), output)

    def _take_tokens(self, owed: Owed, output: StepOutput | LateOutput) -> TokenEvents:
        assert len(owed) == len(output.token_ids), "one token per sampling row"
        events = EventDraft(output.logprobs)
        served: Counter[str] = Counter()
        for index, (sequence, generation) in enumerate(owed):
            if sequence.generation != generation:  # it ended or was preempted meanwhile
                continue
            token_id = int(output.token_ids[index])
            served[sequence.admission.account] += 1
            if sequence.watched is not None:
                is_text = token_id not in sequence.sampling.stop_token_ids
                newest = events.token(sequence, token_id, index)
                if num_tokens := sequence.watched.take(newest, is_text=is_text):
                    self._running.withdraw(sequence, num_tokens - 1)  # the newest is not known yet
                    if sequence.watched.is_stuck:
                        self._stuck.append(sequence)
                    continue
            events.add(sequence, token_id, self._append_token(sequence, token_id), index)
        for account, num_tokens in served.items():
            self._line.charge(account, num_tokens)
        self.num_generated_tokens += len(events.token_ids)
        return events.build()

    def _append_token(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if not sequence.has_begun:
            sequence.has_begun = True
            self.num_prompt_tokens += sequence.num_prompt_tokens
        sequence.token_ids.append(token_id)
        sequence.num_in_flight -= 1
        if sequence.is_constrained and (token_ids := sequence.take_constrained()):
            self._constrained_tokens.append((sequence, token_ids))
        if (len(sequence.token_ids) - 1) % self.facts.block_size == 0:
            self.prefix_cache.name_computed(sequence)
        if token_id in sequence.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif sequence.num_output_tokens == sequence.sampling.max_tokens:
            reason = FinishReason.LENGTH
        else:
            if sequence.awaits_mask and sequence.num_in_flight > 0:
                self._running.rewind(sequence)
            return None
        self.end(sequence, SequenceStatus.FINISHED)
        return reason

    def check_integrity(self) -> None:
        """Assert that all is held and counted once; for tests and idle moments."""
        self._running.check_integrity()
        self._line.check_integrity(list(self._running))
        self.prefix_cache.check_integrity()
