"""Reads one stage's tensors from a GGUF file, as the stage's device holds them.

Runs on a loading thread per stage. Touches only the bytes of the tensors it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeserve.gguf.quants import dequantise
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import Backend
from pipeserve.kernels.quant_layout import LAYOUTS
from pipeserve.kernels.quant_repack import repack
from pipeserve.models.linear import Linear, Matrix, StackedLinear, make_linear


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a matrix as they were read: floats [O, I], or a file's blocks, uint8 [O, bytes]."""

    values: Tensor
    type_name: str | None
    """Of the blocks; None for floats."""


class WeightReader:
    """Hands out tensors on one device and reports each that was read.

    Vectors come as float32. Matrices come as the backend wants them: floats in its type where
    keeps_quantised is False or the type has no planar layout.
    """

    def __init__(
        self,
        gguf_file: GGUFFile,
        *,
        device: torch.device,
        backend: Backend,
        keeps_quantised: bool,
        on_read: Callable[[str], None],
    ) -> None:
        self.device = device
        self.backend = backend
        self._file = gguf_file
        self._keeps_quantised = keeps_quantised
        self._on_read = on_read

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
        """A matrix; raises as `tensor`."""
        type_name = self._file.tensors[name].type.name if name in self._file.tensors else None
        if not self._keeps_quantised or type_name not in LAYOUTS:
            return Rows(values=self.tensor(name).to(self.backend.dtype), type_name=None)
        blocks = torch.from_numpy(self._file.raw(name).copy()).to(self.device)
        self._on_read(name)
        return Rows(values=blocks, type_name=type_name)


def make_matrix(rows: Rows) -> Matrix:
    """Rows in the form in which they are multiplied."""
    return rows.values if rows.type_name is None else repack(rows.values, rows.type_name)


def fuse(parts: Sequence[Rows], biases: Sequence[Tensor | None], backend: Backend) -> Linear:
    """One linear of all rows; neighbours of the same type become one matrix.

    A part without a bias gets zeros where another part has one.
    """
    linears: list[Linear] = []
    for type_name, group in itertools.groupby(
        zip(parts, biases, strict=True), key=lambda part: part[0].type_name
    ):
        rows, group_biases = zip(*group, strict=True)
        values = torch.cat([part.values for part in rows])
        matrix = make_matrix(Rows(values=values, type_name=type_name))
        linears.append(make_linear(matrix, _fuse_biases(rows, group_biases), backend))
    return linears[0] if len(linears) == 1 else StackedLinear(linears)


def _fuse_biases(parts: Sequence[Rows], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            torch.zeros(part.values.shape[0], device=part.values.device) if bias is None else bias
            for part, bias in zip(parts, biases, strict=True)
        ]
    )
