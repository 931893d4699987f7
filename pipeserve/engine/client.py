"""EngineClient: the async facade of the engine and the sole bridge between asyncio and threads.

Runs on the event loop. Knows messages, not how the engine decides.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import PipelineFacts, PromptLogprobs
from pipeserve.core.constraint import BannedStrings, Grammar
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.generation import GeneratedToken, Generation
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
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
    TokenLogprobs,
    TraceMark,
)
from pipeserve.engine.service_rate import ServiceRate
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import (
    EngineError,
    GrammarError,
    NotReadyError,
    PromptTooLongError,
    QueueFullError,
    StageFailedError,
    StageStalledError,
)

PLAIN = AdmissionParams()


class EngineClient:
    """The engine as the front half sees it; every method runs on the event loop.

    `post` takes a message to the engine (thread-safe). `deliver` must be called, on the event
    loop, with every message that comes from the engine.
    """

    def __init__(
        self,
        *,
        facts: PipelineFacts,
        post: Callable[[FrontMessage], None],
        max_queued_requests: int,
        max_queued_tokens: int | None = None,
        take_times: Callable[[SequenceTimes], None] | None = None,
    ) -> None:
        """max_queued_tokens: see check_capacity; None: no limit. take_times: gets those of every
        sequence that brought a mark, also after it was forgotten here."""
        self.facts = facts
        self._post = post
        self._take_times = take_times
        self.limit_queue(max_queued_requests, max_queued_tokens)
        self._num_queued_tokens = 0
        self._generations: dict[int, Generation] = {}
        self._seq_ids = itertools.count()
        self._reply_ids = itertools.count()
        self._replies: dict[int, asyncio.Future[EngineStats]] = {}
        self._end_rate = ServiceRate()
        self._prompt_rate = ServiceRate()
        self._failure: EngineError | None = None
        self._degradation: str | None = None
        self._is_shut_down = False
        self._failed: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()

    def limit_queue(self, max_queued_requests: int, max_queued_tokens: int | None) -> None:
        """From now on so much may wait; what waits already goes on waiting."""
        self._max_live = self.facts.num_rows + max_queued_requests
        self._max_queued_tokens = max_queued_tokens

    @property
    def num_live(self) -> int:
        """Sequences that were submitted and have not ended."""
        return len(self._generations)

    @property
    def max_live(self) -> int:
        """Most sequences that can run and wait at once."""
        return self._max_live

    @property
    def failure(self) -> EngineError | None:
        """Why the engine is dead; None while it lives."""
        return self._failure

    @property
    def degradation(self) -> str | None:
        """Which replicas are missing and why; None while all take sequences."""
        return self._degradation

    async def wait_failed(self) -> EngineError:
        """Wait until the engine dies, and say why."""
        return await asyncio.shield(self._failed)

    def check_capacity(self, num_sequences: int, num_prompt_tokens: int = 0) -> None:
        """Raise unless this many more sequences may be submitted now.

        Prompt tokens are those of sequences that have no first token yet. Where none wait, any
        number is taken, or a long prompt could never be asked.

        Raises:
            QueueFullError: too many wait; `retry_after_s` follows from the recent service rate.
            StageFailedError, StageStalledError, NotReadyError: the engine is dead or was shut down.
        """
        self._check_rows(num_sequences)
        self._check_tokens(num_prompt_tokens)

    def _check_rows(self, num_sequences: int) -> None:
        self._check_alive()
        excess = self.num_live + num_sequences - self._max_live
        if excess > 0:
            raise QueueFullError(
                f"{self.num_live} sequences are running or waiting and this request adds "
                f"{num_sequences}; at most {self._max_live} fit. Try again later.",
                retry_after_s=self._end_rate.seconds_until(excess, time.monotonic()),
            )

    def _check_tokens(self, num_prompt_tokens: int) -> None:
        most = self._max_queued_tokens
        if most is None or self._num_queued_tokens == 0:
            return
        excess = self._num_queued_tokens + num_prompt_tokens - most
        if excess > 0:
            raise QueueFullError(
                f"{self._num_queued_tokens} prompt tokens wait and this request adds "
                f"{num_prompt_tokens}; at most {most} may (max_queued_tokens). Try again later.",
                retry_after_s=self._prompt_rate.seconds_until(excess, time.monotonic()),
            )

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_shut_down:
            raise NotReadyError("the daemon is stopping and takes no new requests")

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        admission: AdmissionParams = PLAIN,
        *,
        grammar: Grammar | None = None,
        banned: BannedStrings | None = None,
        timeout_s: float | None = None,
        mark: TraceMark | None = None,
    ) -> Generation:
        """Submit one sequence; enter the returned context to read its tokens.

        Queued tokens are not looked at: check_capacity does, once for all sequences of a request.

        grammar: what the answer must match; its tokens end where that does, or at max_tokens.
        banned: what it must not hold; not beside a grammar.
        timeout_s: the sequence is aborted if it has not ended by then; None: it may take for ever.
        mark: its times are wanted, and what they belong to.

        Raises:
            PromptTooLongError: prompt and max_tokens together exceed the context.
            QueueFullError, StageFailedError, StageStalledError, NotReadyError: see
                check_capacity.
        """
        self._check_length(len(prompt_token_ids), sampling.max_tokens)
        self._check_rows(1)
        generation = Generation(
            next(self._seq_ids), num_prompt_tokens=len(prompt_token_ids), on_end=self._end
        )
        self._generations[generation.seq_id] = generation
        self._num_queued_tokens += generation.num_queued_tokens
        self._end_rate.begin(time.monotonic())
        self._prompt_rate.begin(time.monotonic())
        if timeout_s is not None:
            generation.start_timer(timeout_s)
        self._post(
            Submit(
                seq_id=generation.seq_id,
                prompt_token_ids=tuple(prompt_token_ids),
                sampling=sampling,
                admission=admission,
                grammar=grammar,
                mark=mark,
                banned=banned,
            )
        )
        return generation

    def _check_length(self, num_prompt_tokens: int, max_tokens: int) -> None:
        if num_prompt_tokens + max_tokens > self.facts.context_length:
            raise PromptTooLongError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, but a "
                f"sequence holds at most {self.facts.context_length}; shorten one of them",
                param="max_tokens",
            )

    def _end(self, generation: Generation, message: Finish | Abort) -> None:
        """The front half wants no more of this sequence."""
        if self._forget(generation.seq_id) is not None:
            self._post(message)

    def _forget(self, seq_id: int) -> Generation | None:
        generation = self._generations.pop(seq_id, None)
        if generation is not None:
            self._note_begun(generation)
            now_s = time.monotonic()
            self._end_rate.note(1, now_s)
            if not self._generations:
                self._end_rate.pause(now_s)
        return generation

    def _note_begun(self, generation: Generation) -> None:
        """It has its first token, or has ended without: its prompt waits no more."""
        num_tokens, generation.num_queued_tokens = generation.num_queued_tokens, 0
        if num_tokens == 0:
            return
        self._num_queued_tokens -= num_tokens
        now_s = time.monotonic()
        self._prompt_rate.note(num_tokens, now_s)
        if self._num_queued_tokens == 0:
            self._prompt_rate.pause(now_s)

    async def stats(self) -> EngineStats:
        """Ask the engine for a snapshot.

        Raises:
            StageFailedError, StageStalledError, NotReadyError: the engine is dead or was shut down.
        """
        self._check_alive()
        reply_id = next(self._reply_ids)
        reply: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._replies[reply_id] = reply
        try:
            self._post(GetStats(reply_id=reply_id))
            return await reply
        finally:
            del self._replies[reply_id]

    def set_log_level(self, level: str) -> None:
        """Of engine processes, also of those that are started later."""
        self._post(SetLogLevel(level=level))

    def shut_down(self) -> None:
        """Tell the engine to end; whoever still waits for a sequence gets NotReadyError."""
        self._is_shut_down = True
        self._post(Shutdown())
        self._fail_all(NotReadyError("the daemon is stopping; the answer was cut off"))

    def _fail_all(self, failure: EngineError) -> None:
        for generation in self._generations.values():
            generation.fail(failure)
        self._generations.clear()
        self._num_queued_tokens = 0
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(failure)

    def deliver(self, message: RouterMessage) -> None:
        """Hand a message from the engine to whoever waits for it."""
        match message:
            case TokenEvents():
                self._deliver_tokens(message)
            case PromptLogprobs():
                self._deliver_prompt_logprobs(message)
            case StatsReply():
                reply = self._replies.get(message.reply_id)
                if reply is not None and not reply.done():
                    reply.set_result(message.stats)
            case GrammarFailed():
                generation = self._forget(message.seq_id)
                if generation is not None:
                    generation.fail(GrammarError(message.error))
            case SequenceTimes():
                if self._take_times is not None:
                    self._take_times(message)
            case EngineFailed():
                self._deliver_failure(message)
            case SequencesFailed():
                self._deliver_losses(message)
            case ReplicasChanged():
                self._degradation = message.degradation

    def _deliver_prompt_logprobs(self, scored: PromptLogprobs) -> None:
        generation = self._generations.get(scored.seq_id)
        if generation is not None:
            first = scored.first - 1  # the prompt's first token has none
            generation.prompt_logprobs[first : first + len(scored.token_P)] = _by_token(scored)

    def _deliver_tokens(self, events: TokenEvents) -> None:
        for seq_id, num_cached_tokens in events.num_cached_tokens:
            if seq_id in self._generations:
                self._generations[seq_id].num_cached_tokens = num_cached_tokens
        for seq_id, token_id, finish_reason, logprobs in zip(
            events.seq_ids, events.token_ids, events.finish_reasons, events.logprobs, strict=True
        ):
            generation = self._generations.get(seq_id)
            if generation is None:  # ended by the front half after the engine sent this
                continue
            if generation.num_queued_tokens:
                self._note_begun(generation)
            if finish_reason is not None:
                self._forget(seq_id)
            generation.push(
                GeneratedToken(token_id=token_id, finish_reason=finish_reason, logprobs=logprobs)
            )

    def _deliver_losses(self, message: SequencesFailed) -> None:
        failure = _as_error(message.cause)
        for seq_id in message.seq_ids:
            generation = self._forget(seq_id)
            if generation is not None:
                generation.fail(failure)

    def _deliver_failure(self, message: EngineFailed) -> None:
        if self._failure is not None or self._is_shut_down:
            return  # an engine process that says why it fails then ends, which is no second failure
        self._failure = _as_error(message)
        self._fail_all(self._failure)
        if not self._failed.done():
            self._failed.set_result(self._failure)


def _by_token(scored: PromptLogprobs) -> list[TokenLogprobs]:
    lines = zip(
        scored.token_P.tolist(), scored.top_ids_PK.tolist(), scored.top_PK.tolist(), strict=True
    )
    return [
        TokenLogprobs(logprob=logprob, top_ids=tuple(ids), top_logprobs=tuple(values))
        for logprob, ids, values in lines
    ]


def _as_error(message: EngineFailed) -> EngineError:
    kind = StageStalledError if message.stalled else StageFailedError
    return kind(message.error)
