"""What a simulated or recorded run says. Pure arithmetic; every definition stands here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeserve.bench.arrivals import Request, Trace
from pipeserve.bench.schedule_costs import CostModel
from pipeserve.bench.schedule_run import Run, StepWork, row_work, total_work
from pipeserve.core.batch import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleFigures:
    """One run. "Steady" is a closed loop from the moment when every client's first sequence had its
    first token to the last submission; of other traces, from the first to the last arrival, or the
    whole run where all arrive at once."""

    num_requests: int
    duration_s: float
    """From the first submission to the last token."""
    total_tokens_per_s: float
    """Prompt and generated tokens of the whole run over its duration."""
    steady_tokens_per_s: float
    """Tokens generated while steady, and the prompts of sequences that started then."""
    output_tokens_per_s: float
    """Tokens generated while steady."""
    ttft_p50_ms: float
    """From a request's submission to its first token, of all requests."""
    ttft_p99_ms: float
    itl_p50_ms: float | None
    """Between two tokens of a sequence, of all tokens; None without a second token."""
    itl_p99_ms: float | None
    stage_busy: tuple[float, ...]
    """Share of the steady time that each stage worked."""
    stage_bubble: tuple[float, ...]
    """Share of the steady time that each stage was idle while some request had not ended."""
    rows_per_step: float
    """Decode rows, on average over the steps that have any and begin while steady."""
    num_preemptions: int | None
    """None where nobody counted."""
    bound_tokens_per_s: float | None
    """Of a closed loop, see bound_tokens_per_s; None without a cost model."""


def make_figures(
    run: Run,
    *,
    costs: CostModel | None = None,
    num_preemptions: int | None = None,
    skips_start: bool = False,
) -> ScheduleFigures:
    """The figures of a run that has ended. skips_start: latencies are of the requests that were
    submitted, and the tokens that came, in the steady time alone, if there are any."""
    times = _token_times(run)
    steady = _steady(run, times)
    ttft_s, gaps_s = _latencies_s(run, times, steady if skips_start else None)
    first_s, last_s = min(run.submitted_s.values()), max(t.time_s for t in run.tokens)
    num_tokens = sum(r.num_prompt_tokens + r.num_output_tokens for r in run.trace.requests)
    num_steady = sum(len(t.seq_ids) for t in run.tokens if _is_in(t.time_s, steady))
    num_prompt = sum(
        run.trace.requests[seq_id].num_prompt_tokens
        for seq_id, of_one in times.items()
        if _is_in(of_one[0], steady)
    )
    decode_rows = [
        step.work.num_decode_rows
        for step in run.steps
        if step.work.num_decode_rows and _is_in(step.submitted_s, steady)
    ]
    occupied_s = _overlap_s(_occupied(run, times), steady)
    busy_s = [
        _overlap_s((step.spans[stage] for step in run.steps), steady)
        for stage in range(run.num_stages)
    ]
    return ScheduleFigures(
        num_requests=len(run.submitted_s),
        duration_s=last_s - first_s,
        total_tokens_per_s=num_tokens / (last_s - first_s),
        steady_tokens_per_s=(num_steady + num_prompt) / steady.length_s,
        output_tokens_per_s=num_steady / steady.length_s,
        ttft_p50_ms=float(np.percentile(ttft_s, 50)) * 1e3,
        ttft_p99_ms=float(np.percentile(ttft_s, 99)) * 1e3,
        itl_p50_ms=float(np.percentile(gaps_s, 50)) * 1e3 if len(gaps_s) else None,
        itl_p99_ms=float(np.percentile(gaps_s, 99)) * 1e3 if len(gaps_s) else None,
        stage_busy=tuple(each / steady.length_s for each in busy_s),
        stage_bubble=tuple(max(0.0, occupied_s - each) / steady.length_s for each in busy_s),
        rows_per_step=float(np.mean(decode_rows)) if decode_rows else 0.0,
        num_preemptions=num_preemptions,
        bound_tokens_per_s=None if costs is None else bound_tokens_per_s(run.trace, costs),
    )


