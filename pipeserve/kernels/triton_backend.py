"""The Backends of GPUs: Triton kernels, and a way to multiply per precision and number of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels import attention_decode, attention_prefill, fused, rotary
from pipeserve.kernels.backend import Activations, Backend, BiasedWeight, Weights
from pipeserve.kernels.fp8 import fp8_linear
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_gemv import gemv
from pipeserve.kernels.quant_layout import UNIT, PlanarWeight
from pipeserve.kernels.quant_reference import (
    LinearInput,
    QuantisedRows,
    RoundedRows,
    values_of,
)
from pipeserve.kernels.quant_round import round_rows
from pipeserve.kernels.rounded_rows import empty_rows, quantise_rows
from pipeserve.kernels.step_places import decode_places

GEMV_ROWS = 4
"""Up to this many, integer dot products are fastest: measured on an H100 (loadtest/README.md)."""
GEMM_ROWS = 256
"""From more rows on, writing the matrix out once and cuBLAS are."""


def few_rows_linear(x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b with activations as bytes, by integer dot products."""
    return gemv(_bytes_of(x), weight, bias_N, out_dtype=values_of(x).dtype)


def auto_linear(x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b by what is fastest: integer dot products for few rows, else as f16_linear."""
    if values_of(x).shape[0] <= GEMV_ROWS:
        return few_rows_linear(x, weight, bias_N)
    return f16_linear(x, weight, bias_N)


def f16_linear(x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b with activations as they are: tensor cores on the quantised tile for a batch, a
    dequantised scratch and cuBLAS for large prefill."""
    x_TK = values_of(x)
    num_tokens, num_columns = x_TK.shape
    if num_tokens <= GEMM_ROWS and num_columns % UNIT == 0:
        return gemm(x_TK, weight, bias_N)
    return functional.linear(x_TK, dequantise(weight, x_TK.dtype), bias_N)


def int8_linear(x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b with activations rounded to int8 per 32 whatever the number of rows."""
    if values_of(x).shape[0] <= GEMV_ROWS:
        return few_rows_linear(x, weight, bias_N)
    return f16_linear(round_rows(values_of(x)), weight, bias_N)


def auto_stacked_linear(x: LinearInput, parts: Sequence[BiasedWeight]) -> Tensor:
    """auto_linear of each part, outputs side by side."""
    if values_of(x).shape[0] <= GEMV_ROWS:
        return _few_rows_stacked_linear(x, parts)
    return f16_stacked_linear(x, parts)


def f16_stacked_linear(x: LinearInput, parts: Sequence[BiasedWeight]) -> Tensor:
    """f16_linear of each part, outputs side by side."""
    return torch.cat([f16_linear(x, *part) for part in parts], dim=-1)


def int8_stacked_linear(x: LinearInput, parts: Sequence[BiasedWeight]) -> Tensor:
    """int8_linear of each part, outputs side by side."""
    if values_of(x).shape[0] <= GEMV_ROWS:
        return _few_rows_stacked_linear(x, parts)
    return f16_stacked_linear(round_rows(values_of(x)), parts)


def _few_rows_stacked_linear(x: LinearInput, parts: Sequence[BiasedWeight]) -> Tensor:
    """Every part writes its columns of one output."""
    x_TK, rows = values_of(x), _bytes_of(x)
    widths = [weight.num_rows for weight, _ in parts]
    out_TN = x_TK.new_empty((x_TK.shape[0], sum(widths)))
    for (weight, bias_N), part_TN in zip(parts, out_TN.split(widths, dim=1), strict=True):
        gemv(rows, weight, bias_N, out_TN=part_TN)
    return out_TN


def _bytes_of(x: LinearInput) -> QuantisedRows:
    return x.rounded if isinstance(x, RoundedRows) else quantise_rows(x)


# The kernels whose output a product takes next: for few rows with the bytes beside the floats.


def _room_for_bytes(
    num_tokens: int, num_columns: int, device: torch.device
) -> QuantisedRows | None:
    return empty_rows(num_tokens, num_columns, device) if num_tokens <= GEMV_ROWS else None


def _with_bytes(values_TK: Tensor, rounded: QuantisedRows | None) -> LinearInput:
    return values_TK if rounded is None else RoundedRows(values_TK=values_TK, rounded=rounded)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> LinearInput:
    """fused.rms_norm in float16."""
    room = _room_for_bytes(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    normed_TD = fused.rms_norm(x_TD, weight_D, eps, dtype=torch.float16, rounded=room)
    return _with_bytes(normed_TD, room)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[LinearInput, Tensor]:
    """fused.add_rms_norm."""
    room = _room_for_bytes(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    normed_TD, sum_TD = fused.add_rms_norm(x_TD, residual_TD, weight_D, eps, rounded=room)
    return _with_bytes(normed_TD, room), sum_TD


def swiglu(gate_up_TF: Tensor) -> LinearInput:
    """fused.swiglu."""
    num_tokens, twice = gate_up_TF.shape
    room = _room_for_bytes(num_tokens, twice // 2, gate_up_TF.device)
    return _with_bytes(fused.swiglu(gate_up_TF, rounded=room), room)


def paged_attention_decode(q_SNH: Tensor, *places: Any, **options: Any) -> LinearInput:
    """attention_decode.paged_attention_decode."""
    num_seqs, num_heads, head_dim = q_SNH.shape
    room = None
    if attention_decode.rounds_output(num_heads, head_dim):
        room = _room_for_bytes(num_seqs, num_heads * head_dim, q_SNH.device)
    out_SNH = attention_decode.paged_attention_decode(q_SNH, *places, **options, rounded=room)
    return _with_bytes(out_SNH.flatten(1), room)


def _plain_attention_decode(*inputs: Any, **options: Any) -> Tensor:
    return attention_decode.paged_attention_decode(*inputs, **options).flatten(1)


def _attention_prefill(*inputs: Any, **options: Any) -> Tensor:
    return attention_prefill.paged_attention_prefill(*inputs, **options).flatten(1)


TRITON = Backend(
    dtype=torch.float16,
    weight_form="planar",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    swiglu=swiglu,
    decode_places=decode_places,
    rotary_angles=rotary.rotary_angles,
    rotary_and_cache=rotary.rotary_and_cache,
    paged_attention_decode=paged_attention_decode,
    paged_attention_prefill=_attention_prefill,
    dequantise=partial(dequantise, dtype=torch.float16),
    quant_linear=auto_linear,
    stacked_quant_linear=auto_stacked_linear,
    fp8_linear=fp8_linear,
)
"""Quantised weights, activations in float16 or, for few rows, int8."""


def gpu_backend(weights: Weights, activations: Activations) -> Backend:
    """The backend of these options. Dense and e4m3 weights are multiplied in bf16, whose range no
    model leaves, and know no other activations."""
    if weights == "quantised":
        match activations:
            case "auto":
                return TRITON
            case "int8":
                return dataclasses.replace(
                    TRITON, quant_linear=int8_linear, stacked_quant_linear=int8_stacked_linear
                )
            case "f16":
                return _without_bytes(torch.float16)
    assert activations == "auto", f"{weights} weights with {activations} activations"
    return dataclasses.replace(
        _without_bytes(torch.bfloat16), weight_form="dense" if weights == "bf16" else "fp8"
    )


def _without_bytes(dtype: torch.dtype) -> Backend:
    return dataclasses.replace(
        TRITON,
        dtype=dtype,
        rms_norm=partial(fused.rms_norm, dtype=dtype),
        add_rms_norm=fused.add_rms_norm,
        swiglu=fused.swiglu,
        paged_attention_decode=_plain_attention_decode,
        dequantise=partial(dequantise, dtype=dtype),
        quant_linear=f16_linear,
        stacked_quant_linear=f16_stacked_linear,
    )
