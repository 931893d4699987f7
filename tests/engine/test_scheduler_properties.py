"""Hypothesis drives the scheduler through random arrivals, aborts, classes and pool sizes."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.constraint import FreeRun
from pipeserve.core.sampler_chain import SamplerChain
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.messages import FinishReason, TokenEvents
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.reserve import MEMORY
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence, SequenceStatus
from tests.engine.watching import BANNED, watch_for, watched_tokens
from tests.fakes import FakeStages, checksum_token, expected_tokens, facts, mask_of, take_by_number

ADMISSIONS = st.builds(
    AdmissionParams,
    priority=st.integers(-1, 1),
    account=st.sampled_from(["", "a", "b"]),
    is_background=st.booleans(),
    cache_salt=st.sampled_from(["", "", "salt"]),
)
POLICIES = st.builds(
    AdmissionPolicy,
    shares_prefixes=st.sampled_from([True, True, True, False]),
    mixes_prefill=st.booleans(),
    max_wait_s=st.sampled_from([1.0, 1000.0]),
)


def allowed_after(token_ids: list[int]) -> list[int]:
    """What a constrained sequence may go on with: a few letters that depend on all before."""
    first = sum(token_ids) % 23
    return [ord("a") + first, ord("a") + first + 2, ord("a") + first + 3]


def run_after(token_ids: list[int]) -> FreeRun | None:
    """Whether a constrained sequence may go on with any tokens instead, and up to which."""
    number = sum(token_ids) % 7
    if number < 4:
        return None
    first = ord("a") + sum(token_ids) % 20
    watched = frozenset(range(first, first + 5))
    return FreeRun(watched=watched, max_tokens={4: None, 5: 1, 6: 4}[number])


class ConstrainedTokens:
    """The tokens that a constrained sequence has alone, asked for one after another."""

    def __init__(self) -> None:
        self._run: FreeRun | None = None
        self._num_free = 0

    def __call__(self, token_ids: list[int], sampling: SamplingParams) -> int:
        token_id = checksum_token(token_ids, sampling)
        if self._run is None:
            self._run, self._num_free = run_after(token_ids), 0
        if self._run is None:
            return take_by_number(token_id, allowed_after(token_ids))
        self._num_free += 1
        if token_id in self._run.watched or self._num_free == self._run.max_tokens:
            self._run = None
        return token_id


def expected_of(sequence: Sequence, banned: tuple[str, ...]) -> list[int]:
    """The tokens that it has alone."""
    if sequence.is_watched:
        expected = watched_tokens(sequence.prompt_token_ids, sequence.sampling, banned)
        assert expected is not None, "little is banned"
        return expected
    next_token = ConstrainedTokens() if sequence.is_constrained else checksum_token
    return expected_tokens(sequence.prompt_token_ids, sequence.sampling, next_token)


class SchedulerMachine(RuleBasedStateMachine):
    """A scheduler on fake stages that progress in any order that a real pipeline could."""

    @initialize(
        num_stages=st.integers(1, 5),
        num_rows=st.integers(1, 6),
        num_blocks=st.integers(4, 24),
        block_size=st.integers(1, 5),
        extra_batch_tokens=st.integers(0, 12),
        num_look_ahead=st.integers(0, 1),
        samples_late=st.booleans(),
        policy=POLICIES,
        expects_short_outputs=st.booleans(),
    )
    def build(
        self,
        num_stages: int,
        num_rows: int,
        num_blocks: int,
        block_size: int,
        extra_batch_tokens: int,
        num_look_ahead: int,
        samples_late: bool,
        policy: AdmissionPolicy,
        expects_short_outputs: bool,
    ) -> None:
        self.facts = facts(
            num_stages=num_stages,
            num_rows=num_rows,
            num_blocks=num_blocks,
            block_size=block_size,
            context_length=num_blocks * block_size,
            max_batch_tokens=num_rows + extra_batch_tokens,
            num_look_ahead=num_look_ahead,
            samples_late=samples_late,
        )
        self.scheduler = Scheduler(self.facts, policy)
        for _ in range(MEMORY if expects_short_outputs else 0):
            self.scheduler.reserve.note_finished(1)
        self.stages = FakeStages(self.facts)
        self.live: dict[int, Sequence] = {}
        self.tokens: dict[int, list[int]] = {}
        self.told: dict[int, int] = {}
        self.banned: dict[int, tuple[str, ...]] = {}
        self.num_submitted = 0
        self.now_s = 0.0

    @rule(data=st.data(), admission=ADMISSIONS)
    def submit(self, data: st.DataObject, admission: AdmissionParams) -> None:
        """Prompts begin alike, so that there is something to share."""
        context = self.facts.context_length
        num_same = data.draw(st.integers(0, context - 1))
        own = data.draw(st.lists(st.integers(0, 255), max_size=context - 1 - num_same))
        prompt = [*(position % 3 for position in range(num_same)), *own] or [0]
        max_tokens = data.draw(st.integers(1, context - len(prompt)))
        stops = data.draw(st.sets(st.integers(ord("a"), ord("z")), max_size=3))
        kind = data.draw(st.sampled_from(["plain", "plain", "constrained", "watched"]))
        sequence = Sequence(
            seq_id=self.num_submitted,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=max_tokens,
                seed=self.num_submitted,
                stop_token_ids=tuple(stops),
                num_prompt_logprobs=data.draw(st.sampled_from([None, None, None, 0])),
                chain=data.draw(st.sampled_from([None, None, SamplerChain(typical_p=0.5)])),
            ),
            admission=admission,
            is_constrained=kind == "constrained",
            is_watched=kind == "watched",
        )
        self.num_submitted += 1
        self.live[sequence.seq_id] = sequence
        self.tokens[sequence.seq_id] = []
        self.told[sequence.seq_id] = 0
        self.banned[sequence.seq_id] = data.draw(st.sampled_from(BANNED))
        self.scheduler.add(sequence)

    @rule(seconds=st.sampled_from([0.1, 2.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now_s += seconds
        self.scheduler.tell_time(self.now_s)

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        status=st.sampled_from([SequenceStatus.ABORTED, SequenceStatus.FINISHED]),
    )
    def end_early(self, data: st.DataObject, status: SequenceStatus) -> None:
        sequence = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.scheduler.end(sequence, status)
        sent = self.tokens[sequence.seq_id]
        expected = expected_of(sequence, self.banned[sequence.seq_id])
        assert sent == expected[: len(sent)]

    @property
    def awaiting(self) -> list[int]:
        return sorted(seq_id for seq_id, each in self.live.items() if each.awaits_mask)

    def tell_mask(self, seq_id: int) -> None:
        sequence = self.live[seq_id]
        mask_W = mask_of(allowed_after(sequence.token_ids), self.facts.vocab_size)
        self.scheduler.allow(sequence, run_after(sequence.token_ids) or mask_W)

    @precondition(lambda self: self.awaiting)
    @rule(data=st.data())
    def find_mask(self, data: st.DataObject) -> None:
        self.tell_mask(data.draw(st.sampled_from(self.awaiting)))

    @property
    def unwatched(self) -> list[int]:
        return sorted(i for i, each in self.live.items() if each.is_watched and not each.watched)

    def give_watch(self, seq_id: int) -> None:
        self.scheduler.watch(self.live[seq_id], watch_for(*self.banned[seq_id]))

    @precondition(lambda self: self.unwatched)
    @rule(data=st.data())
    def make_watch(self, data: st.DataObject) -> None:
        self.give_watch(data.draw(st.sampled_from(self.unwatched)))

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
        late_first = data.draw(st.booleans())
        self.run_stage(data.draw(st.sampled_from(self.stages.ready_stages)), late_first=late_first)

    def run_stage(self, index: int, *, late_first: bool = False) -> None:
        """late_first: late tokens may overtake the step's others on the way to the engine."""
        output = self.stages.advance(index)
        while late_first and self.stages.num_late:
            self.take_late()
        if output is not None:
            self.tell(self.scheduler.update(output))

    @precondition(lambda self: self.stages.num_late)
    @rule()
    def take_late(self) -> None:
        self.tell(self.scheduler.update_late(self.stages.take_late()))

    def tell(self, events: TokenEvents) -> None:
        for sequence, token_ids in self.scheduler.take_constrained_tokens():
            assert sequence.awaits_mask, "a mask is wanted for whom one is missing"
            assert sequence.token_ids[-len(token_ids) :] == list(token_ids)
            self.told[sequence.seq_id] += len(token_ids)
            assert self.told[sequence.seq_id] == sequence.num_output_tokens, "all are told, once"
        for seq_id, token_id, reason in zip(
            events.seq_ids, events.token_ids, events.finish_reasons, strict=True
        ):
            self.tokens[seq_id].append(token_id)
            if reason is not None:
                self.check_complete(self.live.pop(seq_id), reason)

    def check_complete(self, sequence: Sequence, reason: FinishReason) -> None:
        expected = expected_of(sequence, self.banned[sequence.seq_id])
        assert self.tokens[sequence.seq_id] == expected
        is_stop = expected[-1] in sequence.sampling.stop_token_ids
        assert reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH)

    @invariant()
    def nothing_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    @invariant()
    def nothing_shared_wrongly(self) -> None:
        running = [s for s in getattr(self, "live", {}).values() if s.row is not None]
        size = self.facts.block_size if running else 0
        for one, other in itertools.combinations(running, 2):
            for column, (left, right) in enumerate(zip(one.block_table, other.block_table)):  # noqa: B905
                if left == right:
                    assert one.admission.cache_salt == other.admission.cache_salt
                    end = (column + 1) * size
                    assert one.token_ids[:end] == other.token_ids[:end]
                    assert min(len(one.token_ids), len(other.token_ids)) >= end
        for sequence in running:
            scores = sequence.sampling.num_prompt_logprobs is not None
            if scores or not self.scheduler.policy.shares_prefixes:
                assert sequence.num_cached_tokens == 0

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while self.live or self.scheduler.is_owed:
            for seq_id in self.awaiting:
                self.tell_mask(seq_id)
            for seq_id in self.unwatched:
                self.give_watch(seq_id)
            while (batch := self.scheduler.schedule()) is not None:
                self.stages.submit(batch)
            ready = self.stages.ready_stages
            is_late = self.stages.num_late > 0
            assert ready or is_late or not self.live, "sequences wait but nothing runs"
            for index in ready:
                self.run_stage(index)
            while is_late and self.stages.num_late:
                self.take_late()
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
