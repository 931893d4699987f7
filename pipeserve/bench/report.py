"""Prints what was measured: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from pipeserve.bench import timeline
from pipeserve.bench.ceilings import Ceilings
from pipeserve.bench.engine import Result
from pipeserve.bench.figures import Figures
from pipeserve.bench.profile import WAIT_US, CardProfile
from pipeserve.bench.tracing import NotTraced, Profile

LEGEND = """\
decode    tokens/s of all sequences, from the first token of the last one to start to the end
          (clients: while all clients are busy); full: only while all sequences decode
prefill   prompt tokens/s until the last sequence has its first token; others decode meanwhile
          (--output 1 measures prefill alone); total: prompt and output over the whole run
TTFT      ms from submission to the first token; ITL: ms between two tokens; p50/p99 of all
busy      share of the decode phase that each stage worked
read      GB/s of weights and KV that full decode steps read, and the share of all cards' copy
          speed (bytes read and written by a copy)
compute   TFLOP/s of prefill, and the share of all cards' bf16 matrix rate"""

_COLUMNS = ("seqs", "decode", "full", "prefill", "total", "TTFT", "ITL", "busy", "read", "compute")


def as_svg(result: Result) -> str:
    """The middle of the last run: every micro-batch of every stage a bar."""
    rate = result.runs[-1].total_tokens_per_s
    title = (
        f"{result.model} on {' + '.join(result.devices)}, "
        f"{result.workload.describe(result.workload.loads[-1])}: {rate:,.0f} tokens/s"
    )
    return timeline.as_svg(
        timeline.middle(result.bars), num_stages=len(result.devices), title=title
    )


def as_json(result: Result) -> str:
    """Every figure under its name in Figures, Ceilings and ModelCosts, and the shares."""
    values = dataclasses.asdict(dataclasses.replace(result, bars=()))
    del values["bars"]  # thousands; they are for the picture
    for run, figures in zip(values["runs"], result.runs, strict=True):
        run["copy_share"] = _share(figures.decode_bytes_per_s, result.copy_bytes_per_s)
        run["matmul_share"] = _share(figures.prefill_flops_per_s, result.matmul_flops_per_s)
    return json.dumps(values, indent=2)


def as_table(result: Result) -> str:
    """One line per run under a line per card, and what the columns mean."""
    lines = [_COLUMNS, *(_cells(figures, result) for figures in result.runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    workload, facts = result.workload, result.facts
    head = (
        f"{result.model}, {result.model_bytes / 1e9:.2f} GB, on {', '.join(result.devices)}: "
        f"{workload.describe_lengths()}, policy {result.policy}, "
        f"{facts.num_blocks * facts.block_size} KV tokens, "
        f"{facts.max_batch_tokens} tokens per micro-batch"
    )
    start = f"loaded in {result.load_s:.1f} s"
    if result.capture_s:
        start += f", of which {result.capture_s:.1f} s to compile kernels and capture graphs"
    lines_above = (head, *map(_card_line, result.ceilings), start)
    beside = [_beside_line(run) for run in result.runs if run.chained_itl_p50_ms is not None]
    return "\n".join(
        (*lines_above, "", *rows, *beside, "", LEGEND, *profile_lines(result.profiles))
    )


def _beside_line(figures: Figures) -> str:
    """What sequences with and without a chain of samplers do to each other."""
    shown = [
        "-" if value is None else f"{value:.2f}"
        for value in (
            *(figures.itl_p50_ms, figures.itl_p99_ms),
            *(figures.chained_itl_p50_ms, figures.chained_itl_p99_ms),
        )
    ]
    return (
        f"{figures.num_concurrent}: ITL {shown[0]}/{shown[1]} of the sequences without a chain of "
        f"samplers, {shown[2]}/{shown[3]} of the others"
    )


def profile_lines(profiles: Sequence[Profile]) -> list[str]:
    """A table of kernels per traced batch and card, or the reason why there is none."""
    lines: list[str] = []
    for profile in profiles:
        if isinstance(profile, NotTraced):
            lines += ["", f"{profile.num_concurrent} at once, not traced: {profile.reason}"]
            continue
        lines += ["", _profile_head(profile)]
        lines.append(f"{'us/step':>9}  {'share':>6}  {'runs/step':>9}  kernel")
        lines += [
            f"{kernel.us_per_step:9.1f}  {kernel.share:6.1%}  {kernel.count_per_step:9.2f}  "
            f"{kernel.name}"
            for kernel in profile.kernels
        ]
    return lines


def _profile_head(profile: CardProfile) -> str:
    return (
        f"{profile.num_concurrent} at once on {profile.device}: {profile.step_us:.0f} us per step "
        f"over {profile.num_steps} traced steps; the GPU is idle {profile.idle_share:.1%} of the "
        f"time, {profile.wait_share:.1%} in gaps of {WAIT_US:g} us and more (it waits)"
    )


def progress_line(figures: Figures) -> str:
    """One finished run, while others are still to come."""
    return (
        f"{figures.num_concurrent or figures.num_sequences} "
        f"{'at once' if figures.num_concurrent else 'one by one'}, {figures.duration_s:.1f} s: "
        f"decode {_number(figures.decode_tokens_per_s)} tokens/s"
    )


def _card_line(ceilings: Ceilings) -> str:
    return (
        f"{ceilings.device}, {ceilings.name}: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 matmul {ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
    )


def _cells(figures: Figures, result: Result) -> tuple[str, ...]:
    read, compute = figures.decode_bytes_per_s, figures.prefill_flops_per_s
    return (
        str(figures.num_concurrent or "-"),
        _number(figures.decode_tokens_per_s),
        _number(figures.full_batch_tokens_per_s),
        _number(figures.prefill_tokens_per_s),
        _number(figures.total_tokens_per_s),
        f"{_number(figures.ttft_p50_ms)}/{_number(figures.ttft_p99_ms)}",
        f"{_number(figures.itl_p50_ms)}/{_number(figures.itl_p99_ms)}",
        "/".join(f"{busy:.0%}" for busy in figures.stage_busy),
        _rate(read, 1e9, _share(read, result.copy_bytes_per_s)),
        _rate(compute, 1e12, _share(compute, result.matmul_flops_per_s)),
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100.0 else f"{value:.1f}"


def _rate(value: float | None, unit: float, share: float | None) -> str:
    if value is None:
        return "-"
    shown = f"{value / unit:.3g}" if value / unit < 100.0 else f"{value / unit:.0f}"
    return shown if share is None else f"{shown} {share:.0%}"


def _share(value: float | None, ceiling: float | None) -> float | None:
    return None if value is None or ceiling is None else value / ceiling
