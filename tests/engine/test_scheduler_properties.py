"""Hypothesis drives scheduler and block pool through random arrivals, aborts and pool sizes."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.messages import FinishReason
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence, SequenceStatus
from tests.fakes import FakeStages, expected_tokens, facts


class SchedulerMachine(RuleBasedStateMachine):
    """A scheduler on fake stages that progress in any order that a real pipeline could."""

    @initialize(
        num_stages=st.integers(1, 5),
        num_rows=st.integers(1, 6),
        num_blocks=st.integers(4, 24),
        block_size=st.integers(1, 5),
        extra_batch_tokens=st.integers(0, 12),
        num_look_ahead=st.integers(0, 1),
    )
    def build(
        self,
        num_stages: int,
        num_rows: int,
        num_blocks: int,
        block_size: int,
        extra_batch_tokens: int,
        num_look_ahead: int,
    ) -> None:
        self.facts = facts(
            num_stages=num_stages,
            num_rows=num_rows,
            num_blocks=num_blocks,
            block_size=block_size,
            context_length=num_blocks * block_size,
            max_batch_tokens=num_rows + extra_batch_tokens,
            num_look_ahead=num_look_ahead,
        )
        self.scheduler = Scheduler(self.facts)
        self.stages = FakeStages(self.facts)
        self.live: dict[int, Sequence] = {}
        self.tokens: dict[int, list[int]] = {}
        self.num_submitted = 0

    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        context = self.facts.context_length
        prompt = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=context - 1))
        max_tokens = data.draw(st.integers(1, context - len(prompt)))
        stops = data.draw(st.sets(st.integers(ord("a"), ord("z")), max_size=3))
        sequence = Sequence(
            seq_id=self.num_submitted,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=max_tokens, seed=self.num_submitted, stop_token_ids=tuple(stops)
            ),
        )
        self.num_submitted += 1
        self.live[sequence.seq_id] = sequence
        self.tokens[sequence.seq_id] = []
        self.scheduler.add(sequence)

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        status=st.sampled_from([SequenceStatus.ABORTED, SequenceStatus.FINISHED]),
    )
    def end_early(self, data: st.DataObject, status: SequenceStatus) -> None:
        sequence = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.scheduler.end(sequence, status)
        sent = self.tokens[sequence.seq_id]
        expected = expected_tokens(sequence.prompt_token_ids, sequence.sampling)
        assert sent == expected[: len(sent)]

    @rule(count=st.integers(1, 4))
    def schedule(self, count: int) -> None:
        for _ in range(count):
            batch = self.scheduler.schedule()
            if batch is None:
                return
            self.stages.submit(batch)

    @precondition(lambda self: self.stages.ready_stages)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        self.run_stage(data.draw(st.sampled_from(self.stages.ready_stages)))

    def run_stage(self, index: int) -> None:
        output = self.stages.advance(index)
        if output is None:
            return
        events = self.scheduler.update(output)
        for seq_id, token_id, reason in zip(
            events.seq_ids, events.token_ids, events.finish_reasons, strict=True
        ):
            self.tokens[seq_id].append(token_id)
            if reason is not None:
                self.check_complete(self.live.pop(seq_id), reason)

    def check_complete(self, sequence: Sequence, reason: FinishReason) -> None:
        expected = expected_tokens(sequence.prompt_token_ids, sequence.sampling)
        assert self.tokens[sequence.seq_id] == expected
        is_stop = expected[-1] in sequence.sampling.stop_token_ids
        assert reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH)

    @invariant()
    def nothing_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.live or self.scheduler.has_steps_in_flight:
            while (batch := self.scheduler.schedule()) is not None:
                self.stages.submit(batch)
            ready = self.stages.ready_stages
            assert ready or not self.live, "sequences wait but nothing runs"
            for index in ready:
                self.run_stage(index)
        assert self.scheduler.pool.num_free == self.facts.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    # A failing run is printed as it was found: making it shorter can take many minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestScheduler = SchedulerMachine.TestCase
