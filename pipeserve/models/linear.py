"""Matrices as a stage holds them: linear layers and embeddings, one class per way of holding.

Used by one stage thread each.

Shapes: T tokens, I inputs, O outputs, V vocabulary, D model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels.backend import Backend, InputForm
from pipeserve.kernels.fp8_reference import Fp8Weight
from pipeserve.kernels.quant_layout import PlanarWeight
from pipeserve.kernels.quant_reference import LinearInput, values_of

_PACK_FOR_ROWS = 8
"""Rows that oneDNN's blocked layout is chosen for. Measured with AVX-512 on 960 to 49152 outputs:
the one for 8 does as well as any for 1 to 256 rows; the one for 1 is up to 1.7 times slower."""

Matrix = Tensor | PlanarWeight | Fp8Weight
"""[O, I]: floats in the backend's type, quantised as in the file, or rounded to e4m3."""


class Linear(Protocol):
    """y = x W^T + b."""

    def __call__(self, x_TI: LinearInput) -> Tensor:
        """[T, I] -> [T, O]."""
        ...


class DenseLinear:
    """The matrix as torch stores it."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O

    def __call__(self, x_TI: LinearInput) -> Tensor:
        return functional.linear(values_of(x_TI), self._weight_OI, self._bias_O)


class PackedLinear:
    """float32 on the CPU in oneDNN's blocked layout; from 2 rows on up to 2.5 times faster."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACK_FOR_ROWS)
        self._bias_O = bias_O

    def __call__(self, x_TI: LinearInput) -> Tensor:
        x_TI = values_of(x_TI)
        return torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, self._bias_O, "none", [], "")


class QuantLinear:
    """A matrix that stays quantised."""

    def __init__(self, weight: PlanarWeight, bias_O: Tensor | None, backend: Backend) -> None:
        self.weight = weight
        self.bias_O = bias_O
        self._backend = backend

    def __call__(self, x_TI: LinearInput) -> Tensor:
        return self._backend.quant_linear(x_TI, self.weight, self.bias_O)


class StackedQuantLinear:
    """Rows that stay quantised in different types, such as q and k in Q4_K and v in Q6_K."""

    def __init__(self, parts: Sequence[QuantLinear], backend: Backend) -> None:
        self._parts = [(part.weight, part.bias_O) for part in parts]
        self._backend = backend

    @property
    def weights(self) -> list[PlanarWeight]:
        return [weight for weight, _ in self._parts]

    def __call__(self, x_TI: LinearInput) -> Tensor:
        return self._backend.stacked_quant_linear(x_TI, self._parts)


class Fp8Linear:
    """A matrix in e4m3, whose activations are rounded to it too."""

    def __init__(self, weight: Fp8Weight, bias_O: Tensor | None, backend: Backend) -> None:
        self._weight = weight
        self._bias_O = bias_O
        self._backend = backend

    def __call__(self, x_TI: LinearInput) -> Tensor:
        return self._backend.fp8_linear(x_TI, self._weight, self._bias_O)


class Logits(Protocol):
    """A linear whose products stay in float32, in which they are summed anyway: bf16 would round a
    logit of 20 to a multiple of 1/8."""

    def __call__(self, x_TI: LinearInput, *, out_TO: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O] float32, written to out_TO if that is given."""
        ...


class DenseLogits:
    """By a 16-bit matrix on a GPU."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_IO = weight_OI.t()
        self._bias_O = None if bias_O is None else bias_O.float()

    def __call__(self, x_TI: LinearInput, *, out_TO: Tensor | None = None) -> Tensor:
        x_TI = values_of(x_TI)
        if out_TO is None:
            out_TO = _float_room(x_TI, self._weight_IO.shape[1])
        torch.mm(x_TI, self._weight_IO, out_dtype=torch.float32, out=out_TO)
        return out_TO if self._bias_O is None else out_TO.add_(self._bias_O)


class QuantLogits:
    """By a matrix that stays quantised."""

    def __init__(self, weight: PlanarWeight, bias_O: Tensor | None, backend: Backend) -> None:
        self.weight = weight
        self._bias_O = bias_O
        self._backend = backend

    def __call__(self, x_TI: LinearInput, *, out_TO: Tensor | None = None) -> Tensor:
        if out_TO is None:
            out_TO = _float_room(values_of(x_TI), self.weight.num_rows)
        return self._backend.quant_linear(x_TI, self.weight, self._bias_O, out_TN=out_TO)


class FloatLogits:
    """By a linear that computes in float32: on the CPU."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, x_TI: LinearInput, *, out_TO: Tensor | None = None) -> Tensor:
        logits_TO = self._linear(x_TI)
        return logits_TO if out_TO is None else out_TO.copy_(logits_TO)


def _float_room(x_TI: Tensor, num_outputs: int) -> Tensor:
    return x_TI.new_empty((len(x_TI), num_outputs), dtype=torch.float32)


class StackedLinear:
    """Rows that are held in different ways, such as q and k quantised and v as floats."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = parts

    def __call__(self, x_TI: LinearInput) -> Tensor:
        return torch.cat([part(x_TI) for part in self.parts], dim=-1)


