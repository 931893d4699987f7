"""A byte tokenizer and an engine that answers from a script, behind the real EngineClient."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import assert_never

import numpy as np

from pipeserve.core.batch import PipelineFacts, PromptLogprobs
from pipeserve.engine.client import EngineClient
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    Finish,
    FinishReason,
    FrontMessage,
    GetStats,
    SequenceTimes,
    SetLogLevel,
    Shutdown,
    StageWork,
    StatsReply,
    Submit,
    TokenEvents,
    TokenLogprobs,
)
from pipeserve.engine.stats import EngineStats
from pipeserve.text.vocabulary import InfillTokens

EOS = 256
BOS = 257
MARK = 258
"""A special token that does not end a sequence."""

_SPECIAL = {EOS: "<|end|>", BOS: "<|begin|>", MARK: "<|mark|>"}

Answer = Callable[[Submit], Sequence[Sequence[int]]]


class ByteTokenizer:
    """Token i is the byte i; three special tokens follow. What the server uses of Tokenizer."""

    strips_leading_space = False
    vocab_size = 259
    longest_token_bytes = 1
    eos_token_ids = frozenset({EOS})
    bos_token_id = BOS
    add_bos = True
    infill = InfillTokens(prefix=1, suffix=2, middle=3, ends=frozenset({1, 2, 3}))
    """Tokens that a test's texts do not use otherwise."""
    bos_token = _SPECIAL[BOS]
    eos_token = _SPECIAL[EOS]

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]:
        begins_with_bos = text.startswith(self.bos_token)
        raw = text.removeprefix(self.bos_token).encode()
        return [*([BOS] if add_special_tokens or begins_with_bos else []), *raw]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        pieces = self.pieces(skip_special=skip_special)
        return b"".join(pieces[token_id] for token_id in token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return self.pieces(skip_special=skip_special)[token_id]

    def pieces(self, *, skip_special: bool) -> list[bytes]:
        special = [b"" if skip_special else name.encode() for name in _SPECIAL.values()]
        return [bytes([value]) for value in range(256)] + special

    def token_id(self, name: str) -> int | None:
        return next((index for index, special in _SPECIAL.items() if special == name), None)

    def is_special(self, token_id: int) -> bool:
        return token_id in _SPECIAL


def text_answer(text: str | bytes, *, per_batch: int = 1, ends: bool = True) -> Answer:
    """Every sequence gets this text, per_batch tokens at a time, then the end token."""
    raw = text.encode() if isinstance(text, str) else text
    ids = [*raw, EOS] if ends else [*raw]
    batches = [ids[start : start + per_batch] for start in range(0, len(ids), per_batch)]
    return lambda _: batches


class ScriptedEngine:
    """Sends what `answer` says, ends sequences as the engine does, and notes what it was told.

    A sequence whose script is over goes on for ever without a token, until it is ended.
    """

    def __init__(self, *, context_length: int = 512, max_queued: int = 4) -> None:
        self.answer: Answer = text_answer("Hello, world")
        self.answers_stats = True
        self.stats: EngineStats | None = None
        """Its answer, if not the usual."""
        self.submitted: list[Submit] = []
        self.finished: list[int] = []
        self.aborted: list[int] = []
        self.take_times: Callable[[SequenceTimes], None] = lambda _: None
        self.client = EngineClient(
            facts=PipelineFacts(
                num_stages=2,
                num_rows=4,
                num_blocks=64,
                block_size=16,
                context_length=context_length,
                max_batch_tokens=64,
                num_look_ahead=1,
                vocab_size=ByteTokenizer.vocab_size,
            ),
            post=self._post,
            max_queued_requests=max_queued,
            take_times=lambda times: self.take_times(times),
        )
        self._changed = asyncio.Event()
        self._running: dict[int, asyncio.Task[None]] = {}

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits until something the engine is told makes `holds` true."""
        async with asyncio.timeout(20):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def fail(self, error: str, *, stalled: bool = False) -> None:
        self._stop_all()
        self.client.deliver(EngineFailed(error=error, stalled=stalled))

    def send(self, seq_id: int, token_id: int, *, is_last: bool) -> None:
        """One more token for a sequence whose script is over."""
        if is_last:
            self._running.pop(seq_id).cancel()
        self._deliver(seq_id, [token_id], FinishReason.LENGTH if is_last else None, None)

    def _post(self, message: FrontMessage) -> None:
        match message:
            case Submit():
                self.submitted.append(message)
                task = asyncio.get_running_loop().create_task(self._run(message))
                self._running[message.seq_id] = task
            case Finish(seq_id=seq_id):
                self.finished.append(seq_id)
                self._running.pop(seq_id).cancel()
            case Abort(seq_id=seq_id):
                self.aborted.append(seq_id)
                self._tell_times(seq_id)
                self._running.pop(seq_id).cancel()
            case GetStats(reply_id=reply_id):
                if self.answers_stats:
                    self.client.deliver(
                        StatsReply(reply_id=reply_id, stats=self.stats or self._stats())
                    )
            case SetLogLevel(level=level):
                self.log_level = level
            case Shutdown():
                self._stop_all()
            case _:
                assert_never(message)
        self._changed.set()

    def _stop_all(self) -> None:
        for task in self._running.values():
            task.cancel()
        self._running.clear()

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=1,
            num_running=len(self._running),
            num_blocks=64,
            num_free_blocks=48,
            num_steps=10,
            num_prompt_tokens=100,
            num_generated_tokens=50,
            num_preemptions=2,
            stage_busy_s=(1.5, 2.5),
            uptime_s=3.0,
        )

    async def _run(self, submit: Submit) -> None:
        sampling = submit.sampling
        num_tokens = 0
        self._deliver_prompt_logprobs(submit)
        for batch in self.answer(submit):
            await asyncio.sleep(0)
            sent: list[int] = []
            reason: FinishReason | None = None
            for token_id in batch:
                sent.append(token_id)
                num_tokens += 1
                if token_id in sampling.stop_token_ids:
                    reason = FinishReason.STOP
                elif num_tokens == sampling.max_tokens:
                    reason = FinishReason.LENGTH
                if reason is not None:
                    break
            if reason is not None:
                del self._running[submit.seq_id]
            self._deliver(submit.seq_id, sent, reason, sampling.num_logprobs)
            if reason is not None:
                self._tell_times(submit.seq_id)
                return
        await asyncio.get_running_loop().create_future()

    def _tell_times(self, seq_id: int) -> None:
        """Two stages that work for a tenth of the time each, in turn."""
        mark = next(each.mark for each in self.submitted if each.seq_id == seq_id)
        if mark is None:
            return
        now_s = time.monotonic()
        tenth_s = (now_s - mark.submitted_s) / 10
        times = [mark.submitted_s + tenth_s * part for part in range(1, 6)]
        works = [
            StageWork(start_s=start_s, end_s=end_s, busy_s=tenth_s, num_steps=1)
            for start_s, end_s in itertools.pairwise(times)
        ]
        self.client.deliver(
            SequenceTimes(
                mark=mark, ended_s=now_s, prefill=tuple(works[:2]), decode=tuple(works[2:])
            )
        )

    def _deliver_prompt_logprobs(self, submit: Submit) -> None:
        """In two parts, as of a prompt that is computed in chunks."""
        count = submit.sampling.num_prompt_logprobs
        if count is None:
            return
        for first, end in ((1, 3), (3, None)):
            ids = submit.prompt_token_ids[first:end]
            scores = [score for each in ids if (score := logprobs_of(each, count)) is not None]
            self.client.deliver(
                PromptLogprobs(
                    seq_id=submit.seq_id,
                    first=first,
                    token_P=np.array([score.logprob for score in scores], np.float32),
                    top_ids_PK=np.array([score.top_ids for score in scores], np.int32),
                    top_PK=np.array([score.top_logprobs for score in scores], np.float32),
                )
            )

    def _deliver(
        self,
        seq_id: int,
        token_ids: list[int],
        reason: FinishReason | None,
        num_logprobs: int | None,
    ) -> None:
        """One TokenEvents per step, all before the front half can run."""
        for position, token_id in enumerate(token_ids):
            is_last = position == len(token_ids) - 1
            self.client.deliver(
                TokenEvents(
                    seq_ids=(seq_id,),
                    token_ids=(token_id,),
                    finish_reasons=(reason if is_last else None,),
                    logprobs=(logprobs_of(token_id, num_logprobs),),
                )
            )


def logprobs_of(token_id: int, num_logprobs: int | None) -> TokenLogprobs | None:
    """Alternatives count upwards from the token; the third is impossible."""
    if num_logprobs is None:
        return None
    values = (-0.5, -1.5, float("-inf"), -3.5)[:num_logprobs]
    ids = tuple((token_id + step) % ByteTokenizer.vocab_size for step in range(len(values)))
    return TokenLogprobs(logprob=-0.5, top_ids=ids, top_logprobs=values)
