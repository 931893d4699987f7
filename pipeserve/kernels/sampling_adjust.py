"""What changes logits before a draw, and what a draw leaves behind, on the device.

Row state lies in tensors of all R row slots; rows_S names the slot of each row of the step, and a
negative slot is a filler row that is left alone. The order is that of SamplingParams: bias,
penalties, stop tokens banned before min_tokens. Twins: reference_sampling.apply_penalties, and
the index operations that the docstrings name.

Shapes: S rows of a step, R row slots, V vocabulary, E entries of a row's list, L positions.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase

_CHUNK = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyState:
    """What each row slot has seen and how strongly it counts."""

    in_prompt_RV: Tensor
    """bool."""
    output_counts_RV: Tensor
    """int32."""
    repetition_R: Tensor
    presence_R: Tensor
    frequency_R: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitLists:
    """Each row slot's biased tokens and stop tokens; ids are unique in a row, -1 fills up."""

    bias_ids_RE: Tensor
    bias_values_RE: Tensor
    stop_ids_RE: Tensor
    first_stop_positions_R: Tensor
    """Prompt length plus min_tokens: tokens at lower positions are no stop tokens."""


@triton.jit
def _penalise(x, in_prompt, count, repetition, presence, frequency):
    in_output = count > 0
    repeated = tl.where(
        x > 0, tl.div_rn(x, tl.full(x.shape, 1.0, tl.float32) * repetition), x * repetition
    )
    x = tl.where((in_prompt != 0) | in_output, repeated, x)
    return x - tl.where(in_output, presence, 0.0) - frequency * count.to(tl.float32)


@triton.jit
def penalties_kernel(
    logits_ptr,
    out_ptr,
    rows_ptr,
    in_prompt_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    vocab_size,
    row_stride,
    out_stride,
    CHUNK: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + seq).to(tl.int64)
    ids_X = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    is_token_X = ids_X < vocab_size
    x_X = tl.load(logits_ptr + seq * row_stride + ids_X, is_token_X, other=0.0)
    if row >= 0:
        repetition = tl.load(repetition_ptr + row)
        presence = tl.load(presence_ptr + row)
        frequency = tl.load(frequency_ptr + row)
        # Rows without penalties need not read what they have seen.
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            seen_X = row * vocab_size + ids_X
            in_prompt_X = tl.load(in_prompt_ptr + seen_X, is_token_X, other=0)
            counts_X = tl.load(counts_ptr + seen_X, is_token_X, other=0)
            x_X = _penalise(x_X, in_prompt_X, counts_X, repetition, presence, frequency)
    tl.store(out_ptr + seq * out_stride + ids_X, x_X, is_token_X)


@triton.jit
def lists_kernel(
    logits_ptr,
    out_ptr,
    rows_ptr,
    positions_ptr,
    in_prompt_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    stop_ids_ptr,
    first_stop_ptr,
    vocab_size,
    row_stride,
    out_stride,
    num_bias,
    num_stop,
    BLOCK_BIAS: tl.constexpr,
    BLOCK_STOP: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
):
    """One row: its biased tokens anew from the unmodified logits, then the bans over them."""
    seq = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + seq).to(tl.int64)
    if row < 0:
        return
    entries_E = tl.arange(0, BLOCK_BIAS)
    is_entry_E = entries_E < num_bias
    ids_E = tl.load(bias_ids_ptr + row * num_bias + entries_E, is_entry_E, other=-1)
    is_entry_E = (ids_E >= 0) & (ids_E < vocab_size)
    bias_E = tl.load(bias_values_ptr + row * num_bias + entries_E, is_entry_E, other=0.0)
    x_E = tl.load(logits_ptr + seq * row_stride + ids_E, is_entry_E, other=0.0) + bias_E
    if HAS_PENALTIES:
        in_prompt_E = tl.load(in_prompt_ptr + row * vocab_size + ids_E, is_entry_E, other=0)
        counts_E = tl.load(counts_ptr + row * vocab_size + ids_E, is_entry_E, other=0)
        repetition = tl.load(repetition_ptr + row)
        presence = tl.load(presence_ptr + row)
        frequency = tl.load(frequency_ptr + row)
        x_E = _penalise(x_E, in_prompt_E, counts_E, repetition, presence, frequency)
    tl.store(out_ptr + seq * out_stride + ids_E, x_E, is_entry_E)
    tl.debug_barrier()  # a token may be in both lists: the ban is the later store
    if tl.load(positions_ptr + seq) < tl.load(first_stop_ptr + row):
        stops_E = tl.arange(0, BLOCK_STOP)
        stop_ids_ptr_E = stop_ids_ptr + row * num_stop + stops_E
        stop_ids_E = tl.load(stop_ids_ptr_E, stops_E < num_stop, other=-1)
        is_stop_E = (stop_ids_E >= 0) & (stop_ids_E < vocab_size)
        banned_E = tl.full((BLOCK_STOP,), float("-inf"), tl.float32)
        tl.store(out_ptr + seq * out_stride + stop_ids_E, banned_E, is_stop_E)


