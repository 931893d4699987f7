"""Reads one stage's tensors from a GGUF file, as the stage's device holds them.

Runs on a loading thread per stage. Touches only the bytes of the tensors it is asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from pipeserve.errors import ModelError
from pipeserve.gguf.header import TensorInfo
from pipeserve.gguf.quants import dequantise
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import Backend, WeightForm
from pipeserve.kernels.fp8_reference import Fp8Weight, has_fp8_shape, quantise_rows
from pipeserve.kernels.paired_rows import PAIRED_FEATURES, pair_rows
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight, planar_bytes
from pipeserve.kernels.quant_repack import repack, repack_parts
from pipeserve.models.linear import (
    GatedLinear,
    HalvesGatedLinear,
    Linear,
    Matrix,
    PairedGatedLinear,
    make_linear,
    stack_linears,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRange:
    """Layers [first, end) of a model with num_layers: what one stage computes."""

    first: int
    end: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        """The stage that embeds."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """The stage that has the head."""
        return self.end == self.num_layers

    def __len__(self) -> int:
        return self.end - self.first


FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
)
"""GGUF's types that torch has too."""

_WEIGHTS_AT_ONCE = 1 << 24
"""Converted per pass where a type has to be: bounds the temporary memory to some 200 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a matrix as they were read: floats [O, I] of any type, or a file's blocks, uint8
    [O, bytes]."""

    values: Tensor
    type_name: str | None
    """Of the blocks; None for floats."""

    @property
    def num_columns(self) -> int:
        num_values = self.values.shape[1]
        if self.type_name is None:
            return num_values
        layout = LAYOUTS[self.type_name]
        return num_values // layout.block_bytes * layout.block_size


