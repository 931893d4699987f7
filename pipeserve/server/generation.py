"""From the engine's tokens to answers: detokenises, finds stop strings, thoughts and tool calls.

Runs on the event loop. Does not know JSON or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from pipeserve.engine.generation import GeneratedToken, Generation
from pipeserve.engine.messages import FinishReason, TraceMark
from pipeserve.server.json_pieces import SLICE
from pipeserve.server.plan import Plan, PlannedSequence
from pipeserve.server.record import RequestRecord
from pipeserve.server.scores import ScoredToken, Scores
from pipeserve.server.state import Services
from pipeserve.text.answer import AnswerParser, AnswerParts
from pipeserve.text.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What became certain with one token, and the tokens that it came from."""

    parts: AnswerParts
    num_tokens: int
    """Of the choice so far."""
    scored: tuple[ScoredToken, ...] = ()
    """Empty where no log-probabilities were asked for."""


class Choice:
    """The answer of one sequence as it grows."""

    def __init__(
        self,
        *,
        index: int,
        generation: Generation,
        detokenizer: Detokenizer,
        parser: AnswerParser | None,
        scores: Scores | None,
        record: RequestRecord,
        generates: bool,
        scores_end: bool,
        echo: tuple[Sequence[int], str] | None,
    ) -> None:
        """generates: see Plan. echo: a prompt that the answer begins with, as ids and as text."""
        self.index = index
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        """Set with the last deltas."""
        self._generation = generation
        self._detokenizer = detokenizer
        self._parser = parser
        self._scores = scores
        self._record = record
        self._generates = generates
        self._scores_end = scores_end
        self._echo = None if echo is None else self._slice_echo(*echo)
        """What is left of it; a long prompt's scores are not made at once."""
        self._held: list[GeneratedToken] = []
        """The first tokens, while the echo goes before them."""
        self._arrived_at: float | None = None
        """When the latest tokens did."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that it had from the prefix cache."""
        return self._generation.num_cached_tokens

    @property
    def has_calls(self) -> bool:
        """Whether the answer calls tools."""
        return self._parser is not None and self._parser.has_calls

    async def next_deltas(self) -> list[Delta]:
        """Waits for something new, at most one Delta per token.

        The last list, with which finish_reason is set, may be empty; no other is. There is no next
        one after that.

        Raises:
            EngineError: the pipeline died, or the daemon ended the sequence to stop.
        """
        if self._echo is not None:
            return await self._next_of_echo(self._echo)
        tokens, self._held = self._held, []
        deltas = self._take_all(tokens) if tokens else []
        while not deltas and self.finish_reason is None:
            deltas = self._take_all(await anext(self._generation))
        return deltas

    async def _next_of_echo(self, echo: Iterator[Delta]) -> list[Delta]:
        if not self._held:  # the prompt's scores are complete with the first token
            self._held = await anext(self._generation)
        await asyncio.sleep(0)  # others have their turn
        delta = next(echo, None)
        if delta is not None:
            return [delta]
        self._echo = None
        return await self.next_deltas()

    async def feed(self, sink: Callable[[list[Delta]], bool]) -> None:
        """Hands what next_deltas would return to the sink as soon as it is there, until that
        returns False or has got the last. Returns at once while there is something to echo.

        Raises:
            EngineError: see next_deltas.
        """

        def take(tokens: list[GeneratedToken]) -> bool:
            deltas = self._take_all(tokens)
            is_last = self.finish_reason is not None
            wants_more = sink(deltas) if deltas or is_last else True
            return wants_more and not is_last

        if self._echo is None and not self._held:
            await self._generation.feed(take)

    def _take_all(self, tokens: Sequence[GeneratedToken]) -> list[Delta]:
        num_before = self.num_tokens
        deltas = [delta for token in tokens if (delta := self._take(token)) is not None]
        num_new = self.num_tokens - num_before
        self._arrived_at = self._record.tokens_arrived(num_new, self._arrived_at)
        if self.finish_reason is not None:
            self._record.sequence_finished(self.finish_reason)
        return deltas

    def _slice_echo(self, token_ids: Sequence[int], text: str) -> Iterator[Delta]:
        """The prompt, ahead of the first token."""
        scores = self._scores
        if scores is None:
            yield Delta(parts=AnswerParts(text=text), num_tokens=0)
            return
        logprobs = (None, *self._generation.prompt_logprobs)
        start = 0
        for first in range(0, len(token_ids), SLICE):
            last = first + SLICE
            for each in zip(token_ids[first:last], logprobs[first:last], strict=True):
                scores.add(*each)
            end = scores.num_decoded if last < len(token_ids) else len(text)
            scores.show(text[start:end])
            parts = AnswerParts(text=text[start:end])
            yield Delta(parts=parts, num_tokens=0, scored=scores.take(is_cut=False))
            start = end

    def _take(self, token: GeneratedToken) -> Delta | None:
        if self.finish_reason is not None:
            return None  # came in the same batch, after a stop string
        if not self._generates:
            self._end(FinishReason.LENGTH, is_ended=token.finish_reason is not None)
            return None
        self.num_tokens += 1
        text = self._text(token)
        self.finish_reason = token.finish_reason
        if self._detokenizer.stopped and self.finish_reason is not FinishReason.STOP:
            self._end(FinishReason.STOP, is_ended=self.finish_reason is not None)
        return self._delta(text)

    def _text(self, token: GeneratedToken) -> str:
        if token.finish_reason is FinishReason.STOP:
            if self._scores_end:
                self._score(token)
            return self._detokenizer.finish()
        text = self._detokenizer.push(token.token_id)
        self._score(token)
        if token.finish_reason is not None:
            text += self._detokenizer.finish()
        return text

    def _score(self, token: GeneratedToken) -> None:
        if self._scores is not None and token.logprobs is not None:
            self._scores.add(token.token_id, token.logprobs)

    def _end(self, reason: FinishReason, *, is_ended: bool) -> None:
        """is_ended: in the engine, which is told otherwise."""
        if not is_ended:
            self._generation.finish()
        self.finish_reason = reason

    def _delta(self, text: str) -> Delta | None:
        parts = self._parse(text)
        is_last = self.finish_reason is not None
        scored: tuple[ScoredToken, ...] = ()
        if self._scores is not None:
            self._scores.show(text)
            if parts or is_last:
                scored = self._scores.take(is_cut=self._detokenizer.stopped)
        if not parts and not scored:
            return None
        return Delta(parts=parts, num_tokens=self.num_tokens, scored=scored)

    def _parse(self, text: str) -> AnswerParts:
        parser = self._parser
        if parser is None:
            return AnswerParts(text=text)
        self.num_reasoning_tokens += parser.is_reasoning
        parts = parser.push(text)
        if self.finish_reason is None and parser.is_complete:
            self._end(FinishReason.STOP, is_ended=False)
        elif self.finish_reason is not None:
            parts = AnswerParts.joined((parts, parser.finish()))
        return parts


