"""Numbered: lets one engine after another use the same pipeline.

Steps go down on the engine's thread and come up on the pipeline's.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from pipeserve.bench.timeline import Timeline, WatchedPipeline
from pipeserve.core.batch import LateOutput, MicroBatch, PipelineFacts, StageFailure, StepOutput
from pipeserve.engine.engine import Inbox, Pipeline


class Numbered:
    """A pipeline that engines use one after another: steps count from 0 for each of them, and on
    for the stages. Knows when it is empty."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._changed = threading.Condition()
        self._num_submitted = 0
        self._num_owed = 0
        """Outputs of steps that were submitted."""
        self._first_step = 0
        """The stages' number of the present engine's step 0."""
        self.timeline = Timeline()

    def begin(self, pipeline: Pipeline, facts: PipelineFacts) -> WatchedPipeline:
        """The pipeline for the next engine; the last one has ended and left nothing in it."""
        assert self._num_owed == 0, "the pipeline is empty"
        self._first_step = self._num_submitted
        return WatchedPipeline(_Shifted(self, pipeline, facts), self.timeline)

    def shift(self, batch: MicroBatch) -> MicroBatch:
        """As the stages are to see it. On the engine's thread."""
        self._num_submitted += 1
        with self._changed:
            self._num_owed += 1 if batch.late_seqs_L is None else 2
        first, needs_step = self._first_step, batch.needs_step
        return replace(
            batch,
            step_id=first + batch.step_id,
            needs_step=None if needs_step is None else first + needs_step,
        )

    def post(self, item: StepOutput | LateOutput | StageFailure) -> None:
        """What comes out of the pipeline, for the engine. On the pipeline's threads."""
        if isinstance(item, StageFailure):
            self._inbox.put(item)
            return
        output = replace(item, step_id=item.step_id - self._first_step)
        if isinstance(output, StepOutput):
            self.timeline.take(output)
        self._inbox.put(output)
        with self._changed:
            self._num_owed -= 1
            self._changed.notify_all()

    def wait_until_empty(self, timeout_s: float) -> None:
        """Until all outputs are back; gives up where some never come."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_owed == 0, timeout_s)


class _Shifted:
    def __init__(self, numbered: Numbered, pipeline: Pipeline, facts: PipelineFacts) -> None:
        self._numbered = numbered
        self._pipeline = pipeline
        self.facts = facts

    def submit(self, batch: MicroBatch) -> None:
        self._pipeline.submit(self._numbered.shift(batch))

    def describe_stall(self) -> str:
        return self._pipeline.describe_stall()
