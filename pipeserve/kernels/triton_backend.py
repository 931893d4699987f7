"""The Backend of GPUs: Triton kernels, activations in float16, a matmul kernel per regime."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels import fused
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.attention_prefill import paged_attention_prefill
from pipeserve.kernels.backend import Backend
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_gemv import gemv, quantise_rows
from pipeserve.kernels.quant_layout import UNIT, PlanarWeight

GEMV_ROWS = 4
"""Up to this many, integer dot products are fastest: measured on an H100 (loadtest/README.md)."""
GEMM_ROWS = 256
"""From more rows on, writing the matrix out once and cuBLAS are."""


def quant_linear(x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b: integer dot products for few rows, tensor cores on the quantised tile for a
    batch, a dequantised scratch and cuBLAS for large prefill."""
    num_tokens, num_columns = x_TK.shape
    if num_tokens <= GEMV_ROWS:
        return gemv(quantise_rows(x_TK), weight, bias_N, out_dtype=x_TK.dtype)
    if num_tokens <= GEMM_ROWS and num_columns % UNIT == 0:
        return gemm(x_TK, weight, bias_N)
    return functional.linear(x_TK, dequantise(weight, x_TK.dtype), bias_N)


TRITON = Backend(
    dtype=torch.float16,
    rms_norm=fused.rms_norm,
    add_rms_norm=fused.add_rms_norm,
    swiglu=fused.swiglu,
    rotary_and_cache=fused.rotary_and_cache,
    paged_attention_decode=paged_attention_decode,
    paged_attention_prefill=paged_attention_prefill,
    dequantise=partial(dequantise, dtype=torch.float16),
    quant_linear=quant_linear,
)
