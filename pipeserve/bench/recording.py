"""Recorder: submits one run's sequences to the engine and writes down what comes back, and when.

From the first submission on it lives on the engine's thread and only appends, so that measuring
costs next to nothing; figures.py computes afterwards.
"""

from __future__ import annotations

import enum
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeserve.bench.arrivals import Request, Trace
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
    """Every sequence of a batch, or every client's first, has had its first token; of sequences
    that arrive one by one, BEGIN."""
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

    requests: Mapping[int, Request]
    """Those that were submitted, by seq_id, in the order of the trace; arrivals from the first."""
    num_clients: int | None
    """Of a closed loop."""
    submitted_s: Mapping[int, float]
    """By seq_id."""
    steps: Sequence[Step]
    marks: Mapping[Moment, Mark]
    chained: frozenset[int] = frozenset()
    """Sequences that a chain of samplers draws."""


class Recorder:
    """One run. `post` takes a message to the engine; the engine's messages go to `deliver`."""

    def __init__(
        self,
        *,
        post: Callable[[FrontMessage], None],
        trace: Trace,
        submissions: Sequence[Submit],
        most_s: float = math.inf,
    ) -> None:
        """submissions: one for each request of the trace. most_s: clients submit no longer."""
        self._post = post
        self._num_clients = trace.num_clients
        self._most_s = most_s
        num_first = trace.num_first
        if trace.num_clients is None:
            num_first = sum(request.arrival_s == 0.0 for request in trace.requests)
        self._submissions = submissions
        self._arrivals_s = [request.arrival_s for request in trace.requests]
        self._num_due = num_first
        """Of them, submitted by now, or about to be."""
        self._num_ended = 0
        self._num_expected = len(submissions)
        self._not_started = {submission.seq_id for submission in submissions[:num_first]}
        self._submitted_s: dict[int, float] = {}
        self._steps: list[Step] = []
        self._moments_s: dict[Moment, float] = {}
        self._marks: dict[Moment, Mark] = {}
        self._failure: EngineFailed | None = None
        self._is_done = threading.Event()

    def run(self) -> Recording:
        """Submit what is due and wait for the end. Called on any thread but the engine's.

        Raises:
            StageFailedError, StageStalledError: the engine died.
        """
        self._mark(Moment.BEGIN)
        if not self._not_started:
            self._mark(Moment.ALL_STARTED)
        if self._num_due == len(self._submissions):
            self._mark(Moment.ALL_SUBMITTED)
        first = self._submissions[: self._num_due]
        began_s = time.monotonic()
        self._submitted_s = {submission.seq_id: began_s for submission in first}
        for submission in first:
            self._post(submission)
        if self._num_clients is None:
            self._submit_arrivals(began_s)
        self._is_done.wait()
        if self._failure is not None:
            kind = StageStalledError if self._failure.stalled else StageFailedError
            raise kind(self._failure.error)
        return Recording(
            requests=self._requests(),
            num_clients=self._num_clients,
            submitted_s=self._submitted_s,
            steps=self._steps,
            marks=self._marks,
            chained=frozenset(each.seq_id for each in self._submissions if each.sampling.chain),
        )

    def _submit_arrivals(self, began_s: float) -> None:
        """Each when it is due, unless the engine dies before."""
        last = len(self._submissions) - 1
        for index in range(self._num_due, last + 1):
            wait_s = began_s + self._arrivals_s[index] - time.monotonic()
            if self._is_done.wait(max(0.0, wait_s)):
                return
            if index == last:  # before it, since nothing may follow its end
                self._mark(Moment.ALL_SUBMITTED)
            self._submit(self._submissions[index])

    def _submit(self, submission: Submit) -> None:
        self._submitted_s[submission.seq_id] = time.monotonic()
        self._post(submission)

    def _requests(self) -> dict[int, Request]:
        began_s = min(self._submitted_s.values())
        return {
            submission.seq_id: Request(
                arrival_s=self._submitted_s[submission.seq_id] - began_s,
                num_prompt_tokens=len(submission.prompt_token_ids),
                num_output_tokens=submission.sampling.max_tokens,
            )
            for submission in self._submissions
            if submission.seq_id in self._submitted_s
        }

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
                self._take_end()

    def _take_end(self) -> None:
        """A sequence ended: its client submits the next, if there is one and time for it."""
        self._num_ended += 1
        if self._num_clients is not None and self._num_due < self._num_expected:
            if time.monotonic() - self._moments_s[Moment.BEGIN] < self._most_s:
                self._submit(self._submissions[self._num_due])
                self._num_due += 1
            else:
                self._num_expected = self._num_due
            if self._num_due == self._num_expected:
                self._mark(Moment.ALL_SUBMITTED)
        if self._num_ended == self._num_expected:
            self._mark(Moment.END)

    def _mark(self, moment: Moment) -> None:
        self._moments_s[moment] = time.monotonic()
        self._post(GetStats(reply_id=moment))
