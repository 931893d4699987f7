"""The router before the replicas: each sequence goes once, in order, to one with room, and deaths
take only their own sequences with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.block_hashes import hash_blocks
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    Finish,
    FinishReason,
    FrontMessage,
    GetStats,
    GrammarFailed,
    ReplicasChanged,
    RouterMessage,
    SequencesFailed,
    SequenceTimes,
    SetLogLevel,
    Shutdown,
    StatsReply,
    Submit,
    TokenEvents,
    TraceMark,
)
from pipeserve.engine.prefix_memory import PrefixMemory
from pipeserve.engine.replicas import Member, ReplicaRouter, merge_facts
from pipeserve.engine.stats import EngineStats, total_stats
from tests.fakes import facts

NUM_STAGES = 2

Message = TypeVar("Message")


@dataclass
class FakeReplica:
    """An engine that does what it is told at once, and a token per sequence when it is stepped."""

    facts: PipelineFacts
    index: int
    placed: list[tuple[int, int]]
    """(sequence, replica) of every Submit to any replica, in order; shared."""
    owed: dict[int, int] = field(default_factory=dict)
    """Sequence -> tokens until its end."""
    ended_late: list[int] = field(default_factory=list)
    """Sequences whose next token was on its way when they were ended."""
    asked: list[int] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    num_generated: int = 0
    is_dead: bool = False
    is_shut_down: bool = False
    log_level: str | None = None

    def post(self, message: FrontMessage) -> None:
        assert not self.is_dead, "nothing is sent to the dead"
        match message:
            case Submit():
                self.placed.append((message.seq_id, self.index))
                self.prompts.append(message.prompt_token_ids)
                self.owed[message.seq_id] = message.sampling.max_tokens
            case Finish(seq_id=seq_id) | Abort(seq_id=seq_id):
                del self.owed[seq_id]
                self.ended_late.append(seq_id)
            case GetStats(reply_id=reply_id):
                self.asked.append(reply_id)
            case SetLogLevel(level=level):
                self.log_level = level
            case Shutdown():
                self.is_shut_down = True

    def step(self) -> TokenEvents:
        """A token for every sequence, the last one for those that owe no more."""
        seq_ids = [*self.ended_late, *self.owed]
        self.ended_late.clear()
        self.owed = {seq_id: count - 1 for seq_id, count in self.owed.items()}
        reasons = [FinishReason.LENGTH if self.owed.get(each) == 0 else None for each in seq_ids]
        self.owed = {seq_id: count for seq_id, count in self.owed.items() if count}
        self.num_generated += len(seq_ids)
        return TokenEvents(
            seq_ids=tuple(seq_ids),
            token_ids=(1,) * len(seq_ids),
            finish_reasons=tuple(reasons),
            logprobs=(None,) * len(seq_ids),
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=0,
            num_running=len(self.owed),
            num_blocks=self.facts.num_blocks,
            num_free_blocks=self.facts.num_blocks - len(self.owed),
            num_steps=0,
            num_prompt_tokens=0,
            num_generated_tokens=self.num_generated,
            num_preemptions=0,
            stage_busy_s=(float(self.num_generated),) * NUM_STAGES,
            uptime_s=1.0,
        )


class Front:
    """Replicas, the router before them, and what it delivers."""

    def __init__(self, *num_rows: int, **changes: int) -> None:
        self.placed: list[tuple[int, int]] = []
        self.replicas = [
            FakeReplica(
                facts=facts(
                    num_stages=NUM_STAGES, num_rows=rows, **{"num_blocks": 4096, **changes}
                ),
                index=index,
                placed=self.placed,
            )
            for index, rows in enumerate(num_rows)
        ]
        self.delivered: list[RouterMessage] = []
        members = [Member(facts=each.facts, post=each.post) for each in self.replicas]
        self.router = ReplicaRouter(members, deliver=self.delivered.append)

    def submit(
        self, seq_id: int, prompt: Iterable[int] = (1,), max_tokens: int = 4, **admission: object
    ) -> None:
        self.router.post(
            Submit(
                seq_id=seq_id,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=max_tokens, seed=0),
                admission=AdmissionParams(**admission),  # type: ignore[arg-type]
            )
        )

    def step(self, index: int) -> None:
        self.router.take(index, self.replicas[index].step())

    def answer(self, index: int) -> None:
        """The oldest question."""
        replica = self.replicas[index]
        message = StatsReply(reply_id=replica.asked.pop(0), stats=replica.stats())
        self.router.take(index, message)

    def kill(self, index: int) -> None:
        self.replicas[index].is_dead = True
        self.router.take(index, EngineFailed(error="told to die", stalled=False))

    def revive(self, index: int) -> FakeReplica:
        replica = FakeReplica(facts=self.replicas[index].facts, index=index, placed=self.placed)
        self.replicas[index] = replica
        self.router.rejoin(index, Member(facts=replica.facts, post=replica.post))
        return replica

    def of_kind(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.delivered if isinstance(message, kind)]


class RouterMachine(RuleBasedStateMachine):
    """Random arrivals, steps, ends, questions, deaths and returns."""

    @initialize(num_rows=st.lists(st.integers(1, 4), min_size=2, max_size=4))
    def build(self, num_rows: list[int]) -> None:
        self.front = Front(*num_rows)
        self.num_submitted = 0
        self.num_asked = 0
        self.ended: set[int] = set()
        """By the front half, before or after they were placed."""
        self.last_total = 0

    @property
    def is_over(self) -> bool:
        return all(replica.is_dead for replica in self.front.replicas)

    def living(self) -> list[int]:
        return [each.index for each in self.front.replicas if not each.is_dead]

    @precondition(lambda self: not self.is_over)
    @rule(num_prompt=st.integers(1, 20), start=st.integers(0, 2), max_tokens=st.integers(1, 5))
    def submit(self, num_prompt: int, start: int, max_tokens: int) -> None:
        self.front.submit(self.num_submitted, range(start, start + num_prompt), max_tokens)
        self.num_submitted += 1

    @precondition(lambda self: not self.is_over)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.front.step(data.draw(st.sampled_from(self.living())))

    @rule(data=st.data(), finishes=st.booleans())
    def end(self, data: st.DataObject, finishes: bool) -> None:
        """Any sequence: waiting, running or long gone."""
        if not self.num_submitted:
            return
        seq_id = data.draw(st.integers(0, self.num_submitted - 1))
        self.ended.add(seq_id)
        kind = Finish if finishes else Abort
        self.front.router.post(kind(seq_id=seq_id))
        assert all(seq_id not in replica.owed for replica in self.front.replicas)

    @precondition(lambda self: not self.is_over)
    @rule()
    def ask(self) -> None:
        self.front.router.post(GetStats(reply_id=self.num_asked))
        self.num_asked += 1

    @precondition(lambda self: any(each.asked for each in self.front.replicas if not each.is_dead))
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        replicas = self.front.replicas
        index = data.draw(st.sampled_from([i for i in self.living() if replicas[i].asked]))
        self.front.answer(index)

    @precondition(lambda self: not self.is_over)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(self.living()))
        replica = self.front.replicas[index]
        lost = set(replica.owed)
        replica.owed.clear()
        self.front.delivered.clear()
        self.front.kill(index)
        if self.is_over:
            (failure,) = self.front.delivered
            assert isinstance(failure, EngineFailed)
            assert "no replica is left" in failure.error
            return
        (losses,) = self.front.of_kind(SequencesFailed)
        assert set(losses.seq_ids) == lost
        assert f"replica {index}: told to die" in losses.cause.error
        (change,) = self.front.of_kind(ReplicasChanged)
        assert change.degradation is not None

    @precondition(lambda self: not self.is_over and len(self.living()) < len(self.front.replicas))
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        dead = [each.index for each in self.front.replicas if each.is_dead]
        self.front.revive(data.draw(st.sampled_from(dead)))
        change = self.front.of_kind(ReplicasChanged)[-1]
        assert (change.degradation is None) == (len(dead) == 1)

    @invariant()
    def each_goes_once_and_in_order(self) -> None:
        seq_ids = [seq_id for seq_id, _ in self.front.placed]
        assert seq_ids == sorted(set(seq_ids))

    @invariant()
    def none_is_forgotten(self) -> None:
        placed = {seq_id for seq_id, _ in self.front.placed}
        waiting = set(range(self.num_submitted)) - placed - self.ended
        assert self.front.router.num_waiting == len(waiting)
        assert not waiting or min(waiting) > max(placed, default=-1)

    @invariant()
    def rows_are_filled_and_not_overfilled(self) -> None:
        living = [each for each in self.front.replicas if not each.is_dead]
        assert all(len(each.owed) <= each.facts.num_rows for each in living)
        if self.front.router.num_waiting and not self.is_over:
            assert all(len(each.owed) == each.facts.num_rows for each in living)

    @invariant()
    def stats_add_up(self) -> None:
        for reply in self.front.of_kind(StatsReply):
            stats = reply.stats
            assert stats.num_replicas == len(self.front.replicas)
            assert stats.num_live_replicas == len(self.living())
            assert stats.num_generated_tokens >= self.last_total  # also after a death
            busy_s = stats.stage_busy_s
            assert sum(busy_s) == NUM_STAGES * stats.num_generated_tokens
            self.last_total = stats.num_generated_tokens
        self.front.delivered.clear()


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_a_sole_replica_gets_everything_at_once() -> None:
    front = Front(2)
    for seq_id in range(9):
        front.submit(seq_id)
    assert front.router.num_waiting == 0
    assert len(front.replicas[0].owed) == 9
    front.kill(0)
    assert front.delivered == [EngineFailed(error="told to die", stalled=False)]


def test_the_replica_with_the_least_work_is_taken() -> None:
    front = Front(8, 8, num_blocks=4096)
    front.submit(0, range(100), max_tokens=1)
    front.submit(1, range(1000, 1030), max_tokens=1)
    for seq_id in (2, 3):  # 30 and 10 tokens are less than 100
        front.submit(seq_id, range(2000, 2010), max_tokens=1)
    assert front.placed == [(0, 0), (1, 1), (2, 1), (3, 1)]
    front.step(0)  # its prompt is computed, and the sequence at its end
    front.submit(4, range(3000, 3010), max_tokens=1)
    assert front.placed[-1] == (4, 0)


def test_work_counts_the_output_that_is_expected() -> None:
    front = Front(8, 8)
    front.submit(0, max_tokens=50)
    front.submit(1, max_tokens=20)
    front.submit(2, max_tokens=1)
    front.submit(3, max_tokens=1)
    assert [replica for _, replica in front.placed] == [0, 1, 1, 1]


def test_a_known_prefix_outweighs_as_much_work() -> None:
    front = Front(8, 8)
    shared = list(range(64))
    front.submit(0, shared, max_tokens=1)
    front.step(0)
    front.submit(1, range(500, 540), max_tokens=1)  # the other's turn
    assert front.placed[-1] == (1, 1)
    front.step(1)
    front.submit(2, [*shared, 7], max_tokens=1)
    assert front.placed[-1] == (2, 0)
    front.submit(3, [*shared, 8], max_tokens=1)  # 66 tokens of work, 64 known: the other is free
    assert front.placed[-1] == (3, 1)
    front.kill(0)
    front.revive(0)
    front.step(1)
    front.submit(4, [*shared, 9], max_tokens=1)  # the one that came back has forgotten
    assert front.placed[-1] == (4, 1)


def test_a_replica_whose_kv_cache_is_full_has_no_room() -> None:
    front = Front(8, 8, num_blocks=16, block_size=4, context_length=64)
    for seq_id in range(2):
        front.submit(seq_id, range(40), max_tokens=24)
    front.submit(2, range(10), max_tokens=1)  # 40 + 10 and 2 x 2 blocks are more than 64 tokens
    front.submit(3, range(2), max_tokens=1)  # does not overtake it
    assert front.router.num_waiting == 2
    front.router.post(Abort(seq_id=2))
    assert front.placed[-1][0] == 3
    front.submit(4, range(40), max_tokens=1)
    front.router.post(Abort(seq_id=1))
    assert front.placed[-1] == (4, 1)


def test_the_stalled_are_told_apart_and_the_late_ignored() -> None:
    front = Front(1, 1)
    front.submit(0)
    late = front.replicas[0].step()
    front.router.take(0, EngineFailed(error="silent", stalled=True))
    (losses,) = front.of_kind(SequencesFailed)
    assert losses.cause.stalled
    front.router.take(0, late)
    front.router.take(0, EngineFailed(error="and gone", stalled=False))
    assert front.of_kind(SequencesFailed) == [losses]
    assert front.of_kind(TokenEvents) == []


def test_a_shutdown_reaches_every_replica_and_empties_the_queue() -> None:
    front = Front(1, 1)
    for seq_id in range(5):
        front.submit(seq_id)
    front.router.post(Shutdown())
    assert all(replica.is_shut_down for replica in front.replicas)
    front.step(0)
    assert (front.router.num_waiting, len(front.placed)) == (0, 2)


def test_questions_are_answered_for_all_and_without_the_dead() -> None:
    front = Front(1, 1)
    for seq_id in range(3):
        front.submit(seq_id)
    for reply_id in range(2):
        front.router.post(GetStats(reply_id=reply_id))
    front.answer(0)
    assert front.of_kind(StatsReply) == []
    front.answer(1)
    (reply,) = front.of_kind(StatsReply)
    assert (reply.reply_id, reply.stats.num_running, reply.stats.num_waiting) == (0, 2, 1)
    front.answer(1)
    front.kill(0)
    reply = front.of_kind(StatsReply)[-1]
    assert (reply.reply_id, reply.stats.num_running, reply.stats.num_waiting) == (1, 1, 1)
    assert reply.stats.num_blocks == front.replicas[1].facts.num_blocks
    assert len(reply.stats.stage_busy_s) == 2 * NUM_STAGES


def test_facts_hold_for_all_replicas() -> None:
    merged = merge_facts(
        [facts(num_rows=8, context_length=128), facts(num_rows=3, context_length=96, num_blocks=9)]
    )
    assert merged == facts(num_stages=4, num_rows=11, num_blocks=73, context_length=96)


def test_stats_of_stages_stand_in_the_order_of_replicas() -> None:
    one = EngineStats.of_nothing(2)
    total = total_stats([one, one.with_past(one)])
    assert (total.num_replicas, total.stages_per_replica) == (2, 2)


def test_the_memory_keeps_what_was_used_last_and_starts_longer_than_ends() -> None:
    memory = PrefixMemory(4)
    old, new = hash_blocks(range(12), 4), hash_blocks(range(100, 108), 4)
    memory.remember(old)
    memory.remember(new)
    assert (len(memory), memory.num_known(old), memory.num_known(new)) == (4, 2, 2)


def test_interactive_sequences_do_not_wait_for_those_in_the_background() -> None:
    front = Front(2, 2)
    for seq_id in range(8):
        front.submit(seq_id, is_background=True)
    assert front.router.num_waiting == 4
    for seq_id in range(10, 15):
        front.submit(seq_id)
    assert [seq_id for seq_id, _ in front.placed[4:]] == [10, 11, 12, 13]
    assert sorted(index for _, index in front.placed[4:]) == [0, 0, 1, 1]
    for _ in range(4):
        front.step(0)
        front.step(1)
    assert front.placed[8][0] == 14


def test_the_first_sequence_of_a_key_does_not_wait_for_those_of_others() -> None:
    """The replica's scheduler makes way for it."""
    front = Front(2, 2)
    for seq_id in range(20):
        front.submit(seq_id, account="bulk")
    assert front.router.num_waiting == 16
    front.submit(100, account="chat")
    front.submit(101, account="chat")
    assert front.placed[-1][0] == 100
    assert front.router.num_waiting == 17
    for _ in range(4):
        front.step(0)
        front.step(1)
    assert 101 in [seq_id for seq_id, _ in front.placed[5:7]]


