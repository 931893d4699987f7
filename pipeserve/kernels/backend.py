"""Backend: the kernels of one kind of device as one value, which a model is built with.

Triton is imported only where a GPU asks for it: a CPU-only installation comes without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels import quant_reference, reference
from pipeserve.kernels.quant_layout import PlanarWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Each function as its twin in reference.py or quant_reference.py describes it."""

    dtype: torch.dtype
    """Of activations between kernels and of the KV cache; the residual stream is float32."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    rotary_and_cache: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    paged_attention_decode: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    paged_attention_prefill: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor
    ]
    dequantise: Callable[[PlanarWeight], Tensor]
    """A planar matrix [N, K] in dtype."""
    quant_linear: Callable[[Tensor, PlanarWeight, Tensor | None], Tensor]
    """x W^T + b for a planar matrix: [T, K] -> [T, N]."""


def _reference_quant_linear(x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    return functional.linear(x_TK, quant_reference.dequantise(weight), bias_N)


REFERENCE = Backend(
    dtype=torch.float32,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    swiglu=reference.swiglu,
    rotary_and_cache=reference.rotary_and_cache,
    paged_attention_decode=reference.paged_attention_decode,
    paged_attention_prefill=reference.paged_attention_prefill,
    dequantise=quant_reference.dequantise,
    quant_linear=_reference_quant_linear,
)
"""Plain torch in float32: the CPU path."""


def backend_for(device: torch.device) -> Backend:
    """The kernels for a stage on this device."""
    if device.type == "cpu":
        return REFERENCE
    from pipeserve.kernels.triton_backend import TRITON

    return TRITON
