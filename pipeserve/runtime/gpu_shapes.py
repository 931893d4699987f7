"""GpuShapes: the shapes in which a GPU stage computes its steps; smaller steps are padded.

Few shapes mean few captured graphs and few compiled kernels. Pure arithmetic.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.runtime.step_inputs import StepShape, exact_shape

PREFILL_SIZES = (64, 128, 256, 512)
"""Prefill tokens that mixed steps are padded to."""
NUM_CHUNKS = 32
"""Most prefill chunks in a mixed step that is replayed."""


def decode_sizes(num_rows: int) -> tuple[int, ...]:
    """1, 2, 4 and then every 8, up to num_rows: rows are padded to the next one."""
    sizes = [size for size in (1, 2, 4) if size < num_rows]
    return (*sizes, *range(8, num_rows, 8), num_rows)


def mixed_sizes(num_rows: int) -> tuple[int, ...]:
    """Decode rows beside prefill: none, 8 and then powers of two, up to num_rows."""
    sizes = [0]
    while sizes[-1] < num_rows:
        sizes.append(min(num_rows, max(8, 2 * sizes[-1])))
    return tuple(sizes)


class GpuShapes:
    """Those that are captured, and how others are rounded up."""

    def __init__(self, *, num_rows: int, max_batch_tokens: int) -> None:
        self._num_rows = num_rows
        self._decode = decode_sizes(num_rows)
        self._mixed = mixed_sizes(num_rows)
        self._prefill = tuple(size for size in PREFILL_SIZES if size <= max_batch_tokens)

    def captured(self) -> list[StepShape]:
        """Largest first: the smaller ones fit into its memory."""
        shapes = [StepShape(num_decode_rows=size) for size in self._decode]
        shapes += [
            self._mixed_shape(rows, tokens) for rows in self._mixed for tokens in self._prefill
        ]
        return sorted(shapes, key=lambda shape: shape.num_tokens, reverse=True)

    def find_captured(self, batch: MicroBatch) -> StepShape | None:
        """The smallest captured shape that holds the step; None where there is none."""
        num_tokens = len(batch.prefill_token_ids)
        if num_tokens == 0:
            rows = _next(self._decode, batch.num_decode_rows)
            return None if rows is None else StepShape(num_decode_rows=rows)
        rows = _next(self._mixed, batch.num_decode_rows)
        tokens = _next(self._prefill, num_tokens)
        if rows is None or tokens is None or batch.num_rows - batch.num_decode_rows > NUM_CHUNKS:
            return None
        return self._mixed_shape(rows, tokens)

    def find(self, batch: MicroBatch) -> StepShape:
        """For a step that runs eagerly: rounded up, so that few kernels are compiled."""
        if batch.num_decode_rows == batch.num_rows:
            return exact_shape(batch)
        rows = _round_up(batch.num_decode_rows, 16)
        chunks = batch.num_rows - batch.num_decode_rows
        chunks = NUM_CHUNKS if chunks <= NUM_CHUNKS else _round_up(self._num_rows, 16)
        return StepShape(
            num_decode_rows=rows,
            num_prefill_tokens=_round_up(len(batch.prefill_token_ids), 64),
            num_chunks=chunks,
            num_samples=self._num_samples(rows, chunks),
        )

    def _mixed_shape(self, num_decode_rows: int, num_prefill_tokens: int) -> StepShape:
        return StepShape(
            num_decode_rows=num_decode_rows,
            num_prefill_tokens=num_prefill_tokens,
            num_chunks=NUM_CHUNKS,
            num_samples=self._num_samples(num_decode_rows, NUM_CHUNKS),
        )

    def _num_samples(self, num_decode_rows: int, num_chunks: int) -> int:
        """Every row of the step, of which there are not more than rows at all."""
        return min(num_decode_rows + num_chunks, _round_up(self._num_rows, 16))


def shapes_for(device: torch.device, facts: PipelineFacts) -> GpuShapes | None:
    """None on a CPU, where every step is computed in its own shape."""
    if device.type == "cpu":
        return None
    return GpuShapes(num_rows=facts.num_rows, max_batch_tokens=facts.max_batch_tokens)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _next(sizes: tuple[int, ...], wanted: int) -> int | None:
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None
