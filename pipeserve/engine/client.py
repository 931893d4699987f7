"""EngineClient: the async facade of the engine and the sole bridge between asyncio and threads.

Runs on the event loop. Knows messages, not how the engine decides.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pipeserve.core.batch import PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    Finish,
    FinishReason,
    FrontMessage,
    GetStats,
    ReplicasChanged,
    RouterMessage,
    SequencesFailed,
    Shutdown,
    StatsReply,
    Submit,
    TokenEvents,
    TokenLogprobs,
)
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import (
    EngineError,
    NotReadyError,
    PromptTooLongError,
    QueueFullError,
    StageFailedError,
    StageStalledError,
)

RATE_WINDOW = 64
"""Sequence ends that the service rate is computed from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """One token of one sequence, as it reaches the request that waits for it."""

    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None


class Generation:
    """The tokens of one sequence as they arrive; an async context manager and iterator.

    Iterating yields every token that has arrived since the last were taken, never an empty list,
    and ends after the token that carries a finish reason or after `finish`. Leaving the context
    before that aborts the sequence.

    Raises (while iterating):
        StageFailedError, StageStalledError: the pipeline died under the sequence.
        NotReadyError: the daemon ended the sequence to stop.
    """

    __slots__ = ("_client", "_failure", "_is_ended", "_tokens", "_waiter", "seq_id")

    def __init__(self, client: EngineClient, seq_id: int) -> None:
        self.seq_id = seq_id
        self._client = client
        self._tokens: list[GeneratedToken] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: EngineError | None = None
        self._is_ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(Abort(seq_id=self.seq_id))

    def finish(self) -> None:
        """The text is complete: the engine ends the sequence, and iteration ends."""
        self._tokens.clear()
        self._end(Finish(seq_id=self.seq_id))

    def _end(self, message: Finish | Abort) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._client.end(self, message)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[GeneratedToken]:
        if not self._tokens and not self._is_ended and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            return tokens
        if self._failure is not None:
            raise self._failure
        raise StopAsyncIteration

    def push(self, token: GeneratedToken) -> None:
        """Take one token from the engine; on the event loop."""
        self._tokens.append(token)
        self._is_ended = token.finish_reason is not None
        self._wake()

    def fail(self, failure: EngineError) -> None:
        """The engine is gone; on the event loop."""
        self._failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


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
    ) -> None:
        self.facts = facts
        self._post = post
        self._max_live = facts.num_rows + max_queued_requests
        self._generations: dict[int, Generation] = {}
        self._seq_ids = itertools.count()
        self._reply_ids = itertools.count()
        self._replies: dict[int, asyncio.Future[EngineStats]] = {}
        self._end_times: deque[float] = deque(maxlen=RATE_WINDOW)
        self._failure: EngineError | None = None
        self._degradation: str | None = None
        self._is_shut_down = False
        self._failed: asyncio.Future[EngineError] = asyncio.get_running_loop().create_future()

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

    def check_capacity(self, num_sequences: int) -> None:
        """Raise unless this many more sequences may be submitted now.

        Raises:
            QueueFullError: too many wait; `retry_after_s` follows from the recent service rate.
            StageFailedError, StageStalledError, NotReadyError: the engine is dead or was shut down.
        """
        self._check_alive()
        excess = self.num_live + num_sequences - self._max_live
        if excess > 0:
            raise QueueFullError(
                f"{self.num_live} sequences are running or waiting and this request adds "
                f"{num_sequences}; at most {self._max_live} fit. Try again later.",
                retry_after_s=self._seconds_until(excess),
            )

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_shut_down:
            raise NotReadyError("the daemon is stopping and takes no new requests")

    def _seconds_until(self, num_ended: int) -> int:
        if len(self._end_times) < 2:
            return 1
        span_s = time.monotonic() - self._end_times[0]
        return max(1, min(600, round(num_ended * span_s / len(self._end_times))))

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Submit one sequence; enter the returned context to read its tokens.

        Raises:
            PromptTooLongError: prompt and max_tokens together exceed the context.
            QueueFullError, StageFailedError, StageStalledError, NotReadyError: see
                check_capacity.
        """
        self._check_length(len(prompt_token_ids), sampling.max_tokens)
        self.check_capacity(1)
        generation = Generation(self, next(self._seq_ids))
        self._generations[generation.seq_id] = generation
        self._post(
            Submit(
                seq_id=generation.seq_id,
                prompt_token_ids=tuple(prompt_token_ids),
                sampling=sampling,
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

    def end(self, generation: Generation, message: Finish | Abort) -> None:
        """The front half wants no more of this sequence; called by its Generation."""
        if self._forget(generation.seq_id) is not None:
            self._post(message)

    def _forget(self, seq_id: int) -> Generation | None:
        generation = self._generations.pop(seq_id, None)
        if generation is not None:
            self._end_times.append(time.monotonic())
        return generation

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

    def shut_down(self) -> None:
        """Tell the engine to end; whoever still waits for a sequence gets NotReadyError."""
        self._is_shut_down = True
        self._post(Shutdown())
        self._fail_all(NotReadyError("the daemon is stopping; the answer was cut off"))

    def _fail_all(self, failure: EngineError) -> None:
        for generation in self._generations.values():
            generation.fail(failure)
        self._generations.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(failure)

    def deliver(self, message: RouterMessage) -> None:
        """Hand a message from the engine to whoever waits for it."""
        match message:
            case TokenEvents():
                self._deliver_tokens(message)
            case StatsReply():
                reply = self._replies.get(message.reply_id)
                if reply is not None and not reply.done():
                    reply.set_result(message.stats)
            case EngineFailed():
                self._deliver_failure(message)
            case SequencesFailed():
                self._deliver_losses(message)
            case ReplicasChanged():
                self._degradation = message.degradation

    def _deliver_tokens(self, events: TokenEvents) -> None:
        for seq_id, token_id, finish_reason, logprobs in zip(
            events.seq_ids, events.token_ids, events.finish_reasons, events.logprobs, strict=True
        ):
            generation = self._generations.get(seq_id)
            if generation is None:  # ended by the front half after the engine sent this
                continue
            if finish_reason is not None:
                self._forget(seq_id)
            generation.push(
                GeneratedToken(token_id=token_id, finish_reason=finish_reason, logprobs=logprobs)
            )

    def _deliver_losses(self, message: SequencesFailed) -> None:
        failure = _as_error(message.cause)
        for seq_id in message.seq_ids:
            generation = self._generations.pop(seq_id, None)
            if generation is not None:
                generation.fail(failure)

    def _deliver_failure(self, message: EngineFailed) -> None:
        if self._failure is not None or self._is_shut_down:
            return  # an engine process that says why it fails then ends, which is no second failure
        self._failure = _as_error(message)
        self._fail_all(self._failure)
        if not self._failed.done():
            self._failed.set_result(self._failure)


def _as_error(message: EngineFailed) -> EngineError:
    kind = StageStalledError if message.stalled else StageFailedError
    return kind(message.error)
