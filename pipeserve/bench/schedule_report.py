"""Prints what `bench schedule` found: tables for people, JSON for programs, the stages' timeline.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from pipeserve.bench import timeline
from pipeserve.bench.schedule import MEASURED, Case, ScheduleResult

LEGEND = """\
total     prompt and generated tokens/s of the whole run; steady: without its begin and end
bound     steady over the rate at which the slowest stage would never be idle (closed loops)
TTFT      ms from submission to the first token; ITL: ms between two tokens; p50/p99 of all
busy      share of the steady time that each stage worked; bubble: was idle with work to be had
rows      decode rows of a step that has any; preempted: sequences, once for each time"""

_LEAST_BARS = 40
"""To be drawn, where there are as many: slow or rare steps need a longer piece of time."""

_COLUMNS = (
    *("policy", "total", "steady", "bound", "TTFT", "ITL", "busy", "bubble", "rows"),
    "preempted",
)


def as_json(result: ScheduleResult) -> str:
    """Every figure under its name in ScheduleFigures and StageCosts."""
    cases = [
        {"about": case.about, "policy": case.policy, **asdict(case.figures)}
        for case in result.cases
    ]
    costs = asdict(result.costs)
    return json.dumps(
        {"costs": costs, "stage_errors": result.stage_errors, "runs": cases}, indent=2
    )


def as_text(result: ScheduleResult) -> str:
    """The costs, then a table for each trace."""
    lines = _cost_lines(result)
    for about, group in groupby(result.cases, key=lambda case: case.about):
        cases = list(group)
        lines += ["", about, *_table([_COLUMNS, *map(_cells, cases)]), *_comparison(cases)]
    return "\n".join((*lines, "", LEGEND))


def as_svg(case: Case) -> str:
    """The middle of a run: every micro-batch of every stage a bar."""
    title = f"{case.about}, {case.policy}: {case.figures.total_tokens_per_s:,.0f} tokens/s"
    everything = timeline.bars_of(case.run.steps)
    window_s = timeline.WINDOW_S
    while len(bars := timeline.middle(everything, window_s)) < min(_LEAST_BARS, len(everything)):
        window_s *= 2
    return timeline.as_svg(bars, num_stages=case.run.num_stages, title=title)


def _cost_lines(result: ScheduleResult) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (
            "stage",
            "step",
            "row",
            "prefill token",
            "KV position",
            "prefill pair",
            "prefill step",
            "error",
        )
    ]
    for index, stage in enumerate(result.costs.stages):
        error = "-" if result.stage_errors is None else f"{result.stage_errors[index]:.1%}"
        numbers = (f"{1e6 * value:.4g}" for value in asdict(stage).values())
        rows.append((str(index), *numbers, error))
    handoff_us, host_us = 1e6 * result.costs.handoff_s, 1e6 * result.costs.host_s
    return [
        f"us of a step; hand-off {handoff_us:.0f}, host {host_us:.0f}",
        *_table(rows),
    ]


def _cells(case: Case) -> tuple[str, ...]:
    figures = case.figures
    bound = figures.bound_tokens_per_s
    return (
        case.policy,
        f"{figures.total_tokens_per_s:.0f}",
        f"{figures.steady_tokens_per_s:.0f}",
        "-" if bound is None else f"{figures.steady_tokens_per_s / bound:.1%}",
        f"{figures.ttft_p50_ms:.1f}/{figures.ttft_p99_ms:.1f}",
        "-" if figures.itl_p50_ms is None else f"{figures.itl_p50_ms:.1f}/{figures.itl_p99_ms:.1f}",
        "/".join(f"{share:.1%}" for share in figures.stage_busy),
        "/".join(f"{share:.1%}" for share in figures.stage_bubble),
        f"{figures.rows_per_step:.1f}",
        "-" if figures.num_preemptions is None else str(figures.num_preemptions),
    )


def _comparison(cases: Sequence[Case]) -> list[str]:
    """How far off a prediction is, where there is something to compare it with."""
    if cases[0].policy != MEASURED:
        return []
    measured = cases[0].figures
    lines = []
    for case in cases[1:]:
        rate = case.figures.total_tokens_per_s / measured.total_tokens_per_s - 1
        ttft = case.figures.ttft_p50_ms / measured.ttft_p50_ms - 1
        lines.append(f"{case.policy} against measured: total {rate:+.1%}, median TTFT {ttft:+.1%}")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
