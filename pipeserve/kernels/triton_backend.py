"""The Backends of GPUs: Triton kernels, and a way to multiply per precision and number of rows."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels import fused
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.attention_prefill import paged_attention_prefill
from pipeserve.kernels.backend import Activations, Backend, Weights
from pipeserve.kernels.fp8 import fp8_linear
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_gemv import gemv, quantise_rows
from pipeserve.kernels.quant_layout import UNIT, PlanarWeight
from pipeserve.kernels.quant_round import round_rows

GEMV_ROWS = 4
"""Up to this many, integer dot products are fastest: measured on an H100 (loadtest/README.md)."""
GEMM_ROWS = 256
"""From more rows on, writing the matrix out once and cuBLAS are."""


def auto_linear(x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b by what is fastest: integer dot products for few rows, else as f16_linear."""
    if x_TK.shape[0] <= GEMV_ROWS:
        return gemv(quantise_rows(x_TK), weight, bias_N, out_dtype=x_TK.dtype)
    return f16_linear(x_TK, weight, bias_N)


def f16_linear(x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b with activations as they are: tensor cores on the quantised tile for a batch, a
    dequantised scratch and cuBLAS for large prefill."""
    num_tokens, num_columns = x_TK.shape
    if num_tokens <= GEMM_ROWS and num_columns % UNIT == 0:
        return gemm(x_TK, weight, bias_N)
    return functional.linear(x_TK, dequantise(weight, x_TK.dtype), bias_N)


def int8_linear(x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b with activations rounded to int8 per 32 whatever the number of rows."""
    if x_TK.shape[0] <= GEMV_ROWS:
        return gemv(quantise_rows(x_TK), weight, bias_N, out_dtype=x_TK.dtype)
    return f16_linear(round_rows(x_TK), weight, bias_N)


TRITON = Backend(
    dtype=torch.float16,
    weight_form="planar",
    rms_norm=fused.rms_norm,
    add_rms_norm=fused.add_rms_norm,
    swiglu=fused.swiglu,
    rotary_and_cache=fused.rotary_and_cache,
    paged_attention_decode=paged_attention_decode,
    paged_attention_prefill=paged_attention_prefill,
    dequantise=partial(dequantise, dtype=torch.float16),
    quant_linear=auto_linear,
    fp8_linear=fp8_linear,
)
"""Quantised weights, activations in float16 or, for few rows, int8."""


def gpu_backend(weights: Weights, activations: Activations) -> Backend:
    """The backend of these options. Dense and e4m3 weights are multiplied in bf16, whose range no
    model leaves, and know no other activations."""
    if weights == "quantised":
        linears = {"auto": auto_linear, "f16": f16_linear, "int8": int8_linear}
        return dataclasses.replace(TRITON, quant_linear=linears[activations])
    assert activations == "auto", f"{weights} weights with {activations} activations"
    return dataclasses.replace(
        TRITON,
        dtype=torch.bfloat16,
        weight_form="dense" if weights == "bf16" else "fp8",
        dequantise=partial(dequantise, dtype=torch.bfloat16),
        quant_linear=f16_linear,
    )
