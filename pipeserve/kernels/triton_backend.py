"""The Backends of GPUs: Triton kernels, and a way to multiply per precision and number of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeserve.kernels import attention_decode, attention_prefill, fused, rotary
from pipeserve.kernels.backend import Activations, Backend, BiasedWeight, WeightForm, Weights
from pipeserve.kernels.fp8 import fp8_linear
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_layout import PlanarWeight
from pipeserve.kernels.quant_products import QuantProducts
from pipeserve.kernels.quant_reference import (
    LinearInput,
    QuantisedRows,
    RoundedRows,
    values_of,
)
from pipeserve.kernels.quant_round import round_rows
from pipeserve.kernels.quant_tuned import TunedTable
from pipeserve.kernels.rounded_rows import empty_rows, quantise_rows
from pipeserve.kernels.step_places import decode_places


def auto_linear(
    products: QuantProducts, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None,
    *, out_TN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b by what is fastest: activations as bytes for few rows, else as f16_linear."""
    x_TK = values_of(x)
    if products.takes_bytes(weight, x_TK.shape[0]):
        return products.few_rows(
            _bytes_of(x), weight, bias_N, out_dtype=x_TK.dtype, out_TN=out_TN
        )  # fmt: skip
    return products.batch(x_TK, weight, bias_N, out_TN=out_TN)


def f16_linear(
    products: QuantProducts, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None
) -> Tensor:
    """x W^T + b with activations as they are: tensor cores on the quantised tile for a batch, a
    dequantised scratch and cuBLAS for large prefill."""
    return products.batch(values_of(x), weight, bias_N)


def int8_linear(
    products: QuantProducts, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None
) -> Tensor:
    """x W^T + b with activations rounded to int8 per 32 whatever the number of rows."""
    return auto_linear(products, _rounded(products, x, [weight]), weight, bias_N)


def auto_stacked_linear(
    products: QuantProducts, x: LinearInput, parts: Sequence[BiasedWeight]
) -> Tensor:
    """auto_linear of each part, outputs side by side."""
    x_TK = values_of(x)
    if any(products.takes_bytes(weight, x_TK.shape[0]) for weight, _ in parts):
        x = RoundedRows(values_TK=x_TK, rounded=_bytes_of(x))  # once for all of them
    return _side_by_side(x_TK, parts, partial(auto_linear, products, x))


def f16_stacked_linear(
    products: QuantProducts, x: LinearInput, parts: Sequence[BiasedWeight]
) -> Tensor:
    """f16_linear of each part, outputs side by side."""
    x_TK = values_of(x)
    return _side_by_side(x_TK, parts, partial(products.batch, x_TK))


def int8_stacked_linear(
    products: QuantProducts, x: LinearInput, parts: Sequence[BiasedWeight]
) -> Tensor:
    """int8_linear of each part, outputs side by side."""
    weights = [weight for weight, _ in parts]
    return auto_stacked_linear(products, _rounded(products, x, weights), parts)


def _rounded(
    products: QuantProducts, x: LinearInput, weights: Sequence[PlanarWeight]
) -> LinearInput:
    """Rounded to bytes in both forms, as far as these matrices take them."""
    num_tokens = values_of(x).shape[0]
    takes_bytes = [products.takes_bytes(weight, num_tokens) for weight in weights]
    if all(takes_bytes):
        return x
    values_TK = round_rows(values_of(x))
    return RoundedRows(values_TK=values_TK, rounded=_bytes_of(x)) if any(takes_bytes) else values_TK


def _side_by_side(
    x_TK: Tensor, parts: Sequence[BiasedWeight], multiply: Callable[..., Tensor]
) -> Tensor:
    """Every part writes its columns of one output."""
    widths = [weight.num_rows for weight, _ in parts]
    out_TN = x_TK.new_empty((x_TK.shape[0], sum(widths)))
    for (weight, bias_N), part_TN in zip(parts, out_TN.split(widths, dim=1), strict=True):
        multiply(weight, bias_N, out_TN=part_TN)
    return out_TN


def _bytes_of(x: LinearInput) -> QuantisedRows:
    return x.rounded if isinstance(x, RoundedRows) else quantise_rows(x)


# The kernels whose output a product takes next: for few rows with the bytes beside the floats.


def _room_for_bytes(
    byte_rows: int, num_tokens: int, num_columns: int, device: torch.device
) -> QuantisedRows | None:
    return empty_rows(num_tokens, num_columns, device) if num_tokens <= byte_rows else None


def _with_bytes(values_TK: Tensor, rounded: QuantisedRows | None) -> LinearInput:
    return values_TK if rounded is None else RoundedRows(values_TK=values_TK, rounded=rounded)


