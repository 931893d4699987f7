"""The Backends of GPUs: Triton kernels, and a way to multiply per precision and number of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeserve.kernels import (
    attention_decode,
    attention_prefill,
    fp8_fused,
    fp8_tokens,
    fused,
    rotary,
)
from pipeserve.kernels.backend import (
    Activations,
    Backend,
    BiasedWeight,
    InputForm,
    WeightForm,
    Weights,
)
from pipeserve.kernels.fp8 import FEW_ROWS, WIDE_ROWS, fp8_linear
from pipeserve.kernels.fp8_reference import FP8_GROUP, Fp8Rows
from pipeserve.kernels.paired_rows import GateUpOrder
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_layout import PlanarWeight
from pipeserve.kernels.quant_products import QuantProducts
from pipeserve.kernels.quant_reference import (
    ACTIVATION_GROUP,
    LinearInput,
    PreparedRows,
    QuantisedRows,
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
    return products.batch(x, weight, bias_N, out_TN=out_TN)


def f16_linear(
    products: QuantProducts, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None,
    *, out_TN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b with activations as they are: tensor cores on the quantised tile for a batch, a
    dequantised scratch and cuBLAS for large prefill."""
    return products.batch(x, weight, bias_N, out_TN=out_TN)


def int8_linear(
    products: QuantProducts, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None,
    *, out_TN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b with activations rounded to int8 per 32 whatever the number of rows."""
    return auto_linear(products, _rounded(products, x, [weight]), weight, bias_N, out_TN=out_TN)


def auto_stacked_linear(
    products: QuantProducts, x: LinearInput, parts: Sequence[BiasedWeight]
) -> Tensor:
    """auto_linear of each part, outputs side by side."""
    x_TK = values_of(x)
    if any(products.takes_bytes(weight, x_TK.shape[0]) for weight, _ in parts):
        x = _with_bytes(x)  # once for all of them
        return _side_by_side(x_TK, parts, partial(auto_linear, products, x))
    return f16_stacked_linear(products, x, parts)


def f16_stacked_linear(
    products: QuantProducts, x: LinearInput, parts: Sequence[BiasedWeight]
) -> Tensor:
    """f16_linear of each part, outputs side by side."""
    x_TK, weights = values_of(x), [weight for weight, _ in parts]
    out_TN, outs_TN = _columns_of(x_TK, weights)
    turns = products.turns(x, weights, outs_TN)
    for (weight, bias_N), part_TN, turn in zip(parts, outs_TN, turns, strict=True):
        products.batch(x, weight, bias_N, out_TN=part_TN, turn=turn)
    return out_TN


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
    return (
        PreparedRows(values_TK=values_TK, rounded=_bytes_of(x)) if any(takes_bytes) else values_TK
    )


def _side_by_side(
    x_TK: Tensor, parts: Sequence[BiasedWeight], multiply: Callable[..., Tensor]
) -> Tensor:
    """Every part writes its columns of one output."""
    out_TN, outs_TN = _columns_of(x_TK, [weight for weight, _ in parts])
    for (weight, bias_N), part_TN in zip(parts, outs_TN, strict=True):
        multiply(weight, bias_N, out_TN=part_TN)
    return out_TN


def _columns_of(x_TK: Tensor, weights: Sequence[PlanarWeight]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One output of all these, and each one's columns of it."""
    widths = [weight.num_rows for weight in weights]
    out_TN = x_TK.new_empty((x_TK.shape[0], sum(widths)))
    return out_TN, out_TN.split(widths, dim=1)


def _bytes_of(x: LinearInput) -> QuantisedRows:
    if isinstance(x, PreparedRows) and x.rounded is not None:
        return x.rounded
    return quantise_rows(values_of(x))


def _with_bytes(x: LinearInput) -> PreparedRows:
    prepared = x if isinstance(x, PreparedRows) else PreparedRows(values_TK=values_of(x))
    return dataclasses.replace(prepared, rounded=_bytes_of(x))


# The kernels whose output a product takes next: in the forms that it needs beside the floats.


_MERGED_ROWS = 32
"""Attention of more decode rows seldom cuts a sequence."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FormsWanted:
    """Which forms the products on a card take."""

    products: QuantProducts
    has_bytes: bool
    """Few rows as bytes."""
    has_e4m3: bool = False
    """Few rows as 8-bit floats, and none in another form."""

    def is_e4m3_alone(self, num_tokens: int, form: InputForm, *, most_grouped: int) -> bool:
        """Whether a product takes nothing but 8-bit floats by a scale per token, as of more tokens
        than go by groups."""
        return self.has_e4m3 and form == "e4m3" and num_tokens > most_grouped

    def rooms(
        self, num_tokens: int, num_columns: int, device: torch.device, form: InputForm = "values"
    ) -> tuple[QuantisedRows | Fp8Rows | None, Tensor | None]:
        """Rounded and interleaved rows to be written, where they are wanted."""
        rounded = interleaved_TK = None
        if self.has_e4m3:
            if form != "e4m3" or num_tokens > FEW_ROWS or num_columns % FP8_GROUP:
                return None, None
            return fp8_tokens.empty_rows(num_tokens, num_columns, FP8_GROUP, device), None
        if self.has_bytes and num_tokens <= self.products.most_byte_rows(device):
            rounded = empty_rows(num_tokens, num_columns, device)
        if self.products.takes_interleaved(num_tokens, num_columns, device):
            shape = (num_tokens, num_columns)
            interleaved_TK = torch.empty(shape, dtype=torch.float16, device=device)
        return rounded, interleaved_TK


def _prepared(
    values_TK: Tensor, rounded: QuantisedRows | Fp8Rows | None, interleaved_TK: Tensor | None
) -> LinearInput:
    if isinstance(rounded, Fp8Rows):
        return PreparedRows(values_TK=values_TK, e4m3=rounded)
    if rounded is None and interleaved_TK is None:
        return values_TK
    return PreparedRows(values_TK=values_TK, rounded=rounded, interleaved_TK=interleaved_TK)


def rms_norm(forms: FormsWanted, x_TD: Tensor, weight_D: Tensor, eps: float) -> LinearInput:
    """fused.rms_norm in float16, in the forms wanted."""
    rounded, interleaved_TD = forms.rooms(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    normed_TD = fused.rms_norm(
        x_TD, weight_D, eps, dtype=torch.float16, rounded=rounded, interleaved_TD=interleaved_TD
    )
    return _prepared(normed_TD, rounded, interleaved_TD)


def add_rms_norm(
    forms: FormsWanted, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float,
    *, form: InputForm = "values",
) -> tuple[LinearInput, Tensor]:  # fmt: skip
    """fused.add_rms_norm."""
    num_tokens, dim = x_TD.shape
    if forms.is_e4m3_alone(num_tokens, form, most_grouped=WIDE_ROWS):
        return fp8_fused.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    rounded, interleaved_TD = forms.rooms(num_tokens, dim, x_TD.device, form)
    normed_TD, sum_TD = fused.add_rms_norm(
        x_TD, residual_TD, weight_D, eps, rounded=rounded, interleaved_TD=interleaved_TD
    )
    return _prepared(normed_TD, rounded, interleaved_TD), sum_TD


def swiglu(
    forms: FormsWanted, gate_up_TF: Tensor,
    *, order: GateUpOrder = "halves", form: InputForm = "values",
) -> LinearInput:  # fmt: skip
    """fused.swiglu."""
    num_tokens, twice = gate_up_TF.shape
    if forms.is_e4m3_alone(num_tokens, form, most_grouped=FEW_ROWS):
        assert order == "halves", "planar matrices have the other order"
        return fp8_fused.swiglu(gate_up_TF)
    rounded, interleaved_TF = forms.rooms(num_tokens, twice // 2, gate_up_TF.device, form)
    out_TF = fused.swiglu(gate_up_TF, order=order, rounded=rounded, interleaved_TF=interleaved_TF)
    return _prepared(out_TF, rounded, interleaved_TF)


def auto_gated_linear(
    forms: FormsWanted, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None
) -> LinearInput:
    """swiglu of auto_linear by a matrix that is_paired."""
    if not forms.products.takes_bytes(weight, values_of(x).shape[0]):
        return f16_gated_linear(forms, x, weight, bias_N)
    return swiglu(forms, auto_linear(forms.products, x, weight, bias_N), order="paired")


def f16_gated_linear(
    forms: FormsWanted, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None
) -> LinearInput:
    """swiglu of f16_linear by a matrix that is_paired, in one launch where there is a kernel."""
    gated = forms.products.gated_batch(x, weight, bias_N)
    if gated is not None:
        return gated
    return swiglu(forms, f16_linear(forms.products, x, weight, bias_N), order="paired")


def int8_gated_linear(
    forms: FormsWanted, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None
) -> LinearInput:
    """swiglu of int8_linear by a matrix that is_paired."""
    return auto_gated_linear(forms, _rounded(forms.products, x, [weight]), weight, bias_N)


def _plain_gated_linear(
    products: QuantProducts, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None
) -> Tensor:
    return fused.swiglu(f16_linear(products, x, weight, bias_N), order="paired")


def paged_attention_decode(
    forms: FormsWanted, q_SNH: Tensor, *places: Any, **options: Any
) -> LinearInput:
    """attention_decode.paged_attention_decode."""
    num_seqs, num_heads, head_dim = q_SNH.shape
    rounded, interleaved_SK = forms.rooms(num_seqs, num_heads * head_dim, q_SNH.device, "e4m3")
    per_scale = FP8_GROUP if isinstance(rounded, Fp8Rows) else ACTIVATION_GROUP
    is_whole = num_seqs > _MERGED_ROWS  # and written without a merge, if nothing else is wanted
    if is_whole or not attention_decode.rounds_output(num_heads, head_dim, per_scale):
        rounded = None
    out_SNH = attention_decode.paged_attention_decode(
        q_SNH, *places, **options, rounded=rounded, interleaved_SK=interleaved_SK
    )
    return _prepared(out_SNH.flatten(1), rounded, interleaved_SK)


def _plain_add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    form: InputForm = "values",
) -> tuple[LinearInput, Tensor]:
    return fused.add_rms_norm(x_TD, residual_TD, weight_D, eps)


def _plain_swiglu(gate_up_TF: Tensor, *, form: InputForm = "values") -> LinearInput:
    return fused.swiglu(gate_up_TF)


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
    backend = _dense_backend(products)
    if weights == "bf16":
        return dataclasses.replace(backend, weight_form="dense")
    forms = FormsWanted(products=products, has_bytes=False, has_e4m3=True)
    return dataclasses.replace(
        backend,
        weight_form="fp8",
        add_rms_norm=partial(add_rms_norm, forms),
        swiglu=partial(swiglu, forms),
        paged_attention_decode=partial(paged_attention_decode, forms),
    )


def _quantised_backend(products: QuantProducts, activations: Activations) -> Backend:
    forms = FormsWanted(products=products, has_bytes=activations != "f16")
    match activations:
        case "auto":
            return _planar_backend(forms)
        case "int8":
            return dataclasses.replace(
                _planar_backend(forms),
                quant_linear=partial(int8_linear, products),
                stacked_quant_linear=partial(int8_stacked_linear, products),
                gated_linear=partial(int8_gated_linear, forms),
            )
        case "f16":
            return dataclasses.replace(
                _planar_backend(forms),
                quant_linear=partial(f16_linear, products),
                stacked_quant_linear=partial(f16_stacked_linear, products),
                gated_linear=partial(f16_gated_linear, forms),
            )


def _planar_backend(forms: FormsWanted) -> Backend:
    """Quantised weights, activations in float16 or, as forms has it for few rows, int8."""
    products = forms.products
    return Backend(
        dtype=torch.float16,
        weight_form="planar",
        rms_norm=partial(rms_norm, forms),
        add_rms_norm=partial(add_rms_norm, forms),
        swiglu=partial(swiglu, forms),
        decode_places=decode_places,
        rotary_angles=rotary.rotary_angles,
        rotary_and_cache=rotary.rotary_and_cache,
        paged_attention_decode=partial(paged_attention_decode, forms),
        paged_attention_prefill=_attention_prefill,
        dequantise=partial(dequantise, dtype=torch.float16),
        quant_linear=partial(auto_linear, products),
        stacked_quant_linear=partial(auto_stacked_linear, products),
        gated_linear=partial(auto_gated_linear, forms),
        fp8_linear=fp8_linear,
        prepare=products.prepare,
    )


def _dense_backend(products: QuantProducts) -> Backend:
    """Dense and e4m3 weights, multiplied in bf16; float16 for none but other planar ones."""
    dtype = torch.bfloat16
    return dataclasses.replace(
        _planar_backend(FormsWanted(products=products, has_bytes=False)),
        dtype=dtype,
        rms_norm=partial(fused.rms_norm, dtype=dtype),
        add_rms_norm=_plain_add_rms_norm,
        swiglu=_plain_swiglu,
        paged_attention_decode=_plain_attention_decode,
        dequantise=partial(dequantise, dtype=dtype),
        quant_linear=partial(f16_linear, products),
        stacked_quant_linear=partial(f16_stacked_linear, products),
        gated_linear=partial(_plain_gated_linear, products),
    )