@asynccontextmanager
async def open_choices(
    services: Services, plan: Plan, record: RequestRecord, *, timeout_s: float | None
) -> AsyncIterator[list[Choice]]:
    """Submits every sequence of the plan, all or none; leaving the context aborts unended ones.

    timeout_s: how long each may take.

    Raises:
        QueueFullError: there is no room for all of them.
        EngineError: the pipeline is dead.
    """
    num_prompt_tokens = sum(len(sequence.prompt_token_ids) for sequence in plan.sequences)
    services.engine.check_capacity(len(plan.sequences), num_prompt_tokens)
    admission = replace(plan.admission, account=record.key_label)
    record.submitted_at = time.monotonic()
    async with AsyncExitStack() as stack:
        choices: list[Choice] = []
        stack.callback(_count_aborted, choices, record)
        for index, sequence in enumerate(plan.sequences):
            generation = services.engine.generate(
                sequence.prompt_token_ids,
                sequence.sampling,
                admission,
                grammar=plan.grammar,
                banned=plan.banned,
                timeout_s=timeout_s,
                mark=_mark(index, record),
            )
            generation = await stack.enter_async_context(generation)
            choices.append(_choice(index, generation, sequence, plan, services, record))
        yield choices


def _mark(index: int, record: RequestRecord) -> TraceMark | None:
    if record.traceparent is None:
        return None
    return TraceMark(parent=record.traceparent, choice=index, submitted_s=time.monotonic())


def _choice(
    index: int,
    generation: Generation,
    sequence: PlannedSequence,
    plan: Plan,
    services: Services,
    record: RequestRecord,
) -> Choice:
    return Choice(
        index=index,
        generation=generation,
        detokenizer=Detokenizer(
            services.tokenizer,
            stop=plan.stop,
            prompt_token_ids=sequence.prompt_token_ids,
            shown_token_ids=plan.shown_token_ids,
        ),
        parser=plan.form.new_parser(),
        scores=Scores(services.tokenizer, plan.shown_token_ids) if plan.has_logprobs else None,
        record=record,
        generates=plan.generates,
        scores_end=plan.scores_end,
        echo=None if sequence.echo is None else (sequence.prompt_token_ids, sequence.echo),
    )


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
