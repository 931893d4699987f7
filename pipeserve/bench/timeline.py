"""Timeline: which stage worked on which micro-batch when, and its picture.

Listens to what goes into a pipeline and what comes out, on the engine's and the collecting thread,
and only appends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from pipeserve.bench.schedule_run import TimedStep, work_of
from pipeserve.core.batch import MicroBatch, PipelineFacts, Span, StepOutput
from pipeserve.engine.engine import Pipeline

WINDOW_S = 0.25
"""Length of the piece that is drawn: from the middle of what was recorded."""
_WIDTH, _LANE, _LEFT, _TOP = 1600, 46, 70, 40
_COLOURS = {"decode": "#4878a8", "mixed": "#8a6fae", "prefill": "#d08840"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One stage's work on one micro-batch."""

    step_id: int
    stage: int
    start_s: float
    end_s: float
    num_decode_rows: int
    num_prefill_tokens: int

    @property
    def kind(self) -> str:
        if self.num_prefill_tokens == 0:
            return "decode"
        return "mixed" if self.num_decode_rows else "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passage:
    """A step that has left the pipeline."""

    batch: MicroBatch
    submitted_s: float
    spans: tuple[Span, ...]


class Timeline:
    """Every step whose output has come since the last `clear`; times by time.monotonic."""

    def __init__(self) -> None:
        self._submitted: dict[int, tuple[MicroBatch, float]] = {}
        self._passages: list[_Passage] = []

    def clear(self) -> None:
        """Forget the steps so far."""
        self._passages = []

    def note(self, batch: MicroBatch) -> None:
        """A step is about to be submitted."""
        self._submitted[batch.step_id] = (batch, time.monotonic())

    def take(self, output: StepOutput) -> None:
        """A step has left the pipeline."""
        batch, submitted_s = self._submitted.pop(output.step_id)
        self._passages.append(
            _Passage(batch=batch, submitted_s=submitted_s, spans=output.stage_spans)
        )

    def steps(self) -> list[TimedStep]:
        """In order. Counts their work only now, so that a run is not slowed down by it."""
        return [
            TimedStep(
                step_id=passage.batch.step_id,
                work=work_of(passage.batch),
                submitted_s=passage.submitted_s,
                spans=passage.spans,
            )
            for passage in self._passages
        ]


def bars_of(steps: Iterable[TimedStep]) -> list[Bar]:
    """One for every stage of every step."""
    return [
        Bar(
            step_id=step.step_id,
            stage=stage,
            start_s=span.start_s,
            end_s=span.end_s,
            num_decode_rows=step.work.num_decode_rows,
            num_prefill_tokens=step.work.num_prefill_tokens,
        )
        for step in steps
        for stage, span in enumerate(step.spans)
    ]


class WatchedPipeline:
    """A pipeline as the engine sees it; what it submits is noted."""

    def __init__(self, pipeline: Pipeline, timeline: Timeline) -> None:
        self._pipeline = pipeline
        self._timeline = timeline

    @property
    def facts(self) -> PipelineFacts:
        return self._pipeline.facts

    def submit(self, batch: MicroBatch) -> None:
        self._timeline.note(batch)
        self._pipeline.submit(batch)

    def describe_stall(self) -> str:
        return self._pipeline.describe_stall()


def middle(bars: Sequence[Bar], window_s: float = WINDOW_S) -> list[Bar]:
    """Bars that lie in the middle window_s of the recording."""
    centre_s = (min(bar.start_s for bar in bars) + max(bar.end_s for bar in bars)) / 2
    first_s, last_s = centre_s - window_s / 2, centre_s + window_s / 2
    return [bar for bar in bars if bar.end_s > first_s and bar.start_s < last_s]


def busy_shares(bars: Sequence[Bar], num_stages: int) -> list[float]:
    """Of the time from the first to the last of these bars; a stage's bars do not overlap."""
    first_s, last_s = min(bar.start_s for bar in bars), max(bar.end_s for bar in bars)
    worked_s = [0.0] * num_stages
    for bar in bars:
        worked_s[bar.stage] += bar.end_s - bar.start_s
    return [each / (last_s - first_s) for each in worked_s]


def as_svg(bars: Sequence[Bar], *, num_stages: int, title: str) -> str:
    """One lane per stage, one bar per micro-batch."""
    first_s, last_s = min(bar.start_s for bar in bars), max(bar.end_s for bar in bars)
    scale = (_WIDTH - _LEFT - 20) / (last_s - first_s)
    height = _TOP + num_stages * _LANE + 40
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            'font-family="sans-serif" font-size="12">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        *_legend(),
    ]
    for stage, share in enumerate(busy_shares(bars, num_stages)):
        y = _TOP + stage * _LANE + _LANE // 2
        lines.append(f'<text x="4" y="{y - 4}">stage {stage}</text>')
        lines.append(f'<text x="4" y="{y + 10}">{share:.1%}</text>')
    for bar in bars:
        x, width = _LEFT + (bar.start_s - first_s) * scale, (bar.end_s - bar.start_s) * scale
        about = (
            f"step {bar.step_id}: {bar.num_decode_rows} decode rows, {bar.num_prefill_tokens} "
            f"prefill tokens, {(bar.end_s - bar.start_s) * 1e3:.2f} ms"
        )
        lines.append(
            f'<rect x="{x:.2f}" y="{_TOP + bar.stage * _LANE}" width="{max(width, 0.2):.2f}" '
            f'height="{_LANE - 8}" fill="{_COLOURS[bar.kind]}" stroke="white" '
            f'stroke-width="0.5"><title>{about}</title></rect>'
        )
    lines += [*_axis(last_s - first_s, scale, height), "</svg>"]
    return "\n".join(lines) + "\n"


def _legend() -> Iterable[str]:
    for index, (kind, colour) in enumerate(_COLOURS.items()):
        x = _WIDTH - 300 + index * 95
        yield f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 17}" y="20">{kind}</text>'


def _axis(length_s: float, scale: float, height: int) -> Iterable[str]:
    steps_ms = (1, 2, 5, 10, 20, 50, 100, 1000)
    step_ms = next((step for step in steps_ms if length_s * 1e3 / step <= 30), 100_000)
    for tick in range(int(length_s * 1e3 / step_ms) + 1):
        x = _LEFT + tick * step_ms * scale / 1e3
        yield f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{tick * step_ms}</text>'
    yield f'<text x="4" y="{height - 12}">ms</text>'