def _latencies_s(
    run: Run, times: TokenTimes, window: Span | None
) -> tuple[list[float], npt.NDArray[np.float64]]:
    """To first tokens, and between tokens."""
    first = {seq_id: times[seq_id][0] - at_s for seq_id, at_s in run.submitted_s.items()}
    chosen = [
        wait_s
        for seq_id, wait_s in first.items()
        if window is None or _is_in(run.submitted_s[seq_id], window)
    ]
    gaps_s = np.concatenate([np.diff(of_one) for of_one in times.values()])
    ends_s = np.concatenate([np.array(of_one[1:]) for of_one in times.values()])
    if window is not None:
        gaps_s = gaps_s[(ends_s > window.start_s) & (ends_s <= window.end_s)]
    return chosen or list(first.values()), gaps_s


TokenTimes = dict[int, list[float]]
"""When each token of a sequence came, by seq_id."""


def _token_times(run: Run) -> TokenTimes:
    times: TokenTimes = {seq_id: [] for seq_id in run.submitted_s}
    for step in run.tokens:
        for seq_id in step.seq_ids:
            times[seq_id].append(step.time_s)
    return times


def _steady(run: Run, times: TokenTimes) -> Span:
    first_s, last_s = min(run.submitted_s.values()), max(run.submitted_s.values())
    if run.trace.num_clients is not None:
        first_s = max(times[seq_id][0] for seq_id in range(run.trace.num_first))
    if last_s > first_s:
        return Span(start_s=first_s, end_s=last_s)
    return Span(
        start_s=min(run.submitted_s.values()), end_s=max(step.time_s for step in run.tokens)
    )


def _is_in(time_s: float, span: Span) -> bool:
    return span.start_s < time_s <= span.end_s


def _overlap_s(spans: Iterable[Span], window: Span) -> float:
    return sum(
        max(0.0, min(each.end_s, window.end_s) - max(each.start_s, window.start_s))
        for each in spans
    )


def _occupied(run: Run, times: TokenTimes) -> Sequence[Span]:
    """When some request had been submitted and not ended, as spans that do not overlap."""
    lives = sorted((at_s, times[seq_id][-1]) for seq_id, at_s in run.submitted_s.items())
    merged = [lives[0]]
    for start_s, end_s in lives[1:]:
        if start_s > merged[-1][1]:
            merged.append((start_s, end_s))
        else:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
    return [Span(start_s=start_s, end_s=end_s) for start_s, end_s in merged]


def bound_tokens_per_s(trace: Trace, costs: CostModel) -> float | None:
    """Prompt and generated tokens of a closed loop, were the slowest stage never idle and all
    clients always decoding, in as many equal cohorts as there are stages: the fewest steps in which
    every stage has work. None where the number of clients is not given.
    """
    if trace.num_clients is None:
        return None
    work = total_work(_request_work(request) for request in trace.requests)
    num_cohorts = min(len(costs.stages), trace.num_clients)
    num_steps = max(1.0, work.num_decode_rows * num_cohorts / trace.num_clients)
    slowest_s = max(stage.time_s(work) + (num_steps - 1) * stage.step_s for stage in costs.stages)
    num_tokens = sum(r.num_prompt_tokens + r.num_output_tokens for r in trace.requests)
    return num_tokens / slowest_s


def _request_work(request: Request) -> StepWork:
    """All of a request's steps, the prompt in one."""
    prompt = row_work(
        first_position=0, num_tokens=request.num_prompt_tokens, samples=True, is_decode=False
    )
    num_decoded = request.num_output_tokens - 1
    positions = num_decoded * request.num_prompt_tokens + num_decoded * (num_decoded + 1) // 2
    decode = StepWork(
        num_decode_rows=num_decoded,
        num_rows=num_decoded,
        num_prefill_tokens=0,
        num_kv_positions=positions,
        num_prefill_pairs=0,
    )
    return total_work((prompt, decode))
