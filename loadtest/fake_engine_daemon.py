"""The daemon with an engine that computes nothing, for http_cost.py and big_answers.py.

Run as a program in place of `python -m pipeserve`: STEP_S, then the arguments. All sequences get a
token at every multiple of STEP_S on the monotonic clock, as if a step had taken that long, with
invented log-probabilities where they are asked for.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import types
from typing import Any

import numpy as np

from pipeserve import engine_child, engine_process
from pipeserve.cli import main
from pipeserve.core.batch import PipelineFacts, PromptLogprobs
from pipeserve.core.layout import LayoutSurvey
from pipeserve.engine.messages import (
    Abort,
    Finish,
    FinishReason,
    GetStats,
    Load,
    Shutdown,
    StatsReply,
    Submit,
    SurveyLayouts,
    TokenEvents,
    TokenLogprobs,
)
from pipeserve.engine.stats import EngineStats

NUM_SPECIAL = 17
"""Ids below are control tokens of the demo model, which have no text."""

CHUNK = 256
"""Prompt tokens whose log-probabilities come together, as from the scheduler."""

step_s = float(sys.argv.pop(1))


class Answer:
    """Repeats the prompt's tokens."""

    def __init__(self, submit: Submit) -> None:
        ids = [each for each in submit.prompt_token_ids if each >= NUM_SPECIAL] or [NUM_SPECIAL]
        self._ids = ids
        self._left = submit.sampling.max_tokens
        self._num_logprobs = submit.sampling.num_logprobs

    def next(self) -> tuple[int, FinishReason | None, TokenLogprobs | None]:
        self._left -= 1
        token_id = self._ids[self._left % len(self._ids)]
        logprobs = None
        if self._num_logprobs is not None:
            count = self._num_logprobs
            logprobs = TokenLogprobs(
                logprob=-0.123456,
                top_ids=tuple(range(NUM_SPECIAL, NUM_SPECIAL + count)),
                top_logprobs=tuple(-0.123456 * each for each in range(1, count + 1)),
            )
        return token_id, None if self._left else FinishReason.LENGTH, logprobs


class FakeHalf:
    """Stands for pipeserve.engine_half.EngineHalf."""

    def __init__(self, order: Load, inbox: Any) -> None:
        self.facts = PipelineFacts(
            num_stages=1,
            num_rows=order.config.max_num_seqs or 1024,
            num_blocks=1 << 16,
            block_size=16,
            context_length=1 << 17,
            max_batch_tokens=2048,
            num_look_ahead=1,
            vocab_size=1 << 15,
        )
        self._inbox = inbox
        self._answers: dict[int, Answer] = {}

    @classmethod
    def load(cls, order: Load, *, inbox: Any, on_progress: Any) -> FakeHalf:
        return cls(order, inbox)

    def start(self, deliver: Any) -> None:
        self._deliver = deliver
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def wait_ended(self) -> None:
        self._thread.join()

    def close(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        next_s = time.monotonic()
        while self._take_messages(next_s):
            if self._answers:
                self._step()
            next_s = (time.monotonic() // step_s + 1) * step_s

    def _take_messages(self, until_s: float) -> bool:
        """False once it is to end. Without sequences there is nothing to be in time for."""
        while True:
            left_s = until_s - time.monotonic() if self._answers else None
            if left_s is not None and left_s <= 0:
                return True
            try:
                message = self._inbox.get(timeout=left_s)
            except queue.Empty:
                return True
            match message:
                case Submit():
                    self._score_prompt(message)
                    self._answers[message.seq_id] = Answer(message)
                    if len(self._answers) == 1:
                        until_s = (time.monotonic() // step_s + 1) * step_s
                case Abort() | Finish():
                    self._answers.pop(message.seq_id, None)
                case GetStats():
                    stats = EngineStats.of_nothing(1)
                    self._deliver(StatsReply(reply_id=message.reply_id, stats=stats))
                case Shutdown():
                    return False

    def _score_prompt(self, submit: Submit) -> None:
        count = submit.sampling.num_prompt_logprobs
        if count is None:
            return
        num_scored = len(submit.prompt_token_ids) - 1
        for first in range(0, num_scored, CHUNK):
            length = min(CHUNK, num_scored - first)
            ids_K = np.arange(NUM_SPECIAL, NUM_SPECIAL + count, dtype=np.int32)
            scores_K = np.linspace(-0.5, -5.5, count, dtype=np.float32)
            self._deliver(
                PromptLogprobs(
                    seq_id=submit.seq_id,
                    first=first + 1,
                    token_P=np.full(length, -0.123456, np.float32),
                    top_ids_PK=np.tile(ids_K, (length, 1)),
                    top_PK=np.tile(scores_K, (length, 1)),
                )
            )

    def _step(self) -> None:
        drawn = {seq_id: answer.next() for seq_id, answer in self._answers.items()}
        self._deliver(
            TokenEvents(
                seq_ids=tuple(drawn),
                token_ids=tuple(token_id for token_id, _, _ in drawn.values()),
                finish_reasons=tuple(reason for _, reason, _ in drawn.values()),
                logprobs=tuple(logprobs for _, _, logprobs in drawn.values()),
            )
        )
        for seq_id, (_, reason, _) in drawn.items():
            if reason is not None:
                del self._answers[seq_id]


def survey(order: SurveyLayouts) -> LayoutSurvey:
    raise NotImplementedError("one device has one layout")


module = types.ModuleType("pipeserve.engine_half")
module.EngineHalf, module.survey = FakeHalf, survey  # type: ignore[attr-defined]
sys.modules[module.__name__] = module
if "serve" not in sys.argv:
    engine_child.main()
engine_process.child_command = lambda: [sys.executable, __file__, str(step_s)]
main()