class WeightReader:
    """Hands out tensors on one device and reports each that was read.

    Vectors come as float32, matrices as Rows: blocks or floats as the file has them, where the
    device turns them into what the backend wants, and dequantised where only the host can.
    """

    def __init__(
        self,
        gguf_file: GGUFFile,
        *,
        device: torch.device,
        backend: Backend,
        on_read: Callable[[str], None],
        upload: Callable[[str], Tensor] | None = None,
    ) -> None:
        """upload: a tensor's bytes [rows, bytes of a row] on the device; left out, they are copied
        from the mapped file."""
        self.device = device
        self.backend = backend
        self._file = gguf_file
        self._on_read = on_read
        self._upload = upload or self._copy

    def tensor(self, name: str) -> Tensor:
        """Raises MissingTensorError or UnsupportedModelError, as GGUFFile.raw and dequantise do."""
        raw = self._file.raw(name)
        values = torch.from_numpy(dequantise(self._file.tensors[name], raw))
        self._on_read(name)
        return values.to(self.device)

    def optional(self, name: str) -> Tensor | None:
        """None where the file has no such tensor."""
        return self.tensor(name) if name in self._file.tensors else None

    def rows(self, name: str) -> Rows:
        """A matrix; raises as `tensor`, and ModelError where values leave the backend's range."""
        info = self._file.tensors.get(name)
        if info is None or not is_uploaded(info, self.device, self.backend):
            return Rows(values=self._dequantised(name), type_name=None)
        raw = self._upload(name)
        self._on_read(name)
        if info.type.name in LAYOUTS:
            return Rows(values=raw, type_name=info.type.name)
        values = raw.view(FLOATS[info.type.name])
        self._check_range(name, values)
        return Rows(values=values, type_name=None)

    def _copy(self, name: str) -> Tensor:
        return torch.from_numpy(self._file.raw(name).copy()).to(self.device)

    def _dequantised(self, name: str) -> Tensor:
        """In the backend's type, by the host, some rows at a time."""
        raw = self._file.raw(name)
        info = self._file.tensors[name]
        dtype, num_columns = self.backend.dtype, info.shape[-1]
        values_OI = torch.empty((info.num_rows, num_columns), dtype=dtype, device=self.device)
        rows_at_once = max(1, _WEIGHTS_AT_ONCE // num_columns)
        for first in range(0, info.num_rows, rows_at_once):
            some_raw = raw[first : first + rows_at_once]
            some_info = dataclasses.replace(info, shape=(len(some_raw), num_columns))
            some = torch.from_numpy(dequantise(some_info, some_raw))
            self._check_range(name, some)
            values_OI[first : first + len(some)] = some
        self._on_read(name)
        return values_OI

    def _check_range(self, name: str, values: Tensor) -> None:
        """Only float16 has a smaller range than a file's floats."""
        limit = torch.finfo(torch.float16).max
        if self.backend.dtype != torch.float16 or values.dtype == torch.float16:
            return
        least, most = (float(value) for value in values.aminmax())
        if max(-least, most) > limit:
            raise ModelError(
                self._file.path,
                f"the tensor {name} holds {max(least, most, key=abs):g}, but float16 activations "
                f'go with weights up to {limit:g}; set weights = "bf16"',
            )


def is_uploaded(info: TensorInfo, device: torch.device, backend: Backend) -> bool:
    """Whether a matrix's bytes travel as they are: the device makes of them what is wanted."""
    if device.type == "cpu" and backend.weight_form == "dense":
        return False
    return info.type.name in LAYOUTS or info.type.name in FLOATS


def make_matrix(parts: Sequence[Rows], backend: Backend, form: WeightForm) -> Matrix:
    """One matrix of all rows, in this form where it is to be had: planar and both need blocks of
    one type, fp8 sides of multiples of 16; dense is what else there is."""
    type_name = parts[0].type_name
    if form in ("planar", "both") and type_name is not None:
        weight = repack_parts([part.values for part in parts], type_name)
        if form == "planar":
            return weight
        return dataclasses.replace(weight, dense_NK=backend.dequantise(weight))
    num_rows = sum(part.values.shape[0] for part in parts)
    if form == "fp8" and has_fp8_shape(num_rows, parts[0].num_columns):
        return _fp8_matrix(parts, num_rows, backend)
    if len(parts) == 1 and type_name is None and parts[0].values.dtype == backend.dtype:
        return parts[0].values
    size = (num_rows, parts[0].num_columns)
    matrix_OI = torch.empty(size, dtype=backend.dtype, device=parts[0].values.device)
    for first, values in _float_chunks(parts, backend):
        matrix_OI[first : first + len(values)] = values
    return matrix_OI


def _fp8_matrix(parts: Sequence[Rows], num_rows: int, backend: Backend) -> Fp8Weight:
    device = parts[0].values.device
    size = (num_rows, parts[0].num_columns)
    codes_NK = torch.empty(size, dtype=torch.float8_e4m3fn, device=device)
    scales_1N = torch.empty((1, num_rows), dtype=torch.float32, device=device)
    for first, values in _float_chunks(parts, backend):
        codes, scales = quantise_rows(values)
        codes_NK[first : first + len(codes)] = codes
        scales_1N[0, first : first + len(codes)] = scales[:, 0]
    return Fp8Weight(codes_NK=codes_NK, scales_1N=scales_1N)


def _float_chunks(parts: Sequence[Rows], backend: Backend) -> Iterator[tuple[int, Tensor]]:
    """Some rows at a time as floats of any type, with the index of the first."""
    first = 0
    for part in parts:
        for values in part.values.split(max(1, _WEIGHTS_AT_ONCE // part.num_columns)):
            if part.type_name is None:
                yield first, values
            else:
                yield first, backend.dequantise(repack(values, part.type_name))
            first += len(values)


def fuse(
    parts: Sequence[Rows],
    biases: Sequence[Tensor | None],
    backend: Backend,
    form: WeightForm,
) -> Linear:
    """One linear of all rows, in this form; those of the same type, if it keeps types, become one
    matrix, else all.

    A part without a bias gets zeros where another part has one.
    """
    linears: list[Linear] = []
    for _, group in itertools.groupby(
        zip(parts, biases, strict=True),
        key=lambda part: part[0].type_name if form in ("planar", "both") else None,
    ):
        rows, group_biases = zip(*group, strict=True)
        matrix = make_matrix(rows, backend, form)
        linears.append(make_linear(matrix, _fuse_biases(rows, group_biases), backend))
    return stack_linears(linears, backend)


def fuse_gated(
    parts: Sequence[Rows],
    biases: Sequence[Tensor | None],
    backend: Backend,
    form: WeightForm,
) -> GatedLinear:
    """Gate and up as fuse has them; as pairs where they are planar, of one type and of whole blocks
    of pairs."""
    type_name, num_features = parts[0].type_name, parts[0].values.shape[0]
    is_planar = form in ("planar", "both") and type_name is not None
    if not is_planar or type_name != parts[1].type_name or num_features % PAIRED_FEATURES:
        return HalvesGatedLinear(fuse(parts, biases, backend, form), backend)
    rows = Rows(values=pair_rows(*(part.values for part in parts)), type_name=type_name)
    matrix = make_matrix([rows], backend, form)
    assert isinstance(matrix, PlanarWeight), "blocks of one type are held as they are"
    bias = _fuse_biases(parts, biases)
    return PairedGatedLinear(
        dataclasses.replace(matrix, is_paired=True),
        None if bias is None else pair_rows(*bias.chunk(2)),
        backend,
    )


def read_global_matrix(weights: WeightReader, name: str) -> Matrix:
    """An embedding or output head, which no form but dense and planar is for."""
    form = form_of(name, weights.backend, num_layers=0)
    return make_matrix([weights.rows(name)], weights.backend, form)


_FIRST_DENSE = 3
_LAST_DENSE = 1
"""Layers at the ends that are not held in e4m3."""


def form_of(name: str, backend: Backend, num_layers: int) -> WeightForm:
    """How the matrix of this name is held.

    In e4m3 only where the rounding costs least. The demo model's mean KL per token from float32,
    in 1e-3 (the arithmetic of a card imitated on the CPU), on 400 tokens of English text, on 27
    texts of 40 (worst group), and on what was drawn after random prompts: with every matrix of the
    layers in e4m3 35, 52, 32; with first and last layer, query, key and value rows dense 14, 24,
    15; with the best scale per row as well (quantise_rows) 13, 18, 13; with the first three layers
    dense instead of one 12, 17, 10. What stays dense is 23 % of the layers of an 8B model.
    """
    match backend.weight_form, name.split("."):
        case "both", ["blk", *_]:
            return "both"
        case "both", _:
            return "planar"
        case "planar" | "dense" as form, _:
            return form
    match name.split("."):
        case ["blk", _, "attn_q" | "attn_k" | "attn_v", _]:
            return "dense"
        case ["blk", index, *_]:
            is_inner = _FIRST_DENSE <= int(index) < num_layers - _LAST_DENSE
            return "fp8" if is_inner else "dense"
    return "dense"


def stage_tensors(names: Iterable[str], layers: LayerRange, *, has_tied_head: bool) -> list[str]:
    """Those of a file's tensors that a stage needs, in about the order in which it loads them."""
    by_place: dict[int, list[str]] = defaultdict(list)
    for name in names:
        match name.split(".", 2):
            case ["token_embd", *_]:
                if layers.is_first or (layers.is_last and has_tied_head):
                    by_place[-1 if layers.is_first else layers.end].append(name)
            case ["blk", number, _]:
                if layers.first <= int(number) < layers.end:
                    by_place[int(number)].append(name)
            case ["output" | "output_norm", *_]:
                if layers.is_last:
                    by_place[layers.end].append(name)
            case _:
                by_place[layers.end].append(name)
    return [name for place in sorted(by_place) for name in by_place[place]]


def device_bytes(info: TensorInfo, backend: Backend, num_layers: int) -> int:
    """What a tensor of such a model takes on the device; alignment and temporary memory come on
    top."""
    num_values, form = math.prod(info.shape), form_of(info.name, backend, num_layers)
    if len(info.shape) == 1:
        return num_values * 4
    if form in ("planar", "both") and info.type.name in LAYOUTS:
        dense_bytes = num_values * backend.dtype.itemsize if form == "both" else 0
        return planar_bytes(info.type.name, info.num_rows, info.shape[-1]) + dense_bytes
    if form == "fp8" and has_fp8_shape(info.num_rows, info.shape[-1]):
        return num_values + info.num_rows * 4
    return num_values * backend.dtype.itemsize


def _fuse_biases(parts: Sequence[Rows], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            torch.zeros(part.values.shape[0], device=part.values.device) if bias is None else bias
            for part, bias in zip(parts, biases, strict=True)
        ]
    )
