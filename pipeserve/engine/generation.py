"""Generation: the tokens of one sequence on their way to the request that waits for them.

Runs on the event loop. Knows messages, not who carries them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pipeserve.engine.messages import Abort, Finish, FinishReason, TokenLogprobs
from pipeserve.errors import PipeserveError, RequestTimeoutError

Sink = Callable[[list["GeneratedToken"]], bool]
OnEnd = Callable[["Generation", Finish | Abort], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """One token of one sequence, as it reaches the request that waits for it."""

    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None


class Generation:
    """The tokens of one sequence as they arrive; an async context manager and iterator.

    Iterating yields every token that has arrived since the last were taken, never an empty list,
    and ends after the token that carries a finish reason or after `finish`; `feed` hands the same
    to a function. Leaving the context before that aborts the sequence.

    Raises (while iterating and feeding):
        StageFailedError, StageStalledError: the pipeline died under the sequence.
        NotReadyError: the daemon ended the sequence to stop.
        GrammarError: what its grammar allows next cannot be found out.
        RequestTimeoutError: the sequence took longer than it was given.
    """

    __slots__ = (
        *("_failure", "_is_ended", "_on_end", "_pouring", "_sink", "_sink_error", "_timer"),
        *("_tokens", "_waiter"),
        *("num_cached_tokens", "num_queued_tokens", "prompt_logprobs", "seq_id"),
    )

    def __init__(self, seq_id: int, *, num_prompt_tokens: int, on_end: OnEnd) -> None:
        """on_end: told once if the front half wants no more of it."""
        self.seq_id = seq_id
        self.num_queued_tokens = num_prompt_tokens
        """Of its prompt, until the first token has come."""
        self.num_cached_tokens = 0
        """Of its prompt, those that were not computed again; known with the first token."""
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens but the first, where they were asked for; complete with the first
        generated token."""
        self._tokens: list[GeneratedToken] = []
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._sink_error: Exception | None = None
        """Why feeding ends; not in the waiter, which nobody asks once its task is cancelled."""
        self._pouring: asyncio.Handle | None = None
        """Will hand the tokens to the sink, together with those that come before it runs."""
        self._failure: PipeserveError | None = None
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
        self.stop_timer()
        if not self._is_ended:
            self._is_ended = True
            self._on_end(self, message)

    def start_timer(self, timeout_s: float) -> None:
        """Abort it unless it has ended by then, wherever it stands."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout_s, self._time_out, timeout_s)

    def stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self, timeout_s: float) -> None:
        self._end(Abort(seq_id=self.seq_id))
        self.fail(
            RequestTimeoutError(
                f"the answer was not complete within {timeout_s:g} s (timeout of the request or "
                "request_timeout_s); ask for less, allow more time or come back when the daemon "
                "is less busy"
            )
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[GeneratedToken]:
        if not self._tokens and not self._is_ended and self._failure is None:
            await self._wait()
        if self._tokens:
            tokens, self._tokens = self._tokens, []
            return tokens
        if self._failure is not None:
            raise self._failure
        raise StopAsyncIteration

    async def feed(self, sink: Sink) -> None:
        """Hand all tokens that arrive to the sink, on the event loop, until it returns False.

        No task is woken for them, which costs more than what is done with a token. Returns also
        once the sequence has ended; raises what the sink raises.
        """
        self._sink = sink
        try:
            if self._tokens or self._is_ended or self._failure is not None:
                self._wake()
            await self._wait()
        finally:
            self._sink = None
            if self._pouring is not None:
                self._pouring.cancel()
                self._pouring = None
        if self._sink_error is not None:
            raise self._sink_error

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def push(self, token: GeneratedToken) -> None:
        """Take one token from the engine; on the event loop."""
        self._tokens.append(token)
        if token.finish_reason is not None:
            self._is_ended = True
            self.stop_timer()
        self._wake()

    def fail(self, failure: PipeserveError) -> None:
        """There will be no more; on the event loop."""
        self.stop_timer()
        self._failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._sink is None:
            self._end_wait()
        elif self._pouring is None:
            self._pouring = asyncio.get_running_loop().call_soon(self._pour, self._sink)

    def _pour(self, sink: Sink) -> None:
        self._pouring = None
        tokens, self._tokens = self._tokens, []
        try:
            wants_more = not tokens or sink(tokens)
            self._sink_error = self._failure if wants_more else None
        except Exception as error:
            wants_more, self._sink_error = False, error
        if not wants_more or self._is_ended or self._failure is not None:
            self._end_wait()

    def _end_wait(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
