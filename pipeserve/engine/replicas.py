"""ReplicaRouter: presents several engines that serve one model to EngineClient as one.

Runs on the event loop, but knows no asyncio: messages in, messages out. Must not know where the
engines live or who starts them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from pipeserve.core.batch import PipelineFacts, PromptLogprobs
from pipeserve.engine.block_hashes import hash_blocks
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    EngineMessage,
    Finish,
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
)
from pipeserve.engine.prefix_memory import MAX_BLOCKS, PrefixMemory
from pipeserve.engine.sequence import Sequence
from pipeserve.engine.stats import EngineStats, total_stats
from pipeserve.engine.waiting_line import WaitingLine

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
    sequence: Sequence
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
        self.background: set[int] = set()
        """Those of the background class."""
        self.work = 0
        """Of all its sequences."""
        self.num_held = 0
        """Tokens of all its sequences that are known."""
        self.num_held_in_background = 0
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

    def has_room(self, sequence: Sequence) -> bool:
        """Whether its scheduler would admit a further sequence at once: a row is free, and KV
        blocks of all known tokens with one in reserve for each sequence. To an interactive one
        those in the background give way."""
        facts, num_seqs, num_held = self.member.facts, len(self.seq_ids), self.num_held
        if not sequence.admission.is_background:
            num_seqs -= len(self.background)
            num_held -= self.num_held_in_background
        if num_seqs == 0:
            return True  # it holds any single one
        num_partial = 2 * (num_seqs + 1) * facts.block_size  # the last block, and the reserve
        num_tokens = num_held + sequence.num_prompt_tokens + num_partial
        return num_seqs < facts.num_rows and num_tokens <= facts.num_blocks * facts.block_size

    def hold(self, sequence: Sequence, num_tokens: int) -> None:
        """So many more of its tokens are known, or fewer."""
        self.num_held += num_tokens
        if sequence.admission.is_background:
            self.num_held_in_background += num_tokens


class ReplicaRouter:
    """One waiting line before the replicas.

    A sequence goes to a replica with room: to the one with the least work, where a prompt prefix
    that a replica was lately given counts as computed. While none has room, sequences wait here,
    so that whichever has room first takes the next. The first of an account, and one that has
    waited too long, does not wait for room: a replica's own scheduler makes way for it. A sole
    replica is given everything at once.

    deliver: takes messages to the front half; called from within the methods.
    """

    def __init__(
        self,
        members: Collection[Member],
        *,
        deliver: Callable[[RouterMessage], None],
        max_wait_s: float = 30.0,
    ) -> None:
        members = list(members)
        self._replicas = [_Replica(index, member) for index, member in enumerate(members)]
        self._deliver = deliver
        self._is_sole = len(members) == 1
        self._block_size = members[0].facts.block_size
        self._line = WaitingLine(max_wait_s=max_wait_s)
        self._waiting: dict[int, tuple[Submit, Sequence]] = {}
        self._placed: dict[int, _Placed] = {}
        self._num_turns = 0
        self._mean_output = float(FIRST_GUESS)
        self._log_level: SetLogLevel | None = None
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
        self._line.now_s = time.monotonic()
        match message:
            case Submit():
                self._line_up(message)
                self._place_waiting()
            case Finish() | Abort():
                self._end(message)
            case GetStats():
                self._ask(message)
            case SetLogLevel():
                self._log_level = message
                self._post_to_all(message)
            case Shutdown():
                for _, sequence in self._waiting.values():
                    self._line.remove(sequence)
                self._waiting.clear()
                self._post_to_all(message)

    def _post_to_all(self, message: FrontMessage) -> None:
        for replica in self._replicas:
            if replica.is_live:
                replica.member.post(message)

    def take(self, index: int, message: EngineMessage) -> None:
        """Take a message from a replica, in its present life."""
        replica = self._replicas[index]
        if not replica.is_live:
            return
        self._line.now_s = time.monotonic()
        match message:
            case TokenEvents():
                self._count(message)
                self._place_waiting()
                self._deliver(message)
            case PromptLogprobs():
                self._deliver(message)
            case SequenceTimes():
                self._deliver(replace(message, replica=index))
            case GrammarFailed():
                self._forget(message.seq_id)
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
        if self._log_level is not None:
            member.post(self._log_level)
        self._tell_change()
        self._place_waiting()

    def _line_up(self, submit: Submit) -> None:
        sequence = Sequence(
            seq_id=submit.seq_id,
            prompt_token_ids=submit.prompt_token_ids,
            sampling=submit.sampling,
            admission=submit.admission,
        )
        self._waiting[submit.seq_id] = submit, sequence
        self._line.arrive(sequence)

    def _place_waiting(self) -> None:
        while (sequence := self._line.first()) is not None:
            need_not_wait = self._is_sole or self._line.need_not_wait(sequence)
            live = [each for each in self._replicas if each.is_live]
            free = [each for each in live if each.has_room(sequence)]
            if not free and need_not_wait:
                free = live
            if not free:
                return
            submit, _ = self._waiting.pop(sequence.seq_id)
            self._line.begin_step(())
            self._line.note_start(sequence)
            self._line.charge(sequence.admission.account, sequence.num_prompt_tokens)
            self._place(submit, sequence, free)

    def _place(self, submit: Submit, sequence: Sequence, free: Collection[_Replica]) -> None:
        hashes: list[bytes] = []
        if not self._is_sole:
            hashes = hash_blocks(
                submit.prompt_token_ids,
                self._block_size,
                salt=submit.admission.cache_salt,
                max_blocks=MAX_BLOCKS,
            )

        def cost(replica: _Replica) -> tuple[int, int]:
            num_known = replica.memory.num_known(hashes) * self._block_size
            return replica.work - num_known, replica.last_turn

        replica = min(free, key=cost)
        placed = _Placed(
            replica=replica,
            sequence=sequence,
            num_prompt_tokens=len(submit.prompt_token_ids),
            expected_output=min(submit.sampling.max_tokens, round(self._mean_output)),
        )
        self._placed[submit.seq_id] = placed
        self._num_turns += 1
        replica.last_turn = self._num_turns
        replica.seq_ids[submit.seq_id] = None
        if submit.admission.is_background:
            replica.background.add(submit.seq_id)
        replica.work += placed.work
        replica.hold(sequence, placed.num_prompt_tokens)
        replica.memory.remember(hashes)
        replica.member.post(submit)

    def _end(self, message: Finish | Abort) -> None:
        if message.seq_id in self._waiting:
            submit, sequence = self._waiting.pop(message.seq_id)
            self._line.remove(sequence)
            if submit.mark is not None:
                self._deliver(SequenceTimes(mark=submit.mark, ended_s=self._line.now_s))
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
            replica.background.discard(seq_id)
            replica.work -= placed.work
            replica.hold(placed.sequence, -placed.num_prompt_tokens - placed.num_generated)
            self._line.note_stop(placed.sequence)
        return placed

    def _count(self, events: TokenEvents) -> None:
        if self._is_sole:  # nothing is decided by counts
            for seq_id, finish_reason in zip(events.seq_ids, events.finish_reasons, strict=True):
                if finish_reason is not None:
                    self._forget(seq_id)
            return
        for seq_id, finish_reason in zip(events.seq_ids, events.finish_reasons, strict=True):
            placed = self._placed.get(seq_id)
            if placed is None:  # ended by the front half after the engine sent this
                continue
            work = placed.work
            placed.num_generated += 1
            placed.replica.work += placed.work - work
            placed.replica.hold(placed.sequence, 1)
            self._line.charge(placed.sequence.admission.account, 1)
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


def merge_facts(replicas: list[PipelineFacts]) -> PipelineFacts:
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
        samples_late=any(each.samples_late for each in replicas),
    )
