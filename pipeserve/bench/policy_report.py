"""Prints policies beside each other: a Markdown table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from pipeserve.bench.policies import OURS
from pipeserve.bench.policy_runs import PolicyCase, PolicyResult
from pipeserve.bench.schedule_figures import ScheduleFigures

NOTE = """\
Tokens/s: generated ones and the prompts of sequences that started, while steady (from every
client's first token to the last submission, or from the first to the last arrival). TTFT, ITL: p50
/ p99 of the requests submitted and the tokens that came in that time. Busy: its share that each
stage worked. Rows: of a step that decodes. Preempted, cached: in the whole run."""

_COLUMNS = (
    *("load", "policy", "tokens/s", "to ours", "TTFT, ms", "ITL, ms", "stages busy", "rows"),
    *("preempted", "cached"),
)


def as_json(result: PolicyResult) -> str:
    """Every figure under its name in ScheduleFigures."""
    values = asdict(result)
    return json.dumps(values, indent=2)


def as_markdown(result: PolicyResult) -> str:
    """A line for each run, under its load; ratios to our run of the same round."""
    facts = result.facts
    lines = [
        (
            f"{result.about}: {facts.num_blocks * facts.block_size} KV tokens, "
            f"{facts.max_batch_tokens} tokens per micro-batch; clients submit for "
            f"{result.run_s:g} s in each run, mixed prompts for twice as long."
        ),
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---|---|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for (about, _), group in groupby(result.cases, key=lambda case: (case.about, case.round)):
        cases = list(group)
        for case in cases:
            cells = (about if case is cases[0] else "", *_cells(case, cases))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join((*lines, "", NOTE))


def progress_line(case: PolicyCase) -> str:
    """One finished run, while others are still to come."""
    return (
        f"{case.load}, {case.policy}: {case.figures.steady_tokens_per_s:.0f} tokens/s, "
        f"{case.figures.num_requests} requests in {case.figures.duration_s:.1f} s"
    )


def _cells(case: PolicyCase, cases: Sequence[PolicyCase]) -> tuple[str, ...]:
    figures = case.figures
    ours = next((each.figures for each in cases if each.policy == OURS), None)
    return (
        case.policy,
        f"{figures.steady_tokens_per_s:,.0f}",
        "-" if ours is None else f"{figures.steady_tokens_per_s / ours.steady_tokens_per_s:.2f}",
        f"{figures.ttft_p50_ms:.0f} / {figures.ttft_p99_ms:.0f}",
        _itl(figures),
        " / ".join(f"{100 * share:.1f}" for share in figures.stage_busy) + " %",
        f"{figures.rows_per_step:.1f}",
        str(figures.num_preemptions),
        f"{case.cached_share:.0%}",
    )


def _itl(figures: ScheduleFigures) -> str:
    if figures.itl_p50_ms is None:
        return "-"
    return f"{figures.itl_p50_ms:.1f} / {figures.itl_p99_ms:.1f}"
