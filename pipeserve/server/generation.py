"""From the engine's tokens to text: detokenises, finds stop strings, keeps log-probabilities.

Runs on the event loop. Does not know JSON or HTTP.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from pipeserve.engine.client import GeneratedToken, Generation
from pipeserve.engine.messages import FinishReason, TokenLogprobs
from pipeserve.server.plan import Plan
from pipeserve.server.record import RequestRecord
from pipeserve.server.state import Services
from pipeserve.text.detokenizer import Detokenizer
from pipeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A token of the answer with its log-probabilities."""

    token_id: int
    text_offset: int
    """Characters of the answer before this token."""
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Text that became certain with one token, and the tokens that it came from."""

    text: str
    scored: tuple[ScoredToken, ...] = ()
    """Empty where no log-probabilities were asked for."""


class Choice:
    """The text of one sequence as it grows."""

    def __init__(
        self,
        *,
        index: int,
        generation: Generation,
        detokenizer: Detokenizer,
        scores: _Scores | None,
        record: RequestRecord,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        """Set with the last deltas."""
        self._generation = generation
        self._detokenizer = detokenizer
        self._scores = scores
        self._record = record

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Everything new since the last time, one Delta per token that yields text.

        The last list, with which finish_reason is set, may be empty; no other is.

        Raises:
            EngineError: the pipeline died, or the daemon ended the sequence to stop.
        """
        arrived_at: float | None = None
        async for tokens in self._generation:
            num_before = self.num_tokens
            deltas = [delta for token in tokens if (delta := self._take(token)) is not None]
            num_new = self.num_tokens - num_before
            arrived_at = self._record.tokens_arrived(num_new, arrived_at)
            if self.finish_reason is not None:
                self._record.sequence_finished(self.finish_reason)
                yield deltas
                return
            if deltas:
                yield deltas

    def _take(self, token: GeneratedToken) -> Delta | None:
        if self.finish_reason is not None:
            return None  # came in the same batch, after a stop string
        self.num_tokens += 1
        if token.finish_reason is FinishReason.STOP:
            text = self._detokenizer.finish()
        else:
            text = self._detokenizer.push(token.token_id)
            if self._scores is not None and token.logprobs is not None:
                self._scores.add(token.token_id, token.logprobs)
            if token.finish_reason is not None:
                text += self._detokenizer.finish()
        self.finish_reason = token.finish_reason
        if self._detokenizer.stopped and self.finish_reason is not FinishReason.STOP:
            if self.finish_reason is None:
                self._generation.finish()
            self.finish_reason = FinishReason.STOP
        return self._delta(text)

    def _delta(self, text: str) -> Delta | None:
        if self._scores is None:
            return Delta(text=text) if text else None
        if not text and self.finish_reason is None:
            return None
        scored = self._scores.take(text, is_cut=self._detokenizer.stopped)
        return Delta(text=text, scored=scored) if text or scored else None


class _Scores:
    """Tokens with log-probabilities that wait for their text to become certain."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_decoded = 0
        self._num_visible = 0
        self._waiting: list[ScoredToken] = []

    def add(self, token_id: int, logprobs: TokenLogprobs) -> None:
        self._waiting.append(
            ScoredToken(token_id=token_id, text_offset=self._num_decoded, logprobs=logprobs)
        )
        self._num_decoded += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def take(self, text: str, *, is_cut: bool) -> tuple[ScoredToken, ...]:
        """The tokens behind `text`, without those that a stop string cut away after it."""
        self._num_visible += len(text)
        taken = self._waiting
        self._waiting = []
        if is_cut:
            taken = [token for token in taken if token.text_offset < self._num_visible]
        return tuple(taken)


@asynccontextmanager
async def open_choices(
    services: Services, plan: Plan, record: RequestRecord
) -> AsyncIterator[list[Choice]]:
    """Submits every sequence of the plan, all or none; leaving the context aborts unended ones.

    Raises:
        QueueFullError: there is no room for all of them.
        EngineError: the pipeline is dead.
    """
    services.engine.check_capacity(len(plan.sequences))
    async with AsyncExitStack() as stack:
        choices: list[Choice] = []
        stack.callback(_count_aborted, choices, record)
        for index, sequence in enumerate(plan.sequences):
            generation = services.engine.generate(sequence.prompt_token_ids, sequence.sampling)
            choices.append(
                Choice(
                    index=index,
                    generation=await stack.enter_async_context(generation),
                    detokenizer=Detokenizer(
                        services.tokenizer,
                        stop=plan.stop,
                        prompt_token_ids=sequence.prompt_token_ids,
                    ),
                    scores=_Scores(services.tokenizer) if plan.has_logprobs else None,
                    record=record,
                )
            )
        yield choices


def _count_aborted(choices: list[Choice], record: RequestRecord) -> None:
    for choice in choices:
        if choice.finish_reason is None:
            record.sequence_finished(FinishReason.ABORT)


async def run_together(jobs: Sequence[Coroutine[object, object, None]]) -> None:
    """Runs the jobs at once; the first failure cancels the others and is raised as it is."""
    if len(jobs) == 1:
        await jobs[0]  # a task of its own would cost a wake-up per request
        return
    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
