"""Collector: waits for a GPU's sampled ids in the last stage's place, and posts what came out.

Runs on a thread of its own, so that the stage can already launch the next step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from pipeserve.core.batch import StageFailure, StepOutput
from pipeserve.runtime.link import Handoff
from pipeserve.runtime.sampled import Sampled

Post = Callable[[StepOutput | StageFailure], None]


class Collector:
    """Posts one StepOutput per step, in the order in which they were added."""

    def __init__(self, *, stage: int, post: Post) -> None:
        self._stage = stage
        self._post = post
        self._queue: queue.SimpleQueue[tuple[Handoff, Sampled] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._main, name="collector", daemon=True)

    def add(self, handoff: Handoff, sampled: Sampled) -> None:
        """A step has left the last stage; its ids may still be on their way."""
        self._queue.put((handoff, sampled))

    def close(self) -> None:
        """End the thread after what was added."""
        self._queue.put(None)

    def _main(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._post(make_output(*item))
        except Exception as error:
            self._post(StageFailure(stage=self._stage, error=f"{type(error).__name__}: {error}"))


def make_output(handoff: Handoff, sampled: Sampled) -> StepOutput:
    """Wait for the ids and put the step's output together."""
    return StepOutput(
        token_ids=sampled.token_ids(),  # waits, and everything else is there afterwards
        step_id=handoff.batch.step_id,
        logprobs=sampled.step_logprobs(),
        stage_spans=tuple(read() for read in handoff.spans),
    )
