"""Link: the way from one stage's thread to the next one's, or from the engine to the first stage.

A micro-batch and what belongs to it; how a tensor crosses devices is its transfer's matter.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass

from pipeserve.core.batch import MicroBatch
from pipeserve.runtime.step_clock import ReadSpan
from pipeserve.runtime.transfer import Arrival


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Handoff:
    """A micro-batch on its way down the pipeline."""

    batch: MicroBatch
    hidden_TD: Arrival | None
    """The previous stage's output; None before the first stage."""
    spans: tuple[ReadSpan, ...]
    """What each stage so far knows of its time on the step."""


class Link:
    """First in, first out: the order of steps is the correctness of KV blocks and rows.

    `send` never blocks. What lies in a link is bounded by the micro-batches that the engine keeps
    in flight, so a transfer's ring of as many buffers, plus the one being filled, is deep enough.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Handoff | None] = queue.SimpleQueue()
        self._is_closed = False

    def send(self, handoff: Handoff) -> None:
        """Pass a micro-batch on."""
        self._queue.put(handoff)

    def receive(self) -> Handoff | None:
        """Wait for the next micro-batch; None once the link is closed, even if some are left."""
        handoff = self._queue.get()
        return None if self._is_closed else handoff

    def close(self) -> None:
        """Wake the receiver and end the link."""
        self._is_closed = True
        self._queue.put(None)