def test_lower_priorities_leave_the_line_first() -> None:
    front = Front(1, 1)
    for seq_id, priority in enumerate([0, 0, 3, 1, 2]):
        front.submit(seq_id, priority=priority)
    for _ in range(8):
        front.step(0)
        front.step(1)
    assert [seq_id for seq_id, _ in front.placed] == [0, 1, 3, 4, 2]


def test_a_grammar_that_fails_frees_its_place_on_the_replica() -> None:
    front = Front(1, 1)
    for seq_id in range(3):
        front.submit(seq_id)
    assert front.router.num_waiting == 1
    failed = GrammarFailed(seq_id=0, error="too complex")
    index = dict(front.placed)[0]
    del front.replicas[index].owed[0]
    front.router.take(index, failed)
    assert front.delivered[-1] == failed
    assert front.router.num_waiting == 0
    assert front.placed[-1] == (2, index)


def test_a_new_log_level_reaches_replicas_that_come_back() -> None:
    front = Front(1, 1)
    front.kill(1)
    front.router.post(SetLogLevel(level="debug"))
    assert front.replicas[0].log_level == "debug"
    assert front.revive(1).log_level == "debug"


def test_times_of_marked_sequences_are_told_also_where_no_replica_had_them() -> None:
    front = Front(1, 1)
    marks = [TraceMark(parent="00-1-2-01", choice=choice, submitted_s=0.0) for choice in range(2)]
    for seq_id in range(3):
        front.submit(seq_id)
    submit = Submit(
        seq_id=3,
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=4, seed=0),
        mark=marks[0],
    )
    front.router.post(submit)
    assert front.router.num_waiting == 2
    front.router.post(Abort(seq_id=3))
    (times,) = front.of_kind(SequenceTimes)
    assert (times.mark, times.prefill, times.decode) == (marks[0], (), ())
    front.router.take(1, SequenceTimes(mark=marks[1], ended_s=1.0))
    assert front.of_kind(SequenceTimes)[1] == SequenceTimes(mark=marks[1], ended_s=1.0, replica=1)
