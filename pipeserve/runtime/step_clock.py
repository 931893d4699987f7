"""StepClock: when a stage worked on a step, by the host's clock on a CPU, by events on a GPU.

Started and stopped on the stage's thread, in the order of the steps; read in the same order once
each step has left the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from pipeserve.core.batch import Span

ReadSpan = Callable[[], Span]
"""To be asked once for each step, in order, and only when the step's results are there."""


class StepClock(Protocol):
    """One stage's."""

    def start(self) -> Callable[[], ReadSpan]:
        """The stage begins with a step; the returned function ends it."""
        ...


def make_clock(device: torch.device) -> StepClock:
    """On a GPU: for the current stream."""
    return EventClock() if device.type == "cuda" else HostClock()


class HostClock:
    """For a stage that is done with a step when its call returns."""

    def start(self) -> Callable[[], ReadSpan]:
        started_s = time.monotonic()

        def stop() -> ReadSpan:
            span = Span(start_s=started_s, end_s=time.monotonic())
            return lambda: span

        return stop


class EventClock:
    """For a stage that only launches. Each event's time is told from the one before it, since the
    distance of two events is a float32 of milliseconds and gets coarse over hours."""

    def __init__(self) -> None:
        self._last = _record()
        self._last.synchronize()
        self._last_s = time.monotonic()

    def start(self) -> Callable[[], ReadSpan]:
        first = _record()

        def stop() -> ReadSpan:
            last = _record()
            return lambda: self._read(first, last)

        return stop

    def _read(self, first: torch.cuda.Event, last: torch.cuda.Event) -> Span:
        last.synchronize()
        start_s = self._last_s + self._last.elapsed_time(first) / 1e3
        self._last, self._last_s = last, start_s + first.elapsed_time(last) / 1e3
        return Span(start_s=start_s, end_s=self._last_s)


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
