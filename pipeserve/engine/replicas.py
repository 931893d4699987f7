"""ReplicaRouter: presents several engines that serve one model to EngineClient as one.

Runs on the event loop, but knows no asyncio: messages in, messages out. Must not know where the
engines live or who starts them again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeserve.core.batch import PipelineFacts
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    EngineMessage,
    Finish,
    FrontMessage,
    GetStats,
    ReplicasChanged,
    RouterMessage,
    SequencesFailed,
    Shutdown,
    StatsReply,
    Submit,
    TokenEvents,
)
from pipeserve.engine.prefix_memory import PrefixMemory, hash_blocks
from pipeserve.engine.stats import EngineStats, total_stats

Post = Callable[[FrontMessage], None]

FIRST_GUESS = 128
"""Output tokens that a sequence is expected to have before any has ended."""
GUESS_MEMORY = 0.95
"""Weight of what was expected so far against the sequence that ended last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An engine that takes sequences."""

    facts: PipelineFacts
    post: Post
    """Takes a message to it."""


@dataclass(slots=True, kw_only=True)
class _Placed:
    """A sequence on a replica."""

    replica: _Replica
    num_prompt_tokens: int
    expected_output: int
    num_generated: int = 0

    @property
    def work(self) -> int:
        """Tokens that are still to be computed, as far as can be known."""
        num_prompt = self.num_prompt_tokens if self.num_generated == 0 else 0
        return num_prompt + max(0, self.expected_output - self.num_generated)


class _Replica:
    """One engine over its lives."""

    def __init__(self, index: int, member: Member) -> None:
        self.index = index
        self.failure: str | None = None
        """Why it takes no sequences; None while it lives."""
        self.last_turn = 0
        """When it was last given a sequence, in sequences."""
        self.past = EngineStats.of_nothing(member.facts.num_stages)
        """Counters of earlier lives."""
        self.begin(member)

    def begin(self, member: Member) -> None:
        """A life."""
        facts = member.facts
        self.member = member
        self.failure = None
        self.seq_ids: dict[int, None] = {}
        self.work = 0
        """Of all its sequences."""
        self.num_held = 0
        """Tokens of all its sequences that are known."""
        self.memory = PrefixMemory(facts.num_blocks)
        self.latest = replace(
            EngineStats.of_nothing(facts.num_stages),
            num_blocks=facts.num_blocks,
            num_free_blocks=facts.num_blocks,
        )

    def end(self, failure: str) -> None:
        self.failure = failure
        self.past = self.latest.with_past(self.past)
        self.latest = EngineStats.of_nothing(self.member.facts.num_stages)

    @property
    def is_live(self) -> bool:
        return self.failure is None

    @property
    def stats(self) -> EngineStats:
        """As of its latest answer."""
        return replace(self.latest.with_past(self.past), num_live_replicas=int(self.is_live))

    def has_room(self, num_prompt_tokens: int) -> bool:
        """Whether its scheduler would admit a further sequence at once: a row is free, and KV
        blocks of all known tokens with one in reserve for each sequence."""
        facts, num_seqs = self.member.facts, len(self.seq_ids)
        if num_seqs == 0:
            return True  # it holds any single one
        num_partial = 2 * (num_seqs + 1) * facts.block_size  # the last block, and the reserve
        num_tokens = self.num_held + num_prompt_tokens + num_partial
        return num_seqs < facts.num_rows and num_tokens <= facts.num_blocks * facts.block_size


class ReplicaRouter:
    """One first-come queue before the replicas.

    A sequence goes to a replica with room: to the one with the least work, where a prompt prefix
    that a replica was lately given counts as computed. While none has room, sequences wait here,
    so that whichever has room first takes the next. A sole replica is given everything at once.

    deliver: takes messages to the front half; called from within the methods.
    """

    def __init__(
        self, members: Sequence[Member], *, deliver: Callable[[RouterMessage], None]
    ) -> None:
        self._replicas = [_Replica(index, member) for index, member in enumerate(members)]
        self._deliver = deliver
        self._is_sole = len(members) == 1
        self._block_size = members[0].facts.block_size
        self._waiting: OrderedDict[int, Submit] = OrderedDict()
        self._placed: dict[int, _Placed] = {}
        self._num_turns = 0
        self._mean_output = float(FIRST_GUESS)
        self._asked: dict[int, set[int]] = {}
        """Reply id -> replicas that have not answered."""

    @property
    def num_waiting(self) -> int:
        """Sequences that no replica has yet."""
        return len(self._waiting)

    @property
    def num_live(self) -> int:
        """Replicas that take sequences."""
        return sum(each.is_live for each in self._replicas)

    def post(self, message: FrontMessage) -> None:
        """Take a message from the front half."""
        match message:
            case Submit():
                self._waiting[message.seq_id] = message
                self._place_waiting()
            case Finish() | Abort():
                self._end(message)
            case GetStats():
                self._ask(message)
            case Shutdown():
                self._waiting.clear()
                for replica in self._replicas:
                    if replica.is_live:
                        replica.member.post(message)

    def take(self, index: int, message: EngineMessage) -> None:
        """Take a message from a replica, in its present life."""
        replica = self._replicas[index]
        if not replica.is_live:
            return
        match message:
            case TokenEvents():
                self._count(message)
                self._place_waiting()
                self._deliver(message)
            case StatsReply():
                replica.latest = message.stats
                self._note_answer(index, message.reply_id)
            case EngineFailed():
                self._lose(replica, message)

    def rejoin(self, index: int, member: Member) -> None:
        """A replica that failed takes sequences again."""
        replica = self._replicas[index]
        assert not replica.is_live, "it failed before"
        replica.begin(member)
        self._tell_change()
        self._place_waiting()

    def _place_waiting(self) -> None:
        while self._waiting:
            submit = next(iter(self._waiting.values()))
            num_prompt_tokens = len(submit.prompt_token_ids)
            free = [
                each
                for each in self._replicas
                if each.is_live and (self._is_sole or each.has_room(num_prompt_tokens))
            ]
            if not free:
                return
            del self._waiting[submit.seq_id]
            self._place(submit, free)

    def _place(self, submit: Submit, free: Sequence[_Replica]) -> None:
        hashes: Sequence[int] = ()
        if not self._is_sole:
            hashes = hash_blocks(submit.prompt_token_ids, self._block_size)

        def cost(replica: _Replica) -> tuple[int, int]:
            num_known = replica.memory.num_known(hashes) * self._block_size
            return replica.work - num_known, replica.last_turn

        replica = min(free, key=cost)
        placed = _Placed(
            replica=replica,
            num_prompt_tokens=len(submit.prompt_token_ids),
            expected_output=min(submit.sampling.max_tokens, round(self._mean_output)),
        )
        self._placed[submit.seq_id] = placed
        self._num_turns += 1
        replica.last_turn = self._num_turns
        replica.seq_ids[submit.seq_id] = None
        replica.work += placed.work
        replica.num_held += placed.num_prompt_tokens
        replica.memory.remember(hashes)
        replica.member.post(submit)

    def _end(self, message: Finish | Abort) -> None:
        if self._waiting.pop(message.seq_id, None) is not None:
            self._place_waiting()  # the next may fit where it did not
            return
        placed = self._forget(message.seq_id)
        if placed is None:  # its last token crossed this message
            return
        if isinstance(message, Finish):
            self._note_length(placed.num_generated)
        placed.replica.member.post(message)
        self._place_waiting()  # behind that message in the replica's inbox

    def _forget(self, seq_id: int) -> _Placed | None:
        placed = self._placed.pop(seq_id, None)
        if placed is not None:
            replica = placed.replica
            del replica.seq_ids[seq_id]
            replica.work -= placed.work
            replica.num_held -= placed.num_prompt_tokens + placed.num_generated
        return placed

    def _count(self, events: TokenEvents) -> None:
        for seq_id, finish_reason in zip(events.seq_ids, events.finish_reasons, strict=True):
            placed = self._placed.get(seq_id)
            if placed is None:  # ended by the front half after the engine sent this
                continue
            work = placed.work
            placed.num_generated += 1
            placed.replica.work += placed.work - work
            placed.replica.num_held += 1
            if finish_reason is not None:
                self._forget(seq_id)
                self._note_length(placed.num_generated)

    def _note_length(self, num_generated: int) -> None:
        self._mean_output += (1.0 - GUESS_MEMORY) * (num_generated - self._mean_output)

    def _ask(self, message: GetStats) -> None:
        live = [each for each in self._replicas if each.is_live]
        self._asked[message.reply_id] = {each.index for each in live}
        for replica in live:
            replica.member.post(message)

    def _note_answer(self, index: int, reply_id: int) -> None:
        unanswered = self._asked.get(reply_id)
        if unanswered is None:  # asked by whoever watches over this replica
            return
        unanswered.discard(index)
        if unanswered:
            return
        del self._asked[reply_id]
        stats = total_stats([each.stats for each in self._replicas])
        stats = replace(stats, num_waiting=stats.num_waiting + len(self._waiting))
        self._deliver(StatsReply(reply_id=reply_id, stats=stats))

    def _lose(self, replica: _Replica, message: EngineFailed) -> None:
        replica.end(message.error)
        lost = tuple(replica.seq_ids)
        for seq_id in lost:
            self._forget(seq_id)
        if self.num_live == 0:
            self._deliver(message if self._is_sole else _of_the_last(replica, message))
            return
        error = f"replica {replica.index}: {message.error}"
        self._deliver(SequencesFailed(seq_ids=lost, cause=replace(message, error=error)))
        self._tell_change()
        for reply_id in list(self._asked):
            self._note_answer(replica.index, reply_id)

    def _tell_change(self) -> None:
        failures = [
            f"replica {each.index} is gone ({each.failure})"
            for each in self._replicas
            if each.failure is not None
        ]
        count = f"{self.num_live} of {len(self._replicas)} replicas take requests"
        degradation = f"{count}: {'; '.join(failures)}" if failures else None
        self._deliver(ReplicasChanged(degradation=degradation))


def _of_the_last(replica: _Replica, message: EngineFailed) -> EngineFailed:
    return replace(message, error=f"no replica is left; replica {replica.index}: {message.error}")


def merge_facts(replicas: Sequence[PipelineFacts]) -> PipelineFacts:
    """What holds for all replicas together: every sequence fits every replica, and their rows, KV
    blocks and stages add up."""
    first = replicas[0]
    return PipelineFacts(
        num_stages=sum(each.num_stages for each in replicas),
        num_rows=sum(each.num_rows for each in replicas),
        num_blocks=sum(each.num_blocks for each in replicas),
        block_size=first.block_size,
        context_length=min(each.context_length for each in replicas),
        max_batch_tokens=min(each.max_batch_tokens for each in replicas),
        num_look_ahead=first.num_look_ahead,
        vocab_size=first.vocab_size,
    )