def rms_norm(byte_rows: int, x_TD: Tensor, weight_D: Tensor, eps: float) -> LinearInput:
    """fused.rms_norm in float16, with bytes up to so many rows."""
    room = _room_for_bytes(byte_rows, x_TD.shape[0], x_TD.shape[1], x_TD.device)
    normed_TD = fused.rms_norm(x_TD, weight_D, eps, dtype=torch.float16, rounded=room)
    return _with_bytes(normed_TD, room)


def add_rms_norm(
    byte_rows: int, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[LinearInput, Tensor]:
    """fused.add_rms_norm."""
    room = _room_for_bytes(byte_rows, x_TD.shape[0], x_TD.shape[1], x_TD.device)
    normed_TD, sum_TD = fused.add_rms_norm(x_TD, residual_TD, weight_D, eps, rounded=room)
    return _with_bytes(normed_TD, room), sum_TD


def swiglu(byte_rows: int, gate_up_TF: Tensor) -> LinearInput:
    """fused.swiglu."""
    num_tokens, twice = gate_up_TF.shape
    room = _room_for_bytes(byte_rows, num_tokens, twice // 2, gate_up_TF.device)
    return _with_bytes(fused.swiglu(gate_up_TF, rounded=room), room)


def paged_attention_decode(
    byte_rows: int, q_SNH: Tensor, *places: Any, **options: Any
) -> LinearInput:
    """attention_decode.paged_attention_decode."""
    num_seqs, num_heads, head_dim = q_SNH.shape
    room = None
    if attention_decode.rounds_output(num_heads, head_dim):
        room = _room_for_bytes(byte_rows, num_seqs, num_heads * head_dim, q_SNH.device)
    out_SNH = attention_decode.paged_attention_decode(q_SNH, *places, **options, rounded=room)
    return _with_bytes(out_SNH.flatten(1), room)


def _plain_attention_decode(*inputs: Any, **options: Any) -> Tensor:
    return attention_decode.paged_attention_decode(*inputs, **options).flatten(1)


def _attention_prefill(*inputs: Any, **options: Any) -> Tensor:
    return attention_prefill.paged_attention_prefill(*inputs, **options).flatten(1)


def gpu_backend(
    weights: Weights, activations: Activations, table: TunedTable | None = None
) -> Backend:
    """The backend of these options, with a card's measured choices. Dense and e4m3 weights are
    multiplied in bf16, whose range no model leaves, and know no other activations."""
    products = QuantProducts(TunedTable() if table is None else table)
    if weights in ("quantised", "both"):
        backend = _quantised_backend(products, activations)
        form: WeightForm = "planar" if weights == "quantised" else "both"
        return dataclasses.replace(backend, weight_form=form)
    assert activations == "auto", f"{weights} weights with {activations} activations"
    return dataclasses.replace(
        _without_bytes(products, torch.bfloat16),
        weight_form="dense" if weights == "bf16" else "fp8",
    )


def _quantised_backend(products: QuantProducts, activations: Activations) -> Backend:
    match activations:
        case "auto":
            return _with_bytes_for_few_rows(products)
        case "int8":
            return dataclasses.replace(
                _with_bytes_for_few_rows(products),
                quant_linear=partial(int8_linear, products),
                stacked_quant_linear=partial(int8_stacked_linear, products),
            )
        case "f16":
            return _without_bytes(products, torch.float16)


def _with_bytes_for_few_rows(products: QuantProducts) -> Backend:
    """Quantised weights, activations in float16 or, for few rows, int8."""
    byte_rows = products.most_byte_rows
    return Backend(
        dtype=torch.float16,
        weight_form="planar",
        rms_norm=partial(rms_norm, byte_rows),
        add_rms_norm=partial(add_rms_norm, byte_rows),
        swiglu=partial(swiglu, byte_rows),
        decode_places=decode_places,
        rotary_angles=rotary.rotary_angles,
        rotary_and_cache=rotary.rotary_and_cache,
        paged_attention_decode=partial(paged_attention_decode, byte_rows),
        paged_attention_prefill=_attention_prefill,
        dequantise=partial(dequantise, dtype=torch.float16),
        quant_linear=partial(auto_linear, products),
        stacked_quant_linear=partial(auto_stacked_linear, products),
        fp8_linear=fp8_linear,
        prepare=products.prepare,
    )


def _without_bytes(products: QuantProducts, dtype: torch.dtype) -> Backend:
    return dataclasses.replace(
        _with_bytes_for_few_rows(products),
        dtype=dtype,
        rms_norm=partial(fused.rms_norm, dtype=dtype),
        add_rms_norm=fused.add_rms_norm,
        swiglu=fused.swiglu,
        paged_attention_decode=_plain_attention_decode,
        dequantise=partial(dequantise, dtype=dtype),
        quant_linear=partial(f16_linear, products),
        stacked_quant_linear=partial(f16_stacked_linear, products),
    )
