"""Recorder: submits one run's sequences to the engine and writes down what comes back, and when.

From the first submission on it lives on the engine's thread and only appends, so that measuring
costs next to nothing; figures.py computes afterwards.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeserve.bench.workload import Load
from pipeserve.engine.messages import (
    EngineFailed,
    EngineMessage,
    FrontMessage,
    GetStats,
    StatsReply,
    Submit,
    TokenEvents,
)
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import StageFailedError, StageStalledError


class Moment(enum.IntEnum):
    """Where the engine's counters are read during a run."""

    BEGIN = 0
    """Just before the first submission."""
    ALL_STARTED = 1
    """Every sequence of a batch, or every client's first, has had its first token."""
    ALL_SUBMITTED = 2
    """From here on nothing replaces a sequence that ends."""
    END = 3
    """The last token has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment, and the engine's counters just after it."""

    time_s: float
    stats: EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step sampled: one token for each of these sequences."""

    time_s: float
    seq_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A finished run; times by time.monotonic."""

    submitted_s: Mapping[int, float]
    """By seq_id."""
    steps: Sequence[Step]
    marks: Mapping[Moment, Mark]


class Recorder:
    """One run. `post` takes a message to the engine; the engine's messages go to `deliver`."""

    def __init__(
        self, *, post: Callable[[FrontMessage], None], load: Load, submissions: Sequence[Submit]
    ) -> None:
        self._post = post
        self._first = submissions[: load.num_concurrent]
        self._rest = list(reversed(submissions[load.num_concurrent :]))
        self._num_live = len(self._first)
        self._not_started = {submission.seq_id for submission in self._first}
        self._submitted_s: dict[int, float] = {}
        self._steps: list[Step] = []
        self._moments_s: dict[Moment, float] = {}
        self._marks: dict[Moment, Mark] = {}
        self._failure: EngineFailed | None = None
        self._is_done = threading.Event()

    def run(self) -> Recording:
        """Submit what is due at once and wait for the end. Called on any thread but the engine's.

        Raises:
            StageFailedError, StageStalledError: the engine died.
        """
        self._mark(Moment.BEGIN)
        if not self._rest:
            self._mark(Moment.ALL_SUBMITTED)
        self._submitted_s = dict.fromkeys(self._not_started, time.monotonic())
        for submission in self._first:
            self._post(submission)
        self._is_done.wait()
        if self._failure is not None:
            kind = StageStalledError if self._failure.stalled else StageFailedError
            raise kind(self._failure.error)
        return Recording(submitted_s=self._submitted_s, steps=self._steps, marks=self._marks)

    def deliver(self, message: EngineMessage) -> None:
        """Take a message from the engine; on its thread."""
        match message:
            case TokenEvents():
                self._take_tokens(message)
            case StatsReply():
                moment = Moment(message.reply_id)
                self._marks[moment] = Mark(time_s=self._moments_s[moment], stats=message.stats)
                if moment is Moment.END:
                    self._is_done.set()
            case EngineFailed():
                self._failure = message
                self._is_done.set()

    def _take_tokens(self, events: TokenEvents) -> None:
        self._steps.append(Step(time_s=time.monotonic(), seq_ids=events.seq_ids))
        if self._not_started:
            self._not_started.difference_update(events.seq_ids)
            if not self._not_started:
                self._mark(Moment.ALL_STARTED)
        for reason in events.finish_reasons:
            if reason is not None:
                self._replace()

    def _replace(self) -> None:
        """A sequence ended: submit the next, if there is one."""
        if not self._rest:
            self._num_live -= 1
            if self._num_live == 0:
                self._mark(Moment.END)
            return
        submission = self._rest.pop()
        self._submitted_s[submission.seq_id] = time.monotonic()
        self._post(submission)
        if not self._rest:
            self._mark(Moment.ALL_SUBMITTED)

    def _mark(self, moment: Moment) -> None:
        self._moments_s[moment] = time.monotonic()
        self._post(GetStats(reply_id=moment))
