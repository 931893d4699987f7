"""Figures: what a recorded run says about speed. Pure arithmetic; every definition stands here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeserve.bench.arrivals import Request
from pipeserve.bench.recording import Mark, Moment, Recording, Step
from pipeserve.bench.workload import Batch, Load
from pipeserve.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """What a step must read and a prompt token must compute, whatever the kernels do."""

    weight_bytes: int
    """Of all tensors that a decode step reads, in the file's size: not an embedding of its own."""
    kv_token_bytes: int
    """Keys and values of one token in all layers."""
    token_flops: int
    """Products of one token with all layers' matrices, 2 per weight; the head's are not counted."""
    position_flops: int
    """Attention of one token to one position, in all layers: 4 per entry of the query heads."""


def model_costs(model: ModelConfig, *, weight_bytes: int, kv_token_bytes: int) -> ModelCosts:
    """The costs of a dense decoder."""
    rows = 2 * (model.attention_size + model.kv_size) + 3 * model.ffn_size
    return ModelCosts(
        weight_bytes=weight_bytes,
        kv_token_bytes=kv_token_bytes,
        token_flops=2 * model.num_layers * model.hidden_size * rows,
        position_flops=4 * model.num_layers * model.attention_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. None where the run had no such phase. Rates are of all sequences together."""

    num_concurrent: int | None
    """Sequences of the batch, or clients; None where they come at a rate."""
    num_sequences: int
    duration_s: float
    """From the first submission to the last token."""
    decode_tokens_per_s: float | None
    """Batch: tokens after the moment when the last sequence to start had its first one, over the
    time from there to the end. Clients: tokens of the steady state, which goes from the moment
    when every client's first sequence had its first token to the last submission. Arrivals at a
    rate: until the last one."""
    full_batch_tokens_per_s: float | None
    """Batch: the same, but only until the first sequence ends, so that all decode in every step;
    None where the first had ended before the last one started."""
    prefill_tokens_per_s: float | None
    """Batch: all prompt tokens over the time from submission to the first token of the last
    sequence to start; others decode meanwhile (one output token measures prefill alone).
    Otherwise: prompt tokens of the sequences that started in the steady state, until the last of
    these had."""
    total_tokens_per_s: float
    """Prompt and generated tokens of the whole run over its duration."""
    ttft_p50_ms: float
    """From a sequence's submission to its first token."""
    ttft_p99_ms: float
    itl_p50_ms: float | None
    """Between two tokens of a sequence without a chain of samplers."""
    itl_p99_ms: float | None
    chained_itl_p50_ms: float | None
    """Of those with one."""
    chained_itl_p99_ms: float | None
    stage_busy: tuple[float, ...]
    """Share of the time that each stage worked, in the phase of decode_tokens_per_s; where there
    is none, in the whole run."""
    num_preemptions: int
    decode_bytes_per_s: float | None
    """Batch: weights (once per step) and KV (each row's context) read by all stages together, in
    the phase of full_batch_tokens_per_s."""
    prefill_flops_per_s: float | None
    """Products and causal attention of the tokens of prefill_tokens_per_s."""


def make_figures(recording: Recording, load: Load, costs: ModelCosts) -> Figures:
    """The figures of one run of a workload."""
    times = _token_times(recording)
    ttft_s = [times[seq_id][0] - at_s for seq_id, at_s in recording.submitted_s.items()]
    plain, chained = (times.keys() - recording.chained, recording.chained)
    itl_ms, chained_itl_ms = (_itl_ms([times[each] for each in ids]) for ids in (plain, chained))
    whole = _Phase.between(recording, Moment.BEGIN, Moment.END)
    is_batch = isinstance(load, Batch)
    last = Moment.END if is_batch else Moment.ALL_SUBMITTED
    decode = _Phase.between(recording, Moment.ALL_STARTED, last)
    # Late tokens come apart from those of their steps.
    full = _full_batch_steps(decode, times) if is_batch and not recording.chained else []
    full_s = full[-1].time_s - decode.first.time_s if full else 0.0
    requests = recording.requests
    prefill_s, prompts = _prefilled(whole if is_batch else decode, times, requests)
    num_tokens = sum(r.num_prompt_tokens + r.num_output_tokens for r in requests.values())
    return Figures(
        num_concurrent=load.num_concurrent,
        num_sequences=len(requests),
        duration_s=whole.duration_s,
        decode_tokens_per_s=decode.num_tokens / decode.duration_s if decode.steps else None,
        full_batch_tokens_per_s=sum(len(s.seq_ids) for s in full) / full_s if full else None,
        prefill_tokens_per_s=sum(prompts) / prefill_s if prompts else None,
        total_tokens_per_s=num_tokens / whole.duration_s,
        ttft_p50_ms=_percentile_ms(ttft_s, 50),
        ttft_p99_ms=_percentile_ms(ttft_s, 99),
        itl_p50_ms=itl_ms[0],
        itl_p99_ms=itl_ms[1],
        chained_itl_p50_ms=chained_itl_ms[0],
        chained_itl_p99_ms=chained_itl_ms[1],
        stage_busy=(decode if decode.steps else whole).stage_busy,
        num_preemptions=whole.last.stats.num_preemptions - whole.first.stats.num_preemptions,
        decode_bytes_per_s=_bytes_read(full, times, requests, costs) / full_s if full else None,
        prefill_flops_per_s=_prefill_flops(prompts, costs) / prefill_s if prompts else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """A part of a run; the step of its first moment is not in it, that of its last one is."""

    first: Mark
    last: Mark
    steps: Sequence[Step]

    @classmethod
    def between(cls, recording: Recording, first: Moment, last: Moment) -> _Phase:
        begin, end = recording.marks[first], recording.marks[last]
        steps = [step for step in recording.steps if begin.time_s < step.time_s <= end.time_s]
        return cls(first=begin, last=end, steps=steps)

    @property
    def duration_s(self) -> float:
        return self.last.time_s - self.first.time_s

    @property
    def num_tokens(self) -> int:
        return sum(len(step.seq_ids) for step in self.steps)

    @property
    def stage_busy(self) -> tuple[float, ...]:
        before, after = self.first.stats, self.last.stats
        elapsed_s = after.uptime_s - before.uptime_s
        pairs = zip(before.stage_busy_s, after.stage_busy_s, strict=True)
        return tuple((end - start) / elapsed_s for start, end in pairs)


TokenTimes = Mapping[int, Sequence[float]]
"""When each token of a sequence came, by seq_id."""


def _token_times(recording: Recording) -> TokenTimes:
    times: dict[int, list[float]] = {seq_id: [] for seq_id in recording.submitted_s}
    for step in recording.steps:
        for seq_id in step.seq_ids:
            times[seq_id].append(step.time_s)
    return times


def _full_batch_steps(decode: _Phase, times: TokenTimes) -> list[Step]:
    first_end_s = min(of_one[-1] for of_one in times.values())
    return [step for step in decode.steps if step.time_s <= first_end_s]


def _prefilled(
    phase: _Phase, times: TokenTimes, requests: Mapping[int, Request]
) -> tuple[float, list[int]]:
    """Prompt tokens of the sequences whose first token came in the phase, and the time to the last
    of these."""
    started_s = {
        seq_id: of_one[0]
        for seq_id, of_one in times.items()
        if phase.first.time_s < of_one[0] <= phase.last.time_s
    }
    prompts = [requests[seq_id].num_prompt_tokens for seq_id in started_s]
    return max(started_s.values(), default=0.0) - phase.first.time_s, prompts


def _bytes_read(
    steps: Sequence[Step],
    times: TokenTimes,
    requests: Mapping[int, Request],
    costs: ModelCosts,
) -> int:
    """A decode step that samples a sequence's k-th token reads the prompt and k - 1 tokens."""
    first_s, last_s = steps[0].time_s, steps[-1].time_s
    num_positions = sum(
        requests[seq_id].num_prompt_tokens + index
        for seq_id, of_one in times.items()
        for index, time_s in enumerate(of_one)
        if first_s <= time_s <= last_s
    )
    return len(steps) * costs.weight_bytes + num_positions * costs.kv_token_bytes


def _prefill_flops(prompts: Iterable[int], costs: ModelCosts) -> float:
    """Of prompts with so many tokens: each attends to all before it and to itself."""
    return sum(n * (costs.token_flops + costs.position_flops * (n + 1) / 2) for n in prompts)


def _itl_ms(times: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """p50 and p99 between two tokens of a sequence."""
    gaps_s = np.concatenate([np.zeros(0), *(np.diff(of_one) for of_one in times)])
    if len(gaps_s) == 0:
        return None, None
    return _percentile_ms(gaps_s, 50), _percentile_ms(gaps_s, 99)


def _percentile_ms(values_s: Sequence[float] | npt.NDArray[np.float64], percent: float) -> float:
    return float(np.percentile(values_s, percent)) * 1000.0
