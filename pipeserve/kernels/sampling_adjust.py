"""What changes logits before a draw, and what a draw leaves behind, on the device.

What rows have seen lies in tensors of all R row slots; rows_S names the slot of each row of the
step, and a negative slot is a filler row that is left alone. Twins: reference_sampling.py.

Shapes: S rows of a step, R row slots, V vocabulary, E biased logits of a step, L positions.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase
from pipeserve.kernels.sampling_state import BiasEntries, Penalties

_CHUNK = 2048
_BLOCK = 128


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
        repetition = tl.load(repetition_ptr + seq)
        presence = tl.load(presence_ptr + seq)
        frequency = tl.load(frequency_ptr + seq)
        # Rows without penalties need not read what they have seen.
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            seen_X = row * vocab_size + ids_X
            in_prompt_X = tl.load(in_prompt_ptr + seen_X, is_token_X, other=0)
            counts_X = tl.load(counts_ptr + seen_X, is_token_X, other=0)
            x_X = _penalise(x_X, in_prompt_X, counts_X, repetition, presence, frequency)
    tl.store(out_ptr + seq * out_stride + ids_X, x_X, is_token_X)


@triton.jit(do_not_specialize=["num_entries"])
def bias_kernel(
    logits_ptr,
    out_ptr,
    seqs_ptr,
    ids_ptr,
    values_ptr,
    rows_ptr,
    in_prompt_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    num_entries,
    vocab_size,
    row_stride,
    out_stride,
    BLOCK: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
):
    """Each entry's logit anew from the unmodified one."""
    entries_E = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry_E = entries_E < num_entries
    seqs_E = tl.load(seqs_ptr + entries_E, is_entry_E, other=0).to(tl.int64)
    ids_E = tl.load(ids_ptr + entries_E, is_entry_E, other=0)
    x_E = tl.load(logits_ptr + seqs_E * row_stride + ids_E, is_entry_E, other=0.0)
    x_E += tl.load(values_ptr + entries_E, is_entry_E, other=0.0)
    if HAS_PENALTIES:
        rows_E = tl.load(rows_ptr + seqs_E, is_entry_E, other=0).to(tl.int64)
        seen_E = rows_E * vocab_size + ids_E
        in_prompt_E = tl.load(in_prompt_ptr + seen_E, is_entry_E, other=0)
        counts_E = tl.load(counts_ptr + seen_E, is_entry_E, other=0)
        repetition_E = tl.load(repetition_ptr + seqs_E, is_entry_E, other=1.0)
        presence_E = tl.load(presence_ptr + seqs_E, is_entry_E, other=0.0)
        frequency_E = tl.load(frequency_ptr + seqs_E, is_entry_E, other=0.0)
        x_E = _penalise(x_E, in_prompt_E, counts_E, repetition_E, presence_E, frequency_E)
    tl.store(out_ptr + seqs_E * out_stride + ids_E, x_E, is_entry_E)


@triton.jit(do_not_specialize=["num_seqs"])
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


def apply_penalties(logits_SV: Tensor, rows_S: Tensor, penalties: Penalties) -> Tensor:
    """The three penalties as SamplingParams defines them; rows without any are copied."""
    out_SV = torch.empty_like(logits_SV)
    num_rows, vocab_size = logits_SV.shape
    _check(logits_SV, out_SV)
    if num_rows == 0:
        return out_SV
    penalties_kernel[(num_rows, triton.cdiv(vocab_size, _CHUNK))](
        logits_SV,
        out_SV,
        rows_S,
        *_arguments(penalties),
        vocab_size,
        logits_SV.stride(0),
        out_SV.stride(0),
        CHUNK=_CHUNK,
    )
    return out_SV


def apply_bias(
    logits_SV: Tensor,
    out_SV: Tensor,
    bias: BiasEntries,
    rows_S: Tensor,
    penalties: Penalties | None,
) -> None:
    """Write the biased logits over out_SV, which holds the logits or their penalised copy.

    An entry becomes penalised(logit + bias). logits_SV are unmodified and not out_SV; rows with
    entries are no filler rows.
    """
    _check(logits_SV, out_SV)
    assert logits_SV.data_ptr() != out_SV.data_ptr(), "biased logits come from unmodified ones"
    num_entries = bias.ids_E.shape[0]
    if num_entries == 0:
        return
    # Stand-ins are never read: HAS_PENALTIES leaves their loads out.
    seen = (logits_SV,) * 5 if penalties is None else _arguments(penalties)
    bias_kernel[(triton.cdiv(num_entries, _BLOCK),)](
        logits_SV,
        out_SV,
        bias.seqs_E,
        bias.ids_E,
        bias.values_E,
        rows_S,
        *seen,
        num_entries,
        logits_SV.shape[1],
        logits_SV.stride(0),
        out_SV.stride(0),
        BLOCK=_BLOCK,
        HAS_PENALTIES=penalties is not None,
    )


def record(
    ids_S: Tensor,
    rows_S: Tensor,
    positions_S: Tensor,
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


def _arguments(penalties: Penalties) -> tuple[Tensor, ...]:
    in_prompt_RV, counts_RV = penalties.in_prompt_RV, penalties.output_counts_RV
    assert in_prompt_RV.is_contiguous() and counts_RV.is_contiguous(), "[R, V]"
    return (
        in_prompt_RV.view(torch.uint8),
        counts_RV,
        penalties.repetition_S,
        penalties.presence_S,
        penalties.frequency_S,
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
_LOGITS = {"logits_ptr": "*fp32", "out_ptr": "*fp32", "rows_ptr": "*i64"}
_STRIDES = {"vocab_size": "i32", "row_stride": "i32", "out_stride": "i32"}
AOT_CASES = (
    AotCase(
        name="penalties",
        kernel=penalties_kernel,
        signature={**_LOGITS, **_SEEN, **_STRIDES},
        constexprs={"CHUNK": _CHUNK},
    ),
    AotCase(
        name="logit_bias",
        kernel=bias_kernel,
        signature={
            **_LOGITS,
            "seqs_ptr": "*i32",
            "ids_ptr": "*i32",
            "values_ptr": "*fp32",
            **_SEEN,
            "num_entries": "i32",
            **_STRIDES,
        },
        constexprs={"BLOCK": _BLOCK, "HAS_PENALTIES": True},
    ),
    AotCase(
        name="record",
        kernel=record_kernel,
        signature={
            "ids_ptr": "*i64",
            "rows_ptr": "*i64",
            "positions_ptr": "*i32",
            "counts_ptr": "*i32",
            "history_ptr": "*i32",
            **dict.fromkeys(("num_seqs", "vocab_size", "history_stride"), "i32"),
        },
        constexprs={"BLOCK_S": 128, "HAS_COUNTS": True, "HAS_HISTORY": True},
    ),
)
