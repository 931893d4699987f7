"""Reads one stage's tensors from a GGUF file: dequantised, on the stage's device, checked shapes.

Runs on a loading thread per stage. Touches only the bytes of the tensors it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeserve.gguf.quants import dequantise
from pipeserve.gguf.reader import GGUFFile


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


class WeightReader:
    """Hands out tensors as float32 on one device and reports each that was read."""

    def __init__(
        self, gguf_file: GGUFFile, *, device: torch.device, on_read: Callable[[str], None]
    ) -> None:
        self._file = gguf_file
        self._device = device
        self._on_read = on_read

    def tensor(self, name: str) -> Tensor:
        """Raises MissingTensorError or UnsupportedModelError, as GGUFFile.raw and dequantise do."""
        raw = self._file.raw(name)
        values = torch.from_numpy(dequantise(self._file.tensors[name], raw))
        self._on_read(name)
        return values.to(self._device)

    def optional(self, name: str) -> Tensor | None:
        """None where the file has no such tensor."""
        return self.tensor(name) if name in self._file.tensors else None
