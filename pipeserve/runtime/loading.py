"""Loading: every stage's share of the model file, several stages at a time.

Runs before the stage threads exist, on threads of its own that end with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import backend_for
from pipeserve.models.config import ModelConfig
from pipeserve.models.layers import Decoder
from pipeserve.models.loader import LayerRange, WeightReader
from pipeserve.models.registry import Family, find_family

OnProgress = Callable[[int, int], None]
"""Called with the bytes read so far and all bytes to read; one call at a time."""


def load_decoders(
    gguf_file: GGUFFile,
    model: ModelConfig,
    ranges: Sequence[LayerRange],
    *,
    devices: Sequence[torch.device],
    on_progress: OnProgress,
) -> list[Decoder]:
    """Each stage's layers on its device, in the order of the stages.

    Raises:
        ModelError: a tensor cannot be read or dequantised.
    """
    family = find_family(gguf_file)
    progress = _Progress(gguf_file, _tensor_names(family, model), on_progress)

    def load(layers: LayerRange, device: torch.device) -> Decoder:
        weights = WeightReader(
            gguf_file,
            device=device,
            backend=backend_for(device),
            keeps_quantised=device.type != "cpu",
            on_read=progress.add,
        )
        return family.load(model, layers, weights)

    num_workers = min(len(ranges), os.cpu_count() or 1)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="load") as executor:
        return list(executor.map(load, ranges, devices))


def _tensor_names(family: Family, model: ModelConfig) -> Iterable[str]:
    return (*family.required_tensors(model), *family.optional_tensors(model))


class _Progress:
    """Counts every tensor once: stages share a few."""

    def __init__(self, gguf_file: GGUFFile, names: Iterable[str], on_progress: OnProgress) -> None:
        tensors = gguf_file.tensors
        self._left = {name: tensors[name].num_bytes for name in names if name in tensors}
        self._total = sum(self._left.values())
        self._read = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self._read += self._left.pop(name, 0)
            self._on_progress(self._read, self._total)
