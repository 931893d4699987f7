"""SequenceTimer: when the stages worked for each sequence whose times somebody wants to know.

Owned by the engine thread. A step costs a few operations on arrays over its rows, however many
they are, and nothing while no sequence is timed.

Shapes: P phases (prefill, decode), R row slots, S stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeserve.core.batch import MicroBatch, PipelineFacts, Span
from pipeserve.engine.messages import SequenceTimes, StageWork, TraceMark

_Seconds = npt.NDArray[np.float64]
_PREFILL, _DECODE = 0, 1


@dataclass(slots=True, kw_only=True)
class _Line:
    """What a sequence had on one row, or on several one after another."""

    start_PS: _Seconds
    end_PS: _Seconds
    busy_PS: _Seconds
    steps_P: npt.NDArray[np.int64]
    phase: int

    def add(self, other: _Line) -> None:
        np.minimum(self.start_PS, other.start_PS, out=self.start_PS)
        np.maximum(self.end_PS, other.end_PS, out=self.end_PS)
        self.busy_PS += other.busy_PS
        self.steps_P += other.steps_P
        self.phase = other.phase

    def works(self, phase: int) -> tuple[StageWork, ...]:
        num_steps = int(self.steps_P[phase])
        if num_steps == 0:
            return ()
        lines = zip(
            *(each[phase].tolist() for each in (self.start_PS, self.end_PS, self.busy_PS)),
            strict=True,
        )
        return tuple(
            StageWork(start_s=start_s, end_s=end_s, busy_s=busy_s, num_steps=num_steps)
            for start_s, end_s, busy_s in lines
        )


class SequenceTimer:
    """Told of every micro-batch and output. A sequence is in its prefill until its first token."""

    def __init__(self, facts: PipelineFacts) -> None:
        shape_PRS = (2, facts.num_rows, facts.num_stages)
        self._start_PRS = np.zeros(shape_PRS)
        self._end_PRS = np.zeros(shape_PRS)
        self._busy_PRS = np.zeros(shape_PRS)
        self._steps_PR = np.zeros(shape_PRS[:2], np.int64)
        self._phase_R = np.zeros(facts.num_rows, np.int64)
        self._marks: dict[int, TraceMark] = {}
        self._rows: dict[int, int] = {}
        self._owners: dict[int, int] = {}  # row -> sequence
        self._past: dict[int, _Line] = {}
        self._in_flight: deque[MicroBatch | None] = deque()

    def note_arrival(self, seq_id: int, mark: TraceMark) -> None:
        self._marks[seq_id] = mark

    def note_submitted(self, batch: MicroBatch) -> None:
        self._in_flight.append(batch if self._marks else None)

    def note_output(self, spans: Sequence[Span]) -> None:
        """The oldest step in flight came back."""
        batch = self._in_flight.popleft()
        if batch is None or not self._marks or not spans:
            return
        for start in batch.starts:
            self._begin_row(start.row, start.seq_id)
        start_S = np.array([span.start_s for span in spans])
        end_S = np.array([span.end_s for span in spans])
        rows = batch.rows_S
        line = self._phase_R[rows], rows
        self._start_PRS[line] = np.minimum(self._start_PRS[line], start_S)
        self._end_PRS[line] = end_S
        self._busy_PRS[line] += end_S - start_S
        self._steps_PR[line] += 1
        self._phase_R[rows[batch.samples_S]] = _DECODE

    def take(self, seq_id: int, now_s: float) -> SequenceTimes | None:
        """The sequence has ended; None where nobody asked for its times."""
        mark = self._marks.pop(seq_id, None)
        if mark is None:
            return None
        self._leave_row(seq_id)
        line = self._past.pop(seq_id, None)
        if line is None:
            return SequenceTimes(mark=mark, ended_s=now_s)
        return SequenceTimes(
            mark=mark, ended_s=now_s, prefill=line.works(_PREFILL), decode=line.works(_DECODE)
        )

    def _begin_row(self, row: int, seq_id: int) -> None:
        owner = self._owners.get(row)
        if owner is not None:
            self._leave_row(owner)
        if seq_id not in self._marks:
            return
        self._leave_row(seq_id)  # it was preempted
        past = self._past.get(seq_id)
        self._rows[seq_id], self._owners[row] = row, seq_id
        self._start_PRS[:, row] = np.inf
        self._end_PRS[:, row] = -np.inf
        self._busy_PRS[:, row] = 0.0
        self._steps_PR[:, row] = 0
        self._phase_R[row] = _PREFILL if past is None else past.phase

    def _leave_row(self, seq_id: int) -> None:
        row = self._rows.pop(seq_id, None)
        if row is None:
            return
        del self._owners[row]
        line = _Line(
            start_PS=self._start_PRS[:, row].copy(),
            end_PS=self._end_PRS[:, row].copy(),
            busy_PS=self._busy_PRS[:, row].copy(),
            steps_P=self._steps_PR[:, row].copy(),
            phase=int(self._phase_R[row]),
        )
        if seq_id in self._past:
            self._past[seq_id].add(line)
        else:
            self._past[seq_id] = line