@triton.jit
def record_kernel(
    ids_ptr,
    rows_ptr,
    positions_ptr,
    counts_ptr,
    history_ptr,
    num_seqs,
    vocab_size,
    history_stride,
    BLOCK_S: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
):
    seqs_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows_S = tl.load(rows_ptr + seqs_S, seqs_S < num_seqs, other=-1).to(tl.int64)
    is_row_S = rows_S >= 0
    ids_S = tl.load(ids_ptr + seqs_S, is_row_S, other=0)
    if HAS_COUNTS:
        counts_ptr_S = counts_ptr + rows_S * vocab_size + ids_S
        count_S = tl.load(counts_ptr_S, is_row_S, other=0)
        tl.store(counts_ptr_S, count_S + 1, is_row_S)
    if HAS_HISTORY:
        positions_S = tl.load(positions_ptr + seqs_S, is_row_S, other=0)
        history_ptr_S = history_ptr + rows_S * history_stride + positions_S
        tl.store(history_ptr_S, ids_S.to(history_ptr.dtype.element_ty), is_row_S)


def apply_penalties(
    logits_SV: Tensor, rows_S: Tensor, state: PenaltyState, *, out_SV: Tensor | None = None
) -> Tensor:
    """The three penalties as SamplingParams defines them; rows without any are copied.

    As reference_sampling.apply_penalties of the state's rows rows_S. out_SV may be logits_SV.
    """
    out_SV = torch.empty_like(logits_SV) if out_SV is None else out_SV
    num_rows, vocab_size = logits_SV.shape
    _check(logits_SV, out_SV)
    assert state.in_prompt_RV.is_contiguous() and state.output_counts_RV.is_contiguous(), "[R, V]"
    if num_rows == 0:
        return out_SV
    penalties_kernel[(num_rows, triton.cdiv(vocab_size, _CHUNK))](
        logits_SV,
        out_SV,
        rows_S,
        state.in_prompt_RV.view(torch.uint8),
        state.output_counts_RV,
        state.repetition_R,
        state.presence_R,
        state.frequency_R,
        vocab_size,
        logits_SV.stride(0),
        out_SV.stride(0),
        CHUNK=_CHUNK,
    )
    return out_SV


