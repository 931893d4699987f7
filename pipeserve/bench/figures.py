"""Figures: what a recorded run says about speed. Pure arithmetic; every definition stands here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeserve.bench.recording import Mark, Moment, Recording, Step
from pipeserve.bench.workload import Batch, Load, Workload
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

    num_concurrent: int
    """Sequences of the batch, or clients."""
    num_sequences: int
    duration_s: float
    """From the first submission to the last token."""
    decode_tokens_per_s: float | None
    """Batch: tokens after the moment when the last sequence to start had its first one, over the
    time from there to the end. Clients: tokens of the steady state, which goes from the moment
    when every client's first sequence had its first token to the last submission."""
    full_batch_tokens_per_s: float | None
    """Batch: the same, but only until the first sequence ends, so that all decode in every step;
    None where the first had ended before the last one started."""
    prefill_tokens_per_s: float | None
    """Batch: all prompt tokens over the time from submission to the first token of the last
    sequence to start; others decode meanwhile (one output token measures prefill alone).
    Clients: prompt tokens of the sequences that started in the steady state, over its length."""
    total_tokens_per_s: float
    """Prompt and generated tokens of the whole run over its duration."""
    ttft_p50_ms: float
    """From a sequence's submission to its first token."""
    ttft_p99_ms: float
    itl_p50_ms: float | None
    """Between two tokens of a sequence."""
    itl_p99_ms: float | None
    stage_busy: tuple[float, ...]
    """Share of the time that each stage worked, in the phase of decode_tokens_per_s; where there
    is none, in the whole run."""
    num_preemptions: int
    decode_bytes_per_s: float | None
    """Batch: weights (once per step) and KV (each row's context) read by all stages together, in
    the phase of full_batch_tokens_per_s."""
    prefill_flops_per_s: float | None
    """Products and causal attention of the tokens of prefill_tokens_per_s."""


def make_figures(
    recording: Recording, workload: Workload, load: Load, costs: ModelCosts
) -> Figures:
    """The figures of one run of the workload."""
    times = _token_times(recording)
    ttft_s = [times[seq_id][0] - at_s for seq_id, at_s in recording.submitted_s.items()]
    gaps_s = np.concatenate([np.diff(of_one) for of_one in times.values()])
    whole = _Phase.between(recording, Moment.BEGIN, Moment.END)
    is_batch = isinstance(load, Batch)
    last = Moment.END if is_batch else Moment.ALL_SUBMITTED
    decode = _Phase.between(recording, Moment.ALL_STARTED, last)
    full = _full_batch_steps(decode, times) if is_batch else []
    full_s = full[-1].time_s - decode.first.time_s if full else 0.0
    prefill = _prefill_rate(whole if is_batch else decode, times, workload.num_prompt_tokens)
    num_tokens = workload.num_prompt_tokens + workload.num_output_tokens
    return Figures(
        num_concurrent=load.num_concurrent,
        num_sequences=load.num_sequences,
        duration_s=whole.duration_s,
        decode_tokens_per_s=decode.num_tokens / decode.duration_s if decode.steps else None,
        full_batch_tokens_per_s=sum(len(s.seq_ids) for s in full) / full_s if full else None,
        prefill_tokens_per_s=prefill,
        total_tokens_per_s=load.num_sequences * num_tokens / whole.duration_s,
        ttft_p50_ms=_percentile_ms(ttft_s, 50),
        ttft_p99_ms=_percentile_ms(ttft_s, 99),
        itl_p50_ms=_percentile_ms(gaps_s, 50) if len(gaps_s) else None,
        itl_p99_ms=_percentile_ms(gaps_s, 99) if len(gaps_s) else None,
        stage_busy=(decode if decode.steps else whole).stage_busy,
        num_preemptions=whole.last.stats.num_preemptions - whole.first.stats.num_preemptions,
        decode_bytes_per_s=_bytes_read(full, times, workload, costs) / full_s if full else None,
        prefill_flops_per_s=prefill and prefill * _prefill_flops(workload, costs),
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


def _prefill_rate(phase: _Phase, times: TokenTimes, num_prompt_tokens: int) -> float | None:
    """Of the sequences whose first token came in the phase, over the time to the last of these."""
    started_s = [
        first for first, *_ in times.values() if phase.first.time_s < first <= phase.last.time_s
    ]
    if not started_s:
        return None
    return len(started_s) * num_prompt_tokens / (max(started_s) - phase.first.time_s)


def _bytes_read(
    steps: Sequence[Step], times: TokenTimes, workload: Workload, costs: ModelCosts
) -> int:
    """A decode step that samples a sequence's k-th token reads the prompt and k - 1 tokens."""
    first_s, last_s = steps[0].time_s, steps[-1].time_s
    num_positions = sum(
        workload.num_prompt_tokens + index
        for of_one in times.values()
        for index, time_s in enumerate(of_one)
        if first_s <= time_s <= last_s
    )
    return len(steps) * costs.weight_bytes + num_positions * costs.kv_token_bytes


def _prefill_flops(workload: Workload, costs: ModelCosts) -> float:
    """Of a prompt token, on average: it attends to half of the prompt."""
    return costs.token_flops + costs.position_flops * (workload.num_prompt_tokens + 1) / 2


def _percentile_ms(values_s: Sequence[float] | npt.NDArray[np.float64], percent: float) -> float:
    return float(np.percentile(values_s, percent)) * 1000.0
