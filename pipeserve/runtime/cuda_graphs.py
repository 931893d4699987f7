"""StepGraphs: one stage's steps as CUDA graphs, each for a shape that smaller steps are padded to.

Captured at load, before the stage's thread starts; replayed on that thread. Steps that fit no shape
(dozens of short prompts at once) run eagerly. Large prefill is replayed, too: it keeps a GPU busy
for longer than its launches take, but those of several stages wait for each other (GIL).

Shapes: T tokens of a step, N sampled rows, D model dim, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeserve.core.batch import MicroBatch
from pipeserve.runtime.devices import send_ints, stage_stream
from pipeserve.runtime.gpu_shapes import GpuShapes
from pipeserve.runtime.step_computation import StepComputation
from pipeserve.runtime.step_inputs import (
    PADDING,
    StepInputs,
    StepShape,
    pack,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    """int64, as StepInputs packs them."""


class StepGraphs:
    """The same arithmetic as eager steps, on inputs of fixed addresses."""

    def __init__(
        self, *, computation: StepComputation, shapes: GpuShapes, device: torch.device
    ) -> None:
        self._computation = computation
        self._shapes = shapes
        self._device = device
        # One pool and one stream for all: the allocator gives a stream only its own memory again.
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = stage_stream(device)
        self._captured: dict[StepShape, _Captured] = {}
        config, largest = computation.decoder.config, shapes.captured()[0]
        self._hidden_TD = torch.zeros((largest.num_tokens, config.hidden_size), device=device)
        # [T, D], or on the last stage [N, V]. One for all graphs: what each left behind would add
        # up to gigabytes.
        self._out = torch.zeros_like(self._hidden_TD)
        if computation.samples:
            num_samples = max(largest.num_samples, largest.num_decode_rows)
            self._out = torch.zeros((num_samples, config.vocab_size), device=device)
        self.capture_s = 0.0
        """How long all captures took, compilation included."""

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def capture(self, shapes: Iterable[StepShape]) -> None:
        """Compile the kernels of these shapes and capture. Call under no other capture."""
        started_s = time.monotonic()
        with torch.cuda.device(self._device), torch.inference_mode():
            for shape in shapes:
                self._captured[shape] = self._capture(shape)
        self.capture_s += time.monotonic() - started_s

    def _capture(self, shape: StepShape) -> _Captured:
        # As of a step without a row: every position is a filler's.
        inputs = torch.zeros(sum(shape.sizes), dtype=torch.int64, device=self._device)
        StepInputs.of(inputs, shape).positions_T.fill_(PADDING)
        self._compute(shape, inputs)  # compiles what this shape needs, outside the capture
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            self._compute(shape, inputs)
        return _Captured(graph=graph, inputs=inputs)

    def _compute(self, shape: StepShape, inputs: Tensor) -> None:
        hidden_TD = None if self._computation.embeds else self._hidden_TD[: shape.num_tokens]
        step = StepInputs.of(inputs, shape)
        if self._computation.samples:
            num_samples = shape.num_samples if shape.has_prefill else shape.num_tokens
            self._computation(step, hidden_TD, max_length=None, out_NV=self._out[:num_samples])
            return
        out_TD = self._computation(step, hidden_TD, max_length=None)
        self._out[: len(out_TD)].copy_(out_TD)

    def replay(self, batch: MicroBatch, hidden_TD: Tensor | None) -> Tensor | None:
        """[T, D], or [N, V] on the last stage, valid until the next replay; None: no shape fits."""
        shape = self._shapes.find_captured(batch)
        if shape is None:
            return None
        captured = self._captured[shape]
        send_ints(pack(batch, shape), captured.inputs)
        if hidden_TD is not None:
            self._hidden_TD[: len(hidden_TD)].copy_(hidden_TD)
        captured.graph.replay()
        if self._computation.samples:
            return self._out[: int(batch.samples_S.sum())]
        return self._out[: batch.num_tokens]
