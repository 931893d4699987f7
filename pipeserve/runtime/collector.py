"""Collector: waits for a GPU's sampled ids in the last stage's place, and posts what came out.

Runs on a thread of its own, so that the stage can already launch the next step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeserve.core.batch import LateOutput, StageFailure, StepOutput
from pipeserve.runtime.link import Handoff
from pipeserve.runtime.sampled import Sampled

Post = Callable[[StepOutput | LateOutput | StageFailure], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Awaited:
    """A step that was launched and has not come back."""

    step_id: int
    since_s: float
    """By time.monotonic."""


class Collector:
    """Posts one StepOutput per step, in the order in which they were added."""

    def __init__(self, *, stage: int, device: torch.device, post: Post) -> None:
        """device: of the last stage."""
        self._stage = stage
        self._device = device
        self._post = post
        self._awaited: Awaited | None = None
        self._queue: queue.SimpleQueue[tuple[Handoff, Sampled] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._main, name="collector", daemon=True)

    @property
    def awaited(self) -> Awaited | None:
        """The step that is waited for, None without one. May be read from any thread."""
        return self._awaited

    def add(self, handoff: Handoff, sampled: Sampled) -> None:
        """A step has left the last stage; its ids may still be on their way."""
        self._queue.put((handoff, sampled))

    def close(self) -> None:
        """End the thread after what was added."""
        self._queue.put(None)

    def _main(self) -> None:
        try:
            torch.cuda.set_device(self._device)  # or waiting would set up the first card as well
            while (item := self._queue.get()) is not None:
                handoff, sampled = item
                step_id = handoff.batch.step_id
                self._awaited = Awaited(step_id=step_id, since_s=time.monotonic())
                output = make_output(handoff, sampled)
                self._awaited = None
                self._post(output)
        except Exception as error:
            self._post(StageFailure(stage=self._stage, error=f"{type(error).__name__}: {error}"))


def make_output(handoff: Handoff, sampled: Sampled) -> StepOutput:
    """Wait for the ids and put the step's output together."""
    token_ids = sampled.token_ids()  # waits; where nothing was sampled, the spans do
    logprobs = sampled.step_logprobs()
    late_seqs_L = handoff.batch.late_seqs_L
    if late_seqs_L is not None:
        token_ids = np.delete(token_ids, late_seqs_L)
        logprobs = None if logprobs is None else logprobs.without(late_seqs_L)
    return StepOutput(
        token_ids=token_ids,
        step_id=handoff.batch.step_id,
        logprobs=logprobs,
        prompt_logprobs=sampled.prompt_logprobs(),
        stage_spans=tuple(read() for read in handoff.spans),
    )
