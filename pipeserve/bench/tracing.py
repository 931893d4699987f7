"""Traces the kernels of a steady decode by torch.profiler, which sees every thread's.

The trace is started and ended on the caller's thread while the engine runs.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from pipeserve.bench.profile import CardProfile, Interval, make_profile
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    EngineMessage,
    FrontMessage,
    Submit,
    TokenEvents,
)
from pipeserve.errors import StageFailedError, StageStalledError

SETTLE_STEPS = 8
"""Before the trace begins, and again between that and the window that counts."""
WINDOW_STEPS = 50
MOST_TOKENS = 4096
"""A sequence's output while it is traced, where as much fits: beginning a trace takes a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotTraced:
    """Why there is no profile."""

    num_concurrent: int
    reason: str


Profile = CardProfile | NotTraced


class SteadyDecode:
    """A batch that decodes until it is stopped, and the moments of its steps.

    A step is over when there is one more token for every sequence, in however many micro-batches.
    `deliver` is called on the engine's thread, the other methods on the caller's.
    """

    def __init__(self, *, post: Callable[[FrontMessage], None], batch: Sequence[Submit]) -> None:
        self._post = post
        self._seq_ids = {submission.seq_id for submission in batch}
        self._batch = batch
        self._changed = threading.Condition()
        self._not_started = set(self._seq_ids)
        self._num_tokens = 0
        self._steps_ns: list[int] = []
        self._has_ended = False
        self._failure: EngineFailed | None = None

    def start(self) -> None:
        """Submit the sequences."""
        for submission in self._batch:
            self._post(submission)

    def stop(self) -> None:
        """Abort them."""
        for seq_id in self._seq_ids:
            self._post(Abort(seq_id=seq_id))

    def deliver(self, message: EngineMessage) -> None:
        """Take a message from the engine."""
        with self._changed:
            if isinstance(message, TokenEvents):
                self._take_tokens(message)
            elif isinstance(message, EngineFailed):
                self._failure = message
            self._changed.notify_all()

    def _take_tokens(self, events: TokenEvents) -> None:
        own = self._seq_ids.intersection(events.seq_ids)
        if not own:  # the last tokens of a batch before this one
            return
        self._has_ended |= any(reason is not None for reason in events.finish_reasons)
        if self._not_started:
            self._not_started -= own
            return
        self._num_tokens += len(own)
        if self._num_tokens >= (len(self._steps_ns) + 1) * len(self._seq_ids):
            self._steps_ns.append(time.time_ns())

    @property
    def num_steps(self) -> int:
        """Steps that are over."""
        with self._changed:
            return len(self._steps_ns)

    def wait_for(self, step: int) -> int | None:
        """When that step was over, by time.time_ns, the first being step 1; None if a sequence
        ended before.

        Raises:
            StageFailedError, StageStalledError: the engine died.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self._has_ended or len(self._steps_ns) >= step
            )
            if self._failure is not None:
                kind = StageStalledError if self._failure.stalled else StageFailedError
                raise kind(self._failure.error)
            return self._steps_ns[step - 1] if len(self._steps_ns) >= step else None


def trace_decode(
    steady: SteadyDecode, *, num_concurrent: int, devices: Sequence[torch.device]
) -> tuple[Profile, ...]:
    """One profile per CUDA card among the devices, or why there is none."""
    cards = sorted({device.index for device in devices if device.type == "cuda"})
    if not cards:
        return (NotTraced(num_concurrent=num_concurrent, reason="no stage is on a CUDA card"),)
    if ProfilerActivity.CUDA not in supported_activities():  # type: ignore[no-untyped-call]
        reason = "torch was built without CUPTI, the library that traces kernels"
        return (NotTraced(num_concurrent=num_concurrent, reason=reason),)
    traced = _trace_window(steady)
    if traced is None:
        reason = (
            "the sequences ended before the trace did; shorten --prompt, take a smaller batch, or "
            "raise kv_cache_bytes"
        )
        return (NotTraced(num_concurrent=num_concurrent, reason=reason),)
    length_us, intervals = traced
    return tuple(_profile_card(card, intervals[card], length_us, num_concurrent) for card in cards)


def _trace_window(steady: SteadyDecode) -> tuple[float, Mapping[int, list[Interval]]] | None:
    """The window's length, and what each card did, by its number and in microseconds from the
    window's begin; None if the sequences ended too soon."""
    _trace_nothing()
    tracer = profile(activities=[ProfilerActivity.CUDA])
    steady.start()
    try:
        if steady.wait_for(SETTLE_STEPS) is None:
            return None
        tracer.start()
        try:
            first = steady.num_steps + SETTLE_STEPS
            begin_ns, end_ns = steady.wait_for(first), steady.wait_for(first + WINDOW_STEPS)
        finally:
            tracer.stop()
    finally:
        steady.stop()
    if begin_ns is None or end_ns is None:
        return None
    return (end_ns - begin_ns) / 1e3, _read_intervals(tracer, begin_ns)


def _trace_nothing() -> None:
    """The first trace of a process takes seconds to begin."""
    with profile(activities=[ProfilerActivity.CUDA]):
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()


def _read_intervals(tracer: profile, begin_ns: int) -> Mapping[int, list[Interval]]:
    by_card: defaultdict[int, list[Interval]] = defaultdict(list)
    results = tracer.profiler.kineto_results if tracer.profiler is not None else None
    for event in results.events() if results is not None else ():
        if event.device_type() == DeviceType.CUDA:
            # Nanoseconds since 1970, as time.time_ns: too many for a float.
            start_us = (event.start_ns() - begin_ns) / 1e3
            by_card[event.device_index()].append(
                Interval(
                    name=event.name(),
                    start_us=start_us,
                    end_us=start_us + event.duration_ns() / 1e3,
                )
            )
    return by_card


def _profile_card(
    card: int, intervals: Sequence[Interval], length_us: float, num_concurrent: int
) -> Profile:
    if not any(one.end_us > 0.0 and one.start_us < length_us for one in intervals):
        reason = (
            f"the trace holds {len(intervals)} kernels of cuda:{card}, none of them in the window: "
            "CUPTI, the library that traces kernels, is missing, or another profiler has it"
        )
        return NotTraced(num_concurrent=num_concurrent, reason=reason)
    return make_profile(
        intervals,
        device=f"cuda:{card}",
        num_concurrent=num_concurrent,
        num_steps=WINDOW_STEPS,
        window_us=(0.0, length_us),
    )
