"""What a run was: the work of its steps, when each stage did it, and when tokens came.

Values only, the same whether a pipeline ran or the simulator; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeserve.bench.arrivals import Trace
from pipeserve.bench.recording import Step
from pipeserve.core.batch import MicroBatch, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step computes, as far as its time depends on it."""

    num_decode_rows: int
    num_rows: int
    """That sample a token: decode rows and the last chunk of each prompt."""
    num_prefill_tokens: int
    num_kv_positions: int
    """Read by all rows: what a row holds with this step's tokens, once per row."""
    num_prefill_pairs: int
    """Of a prompt token and a position that it attends to, itself included."""


def row_work(*, first_position: int, num_tokens: int, samples: bool, is_decode: bool) -> StepWork:
    """One row's share of a step: tokens from first_position on."""
    # 1 + 2 + ... + n positions of its own chunk, and all that lie before it for every token.
    pairs = num_tokens * first_position + num_tokens * (num_tokens + 1) // 2
    return StepWork(
        num_decode_rows=int(is_decode),
        num_rows=int(samples),
        num_prefill_tokens=0 if is_decode else num_tokens,
        num_kv_positions=first_position + num_tokens,
        num_prefill_pairs=0 if is_decode else pairs,
    )


def total_work(parts: Iterable[StepWork]) -> StepWork:
    """Of a step that does all of these, or of all these steps."""
    work = list(parts)
    return StepWork(
        num_decode_rows=sum(each.num_decode_rows for each in work),
        num_rows=sum(each.num_rows for each in work),
        num_prefill_tokens=sum(each.num_prefill_tokens for each in work),
        num_kv_positions=sum(each.num_kv_positions for each in work),
        num_prefill_pairs=sum(each.num_prefill_pairs for each in work),
    )


def work_of(batch: MicroBatch) -> StepWork:
    """As row_work of every row, added up."""
    first_S = batch.first_positions_S.astype(np.int64)
    num_S = batch.num_tokens_S.astype(np.int64)
    pairs_S = num_S * first_S + num_S * (num_S + 1) // 2
    return StepWork(
        num_decode_rows=batch.num_decode_rows,
        num_rows=int(batch.samples_S.sum()),
        num_prefill_tokens=len(batch.prefill_token_ids),
        num_kv_positions=int((first_S + num_S).sum()),
        num_prefill_pairs=int(pairs_S[batch.num_decode_rows :].sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """A step that has left the pipeline."""

    step_id: int
    work: StepWork
    submitted_s: float
    spans: tuple[Span, ...]
    """One per stage."""

    def since(self, began_s: float) -> TimedStep:
        """With all times counted from there."""
        return replace(
            self,
            submitted_s=self.submitted_s - began_s,
            spans=tuple(
                Span(start_s=span.start_s - began_s, end_s=span.end_s - began_s)
                for span in self.spans
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run; all times count from its first submission."""

    trace: Trace
    num_stages: int
    submitted_s: Mapping[int, float]
    """By seq_id, which is the request's place in the trace."""
    steps: Sequence[TimedStep]
    tokens: Sequence[Step]
    """When tokens reached whoever waits for them."""
