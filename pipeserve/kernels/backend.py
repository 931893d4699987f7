"""Backend: the kernels of one kind of device as one value, which a model is built with.

Triton is imported only where a GPU asks for it: a CPU-only installation comes without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels import attention, fp8_reference, quant_reference, reference
from pipeserve.kernels.attention import (
    PagedAttentionDecode,
    PagedAttentionPrefill,
    RotaryAndCache,
)
from pipeserve.kernels.fp8_reference import Fp8Weight
from pipeserve.kernels.quant_layout import PlanarWeight
from pipeserve.kernels.quant_reference import LinearInput, values_of

WeightForm = Literal["planar", "dense", "both", "fp8"]
"""How matrices are held: in the planar layout of their own type where it has one, as plain numbers
of the backend's type, in both ways, or as Fp8Weight."""

Weights = Literal["quantised", "both", "bf16", "fp8"]
Activations = Literal["auto", "f16", "int8"]

InputForm = Literal["values", "e4m3"]
"""What the product takes that follows."""

BiasedWeight = tuple[PlanarWeight, Tensor | None]


class AddRmsNorm(Protocol):
    """As the twin, for a product that takes this form: many tokens in e4m3 may be nothing else."""

    def __call__(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        *,
        form: InputForm = "values",
    ) -> tuple[LinearInput, Tensor]: ...


class QuantLinear(Protocol):
    """x W^T + b for a planar matrix, [T, K] -> [T, N], in the type of out_TN if that is given."""

    def __call__(
        self,
        x: LinearInput,
        weight: PlanarWeight,
        bias_N: Tensor | None,
        *,
        out_TN: Tensor | None = None,
    ) -> Tensor: ...


class SwiGLU(Protocol):
    """Likewise."""

    def __call__(self, gate_up_TF: Tensor, *, form: InputForm = "values") -> LinearInput: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Each function as its twin in reference.py or quant_reference.py describes it.

    What a product takes next comes as a LinearInput: with the bytes beside the floats where the
    backend multiplies so few rows as bytes.
    """

    dtype: torch.dtype
    """Of activations between kernels, and of the KV cache unless it is int8; the residual stream is
    float32."""
    weight_form: WeightForm
    """Of matrices, as far as their types and the model allow."""
    rms_norm: Callable[[Tensor, Tensor, float], LinearInput]
    """Of the float32 residual stream, in dtype."""
    add_rms_norm: AddRmsNorm
    swiglu: SwiGLU
    """Of outputs whose first half is gate."""
    decode_places: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    rotary_angles: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary_and_cache: RotaryAndCache
    paged_attention_decode: PagedAttentionDecode
    paged_attention_prefill: PagedAttentionPrefill
    dequantise: Callable[[PlanarWeight], Tensor]
    """A planar matrix [N, K] in dtype."""
    quant_linear: QuantLinear
    stacked_quant_linear: Callable[[LinearInput, Sequence[BiasedWeight]], Tensor]
    """The same for matrices of several types, outputs side by side."""
    gated_linear: Callable[[LinearInput, PlanarWeight, Tensor | None], LinearInput]
    """swiglu of the same for a planar matrix that is_paired: [T, K] -> [T, F]."""
    fp8_linear: Callable[[LinearInput, Fp8Weight, Tensor | None], Tensor]
    """The same for a matrix in e4m3."""
    prepare: Callable[[Sequence[PlanarWeight], Sequence[PlanarWeight]], str | None]
    """Compile what these matrices' products take, where that is better done ahead, of the second
    ones in float32; what the user should know of a kernel that cannot be had."""


def _reference_add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    form: InputForm = "values",
) -> tuple[LinearInput, Tensor]:
    return reference.add_rms_norm(x_TD, residual_TD, weight_D, eps)


def _reference_swiglu(gate_up_TF: Tensor, *, form: InputForm = "values") -> LinearInput:
    return reference.swiglu(gate_up_TF)


def _reference_quant_linear(
    x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None, *, out_TN: Tensor | None = None
) -> Tensor:
    product_TN = functional.linear(values_of(x), quant_reference.dequantise(weight), bias_N)
    return product_TN if out_TN is None else out_TN.copy_(product_TN)


def _reference_stacked_quant_linear(x: LinearInput, parts: Sequence[BiasedWeight]) -> Tensor:
    return torch.cat([_reference_quant_linear(x, *part) for part in parts], dim=-1)


def _reference_gated_linear(x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None) -> Tensor:
    return reference.swiglu(_reference_quant_linear(x, weight, bias_N), order="paired")


def _reference_fp8_linear(x: LinearInput, weight: Fp8Weight, bias_N: Tensor | None) -> Tensor:
    return fp8_reference.fp8_linear(values_of(x), weight, bias_N)


REFERENCE = Backend(
    dtype=torch.float32,
    weight_form="dense",
    rms_norm=reference.rms_norm,
    add_rms_norm=_reference_add_rms_norm,
    swiglu=_reference_swiglu,
    decode_places=reference.decode_places,
    rotary_angles=reference.rotary_angles,
    rotary_and_cache=attention.rotary_and_cache,
    paged_attention_decode=attention.paged_attention_decode,
    paged_attention_prefill=attention.paged_attention_prefill,
    dequantise=quant_reference.dequantise,
    quant_linear=_reference_quant_linear,
    stacked_quant_linear=_reference_stacked_quant_linear,
    gated_linear=_reference_gated_linear,
    fp8_linear=_reference_fp8_linear,
    prepare=lambda weights, wide: None,
)
"""Plain torch in float32: the CPU path."""


def backend_for(
    device: torch.device,
    *,
    weights: Weights = "quantised",
    activations: Activations = "auto",
    tuned_folder: Path | None = None,
) -> Backend:
    """The kernels for a stage on this device, of the precision that the options name.

    CPU stages compute in float32 whatever these say. tuned_folder: where the user's own tables of
    measured choices lie. Raises TunedTableError.
    """
    if device.type == "cpu":
        return REFERENCE
    from pipeserve.kernels.quant_tuned import tuned_table
    from pipeserve.kernels.triton_backend import gpu_backend

    # A machine without the card can still plan for it.
    card = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    table = tuned_table(card, tuned_folder)
    return gpu_backend(weights, activations, table)
