"""What steps and waits took: bubbles, hand-offs, rows per micro-batch, waiting time per account.

StepRecorder is owned by the engine thread; StepFigures is what it has found so far. The clock is
what both are told.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeserve.core.batch import MicroBatch, Span

ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of the buckets that micro-batches are counted in by their rows."""

MAX_ACCOUNTS = 256
OTHER_ACCOUNTS = "(others)"
"""Accounts beyond the first MAX_ACCOUNTS are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """How long sequences of one account waited for their first row."""

    count: int = 0
    sum_s: float = 0.0

    def plus(self, other: Wait) -> Wait:
        return Wait(count=self.count + other.count, sum_s=self.sum_s + other.sum_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """Counters since the engine's start; per stage as EngineStats.stage_busy_s."""

    stage_bubble_s: tuple[float, ...] = ()
    """Seconds that a stage did nothing while a step was in flight: known once the next one has
    come back."""
    stage_hand_off_s: tuple[float, ...] = ()
    """Seconds from when a step had left the stage before and this stage was free to when the step
    began here; 0 for the first stage."""
    row_counts: tuple[int, ...] = (0,) * (len(ROW_BOUNDS) + 1)
    """Micro-batches by their rows, one bucket for each of ROW_BOUNDS and one for more."""
    num_rows: int = 0
    """Of all micro-batches together."""
    waits: Mapping[str, Wait] = field(default_factory=dict)
    """By account."""

    def with_past(self, past: StepFigures) -> StepFigures:
        """And those of the same stages' earlier lives."""
        return StepFigures(
            stage_bubble_s=_add_up(self.stage_bubble_s, past.stage_bubble_s),
            stage_hand_off_s=_add_up(self.stage_hand_off_s, past.stage_hand_off_s),
            row_counts=tuple(map(sum, zip(self.row_counts, past.row_counts, strict=True))),
            num_rows=self.num_rows + past.num_rows,
            waits=_merge([self.waits, past.waits]),
        )


def total_figures(replicas: Sequence[StepFigures]) -> StepFigures:
    """Of all replicas together, one's stages after another's."""
    return StepFigures(
        stage_bubble_s=tuple(s for each in replicas for s in each.stage_bubble_s),
        stage_hand_off_s=tuple(s for each in replicas for s in each.stage_hand_off_s),
        row_counts=tuple(
            map(sum, zip(*(each.row_counts for each in replicas), strict=True)),
        ),
        num_rows=sum(each.num_rows for each in replicas),
        waits=_merge([each.waits for each in replicas]),
    )


def _add_up(now: tuple[float, ...], past: tuple[float, ...]) -> tuple[float, ...]:
    """An engine that never ran has no stages yet."""
    if not (now and past):
        return now or past
    return tuple(map(sum, zip(now, past, strict=True)))


def _merge(parts: Iterable[Mapping[str, Wait]]) -> dict[str, Wait]:
    merged: dict[str, Wait] = {}
    for part in parts:
        for account, wait in part.items():
            merged[account] = merged.get(account, Wait()).plus(wait)
    return merged


class StepRecorder:
    """Told of every arrival, micro-batch and output."""

    def __init__(self, num_stages: int) -> None:
        self._busy_s = [0.0] * num_stages
        self._hand_off_s = [0.0] * num_stages
        self._stage_end_s = [0.0] * num_stages
        self._bubble_s = [0.0] * num_stages
        self._active_since_s: float | None = None
        """Since when there has always been a step in flight."""
        self._row_counts = [0] * (len(ROW_BOUNDS) + 1)
        self._num_rows = 0
        self._arrived_s: dict[int, tuple[str, float]] = {}
        self._waits: dict[str, Wait] = {}

    @property
    def stage_busy_s(self) -> tuple[float, ...]:
        return tuple(self._busy_s)

    def note_arrival(self, seq_id: int, account: str, now_s: float) -> None:
        self._arrived_s[seq_id] = (account, now_s)

    def note_end(self, seq_id: int) -> None:
        """Of a sequence, which may still have waited."""
        self._arrived_s.pop(seq_id, None)

    def note_submitted(self, batch: MicroBatch, now_s: float) -> None:
        if self._active_since_s is None:
            self._active_since_s = now_s
        self._row_counts[bisect_left(ROW_BOUNDS, batch.num_rows)] += 1
        self._num_rows += batch.num_rows
        for start in batch.starts:
            arrival = self._arrived_s.pop(start.seq_id, None)
            if arrival is not None:  # else it had a row before
                self._note_wait(arrival[0], now_s - arrival[1])

    def note_output(self, spans: Sequence[Span], now_s: float, *, is_idle: bool) -> None:
        """A step came back; is_idle: no other is in flight."""
        assert self._active_since_s is not None, "what comes back was submitted"
        for stage, span in enumerate(spans):
            free_s = max(self._stage_end_s[stage], self._active_since_s)
            self._busy_s[stage] += span.length_s
            self._bubble_s[stage] += max(0.0, span.start_s - free_s)
            if stage > 0:
                free_s = max(self._stage_end_s[stage], spans[stage - 1].end_s)
                self._hand_off_s[stage] += max(0.0, span.start_s - free_s)
            self._stage_end_s[stage] = span.end_s
            if is_idle:  # what was left for the others to do
                self._bubble_s[stage] += max(0.0, now_s - span.end_s)
        if is_idle:
            self._active_since_s = None

    def figures(self) -> StepFigures:
        return StepFigures(
            stage_bubble_s=tuple(self._bubble_s),
            stage_hand_off_s=tuple(self._hand_off_s),
            row_counts=tuple(self._row_counts),
            num_rows=self._num_rows,
            waits=dict(self._waits),
        )

    def _note_wait(self, account: str, wait_s: float) -> None:
        if account not in self._waits and len(self._waits) >= MAX_ACCOUNTS:
            account = OTHER_ACCOUNTS
        self._waits[account] = self._waits.get(account, Wait()).plus(Wait(count=1, sum_s=wait_s))