def apply_lists(
    logits_SV: Tensor,
    out_SV: Tensor,
    rows_S: Tensor,
    positions_S: Tensor,
    lists: LogitLists,
    penalties: PenaltyState | None,
) -> None:
    """Bias and bans, written over out_SV, which holds the logits or their penalised copy.

    As out = penalised(logits + bias) at the biased ids, then -inf at the stop ids of rows whose
    token stands before first_stop_positions_R. logits_SV are unmodified and not out_SV.
    """
    _check(logits_SV, out_SV)
    assert logits_SV.data_ptr() != out_SV.data_ptr(), "biased logits come from unmodified ones"
    num_bias, num_stop = lists.bias_ids_RE.shape[1], lists.stop_ids_RE.shape[1]
    if logits_SV.shape[0] == 0:
        return
    # Stand-ins are never read: HAS_PENALTIES leaves their loads out.
    seen = (rows_S,) * 5
    if penalties is not None:
        seen = (
            penalties.in_prompt_RV.view(torch.uint8),
            penalties.output_counts_RV,
            penalties.repetition_R,
            penalties.presence_R,
            penalties.frequency_R,
        )
    lists_kernel[(logits_SV.shape[0],)](
        logits_SV,
        out_SV,
        rows_S,
        positions_S,
        *seen,
        lists.bias_ids_RE,
        lists.bias_values_RE,
        lists.stop_ids_RE,
        lists.first_stop_positions_R,
        logits_SV.shape[1],
        logits_SV.stride(0),
        out_SV.stride(0),
        num_bias,
        num_stop,
        BLOCK_BIAS=triton.next_power_of_2(max(num_bias, 1)),
        BLOCK_STOP=triton.next_power_of_2(max(num_stop, 1)),
        HAS_PENALTIES=penalties is not None,
    )


def record(
    ids_S: Tensor,
    rows_S: Tensor,
    positions_S: Tensor,
    *,
    output_counts_RV: Tensor | None = None,
    history_RL: Tensor | None = None,
) -> None:
    """output_counts_RV[rows_S, ids_S] += 1 and history_RL[rows_S, positions_S] = ids_S.

    A row stands in rows_S at most once.
    """
    num_seqs = ids_S.shape[0]
    if num_seqs == 0:
        return
    record_kernel[(triton.cdiv(num_seqs, 128),)](
        ids_S,
        rows_S,
        positions_S,
        ids_S if output_counts_RV is None else output_counts_RV,
        ids_S if history_RL is None else history_RL,
        num_seqs,
        0 if output_counts_RV is None else output_counts_RV.stride(0),
        0 if history_RL is None else history_RL.stride(0),
        BLOCK_S=128,
        HAS_COUNTS=output_counts_RV is not None,
        HAS_HISTORY=history_RL is not None,
    )


def _check(logits_SV: Tensor, out_SV: Tensor) -> None:
    assert logits_SV.dtype == out_SV.dtype == torch.float32, "logits are float32"
    assert logits_SV.stride(1) == out_SV.stride(1) == 1, "rows of logits are contiguous"


_SEEN = {
    "in_prompt_ptr": "*u8",
    "counts_ptr": "*i32",
    "repetition_ptr": "*fp32",
    "presence_ptr": "*fp32",
    "frequency_ptr": "*fp32",
}
_LOGITS = {"logits_ptr": "*fp32", "out_ptr": "*fp32", "rows_ptr": "*i32"}
_STRIDES = {"vocab_size": "i32", "row_stride": "i32", "out_stride": "i32"}
AOT_CASES = (
    AotCase(
        name="penalties",
        kernel=penalties_kernel,
        signature={**_LOGITS, **_SEEN, **_STRIDES},
        constexprs={"CHUNK": _CHUNK},
    ),
    AotCase(
        name="logit_lists",
        kernel=lists_kernel,
        signature={
            **_LOGITS,
            "positions_ptr": "*i32",
            **_SEEN,
            "bias_ids_ptr": "*i32",
            "bias_values_ptr": "*fp32",
            "stop_ids_ptr": "*i32",
            "first_stop_ptr": "*i32",
            **_STRIDES,
            "num_bias": "i32",
            "num_stop": "i32",
        },
        constexprs={"BLOCK_BIAS": 512, "BLOCK_STOP": 16, "HAS_PENALTIES": True},
    ),
    AotCase(
        name="record",
        kernel=record_kernel,
        signature={
            "ids_ptr": "*i64",
            "rows_ptr": "*i32",
            "positions_ptr": "*i32",
            "counts_ptr": "*i32",
            "history_ptr": "*i32",
            **dict.fromkeys(("num_seqs", "vocab_size", "history_stride"), "i32"),
        },
        constexprs={"BLOCK_S": 128, "HAS_COUNTS": True, "HAS_HISTORY": True},
    ),
)