def make_linear(matrix: Matrix, bias_O: Tensor | None, backend: Backend) -> Linear:
    """The fastest way to use this matrix where it lies."""
    bias_O = None if bias_O is None else bias_O.to(backend.dtype)
    if isinstance(matrix, PlanarWeight):
        return QuantLinear(matrix, bias_O, backend)
    if isinstance(matrix, Fp8Weight):
        return Fp8Linear(matrix, bias_O, backend)
    is_packable = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    if is_packable and torch.backends.mkldnn.is_available():
        return PackedLinear(matrix, bias_O)
    return DenseLinear(matrix, bias_O)


def stack_linears(parts: Sequence[Linear], backend: Backend) -> Linear:
    """One linear of their outputs side by side."""
    if len(parts) == 1:
        return parts[0]
    quantised = [part for part in parts if isinstance(part, QuantLinear)]
    if len(quantised) == len(parts):
        return StackedQuantLinear(quantised, backend)
    return StackedLinear(parts)


class GatedLinear(Protocol):
    """silu(x G^T) * (x U^T), of one matrix with the rows of gate G and up U."""

    def __call__(self, x_TI: LinearInput, *, form: InputForm) -> LinearInput:
        """[T, I] -> [T, features], for a product that takes this form."""
        ...


class HalvesGatedLinear:
    """Gate's rows before up's."""

    def __init__(self, gate_up: Linear, backend: Backend) -> None:
        self.gate_up = gate_up
        self._backend = backend

    def __call__(self, x_TI: LinearInput, *, form: InputForm) -> LinearInput:
        return self._backend.swiglu(self.gate_up(x_TI), form=form)


class PairedGatedLinear:
    """Rows in the order of kernels/paired_rows.py, that stay quantised."""

    def __init__(self, weight: PlanarWeight, bias_O: Tensor | None, backend: Backend) -> None:
        self.weight = weight
        self._bias_O = None if bias_O is None else bias_O.to(backend.dtype)
        self._backend = backend

    def __call__(self, x_TI: LinearInput, *, form: InputForm) -> LinearInput:
        return self._backend.gated_linear(x_TI, self.weight, self._bias_O)


def input_form(linear: Linear | GatedLinear) -> InputForm:
    """What it takes best."""
    if isinstance(linear, HalvesGatedLinear):
        return input_form(linear.gate_up)
    return "e4m3" if isinstance(linear, Fp8Linear) else "values"


def planar_weights(linear: Linear | GatedLinear | Logits) -> list[PlanarWeight]:
    """The matrices of it that stay quantised."""
    match linear:
        case QuantLinear() | PairedGatedLinear() | QuantLogits():
            return [linear.weight]
        case HalvesGatedLinear():
            return planar_weights(linear.gate_up)
        case StackedQuantLinear():
            return linear.weights
        case StackedLinear():
            return [weight for part in linear.parts for weight in planar_weights(part)]
    return []


def make_head(matrix: Matrix, bias_O: Tensor | None, backend: Backend) -> Logits:
    """The same for the output head."""
    if isinstance(matrix, PlanarWeight):
        bias_O = None if bias_O is None else bias_O.to(backend.dtype)
        return QuantLogits(matrix, bias_O, backend)
    if isinstance(matrix, Tensor) and matrix.dtype != torch.float32:
        return DenseLogits(matrix, bias_O)
    return FloatLogits(make_linear(matrix, bias_O, backend))


class Embedding(Protocol):
    """Token ids to their vectors."""

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        ...


class DenseEmbedding:
    """The vectors as torch stores them."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        return functional.embedding(token_ids_T, self._weight_VD)


class QuantEmbedding:
    """Vectors that stay quantised until they are looked up."""

    def __init__(self, weight: PlanarWeight, backend: Backend) -> None:
        self._weight = weight
        self._backend = backend

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        return self._backend.dequantise(_select_rows(self._weight, token_ids_T))


def make_embedding(matrix: Matrix, backend: Backend) -> Embedding:
    """The embedding for a matrix [V, D] as it is held."""
    assert not isinstance(matrix, Fp8Weight), "embeddings are not held in e4m3"
    if isinstance(matrix, PlanarWeight):
        return QuantEmbedding(matrix, backend)
    return DenseEmbedding(matrix)


def _select_rows(weight: PlanarWeight, rows_T: Tensor) -> PlanarWeight:
    def select(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, rows_T)

    return dataclasses.replace(
        weight,
        num_rows=len(rows_T),
        low=weight.low.index_select(0, rows_T),
        high=select(weight.high),
        scales=weight.scales.index_select(0, rows_T),
        mins=select(weight.mins),
        supers=select(weight.supers),
        dense_NK=None,
    )
