"""GpuShapes: the shapes in which a GPU stage computes its steps; smaller steps are padded.

Few shapes mean few captured graphs and few compiled kernels. Steps with prefill are padded by all
their tokens together, whatever part of them is of decode rows. Pure arithmetic.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.runtime.step_inputs import StepShape, decode_shape

TOKENS_STEP = 64
"""Steps with prefill have a multiple of so many tokens."""
FEW_ROWS = 16
"""The fewest decode rows that steps with prefill have room for, if any."""
FEWEST_CHUNKS, MOST_CHUNKS = 8, 64
"""Prefill chunks in the smallest and in the largest steps that are replayed."""


def decode_sizes(num_rows: int) -> tuple[int, ...]:
    """1, 2, 4, every 8 up to 128 and then 8 sizes to each doubling, up to num_rows: rows are padded
    to the next one."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < num_rows:
        sizes.append(sizes[-1] + max(8, _power_below(sizes[-1]) // 8))
    return (*(size for size in sizes if size < num_rows), num_rows)


def token_sizes(max_batch_tokens: int) -> tuple[int, ...]:
    """Tokens of steps with prefill: every 64 up to 512, and then 4 sizes to each doubling."""
    sizes = [TOKENS_STEP]
    while sizes[-1] < max_batch_tokens:
        sizes.append(sizes[-1] + max(TOKENS_STEP, _power_below(sizes[-1]) // 4))
    return tuple(sizes)


def mixed_rows(num_rows: int) -> tuple[int, ...]:
    """Decode rows that steps with prefill have room for: none, few, all, and the half and the
    quarter of all, since a pipeline's stages share the rows among their micro-batches."""
    shares = {num_rows, -(-num_rows // 2), -(-num_rows // 4)}
    few = min(FEW_ROWS, num_rows)
    return (0, few, *sorted(share for share in shares if share > few))


class GpuShapes:
    """Those that are captured, and how others are rounded up."""

    def __init__(self, *, num_rows: int, max_batch_tokens: int) -> None:
        self._num_rows = num_rows
        self._decode = decode_sizes(num_rows)
        self._tokens = token_sizes(max_batch_tokens)
        self._mixed_rows = mixed_rows(num_rows)

    def captured(self) -> list[StepShape]:
        """Largest first: the smaller ones fit into its memory."""
        mixed = {self._mixed(tokens, rows) for tokens in self._tokens for rows in self._mixed_rows}
        shapes = [*map(decode_shape, self._decode), *mixed]
        return sorted(
            shapes, key=lambda shape: (shape.num_tokens, shape.num_decode_rows), reverse=True
        )

    def find_captured(self, batch: MicroBatch) -> StepShape | None:
        """The smallest captured shape that holds the step; None where there is none."""
        num_decode, num_chunks = batch.num_decode_rows, batch.num_rows - batch.num_decode_rows
        if num_chunks == 0:
            return decode_shape(_next(self._decode, num_decode))
        num_samples = int(batch.samples_S.sum())
        for tokens in self._tokens[bisect_left(self._tokens, batch.num_tokens) :]:
            for rows in self._mixed_rows[bisect_left(self._mixed_rows, num_decode) :]:
                shape = self._mixed(tokens, rows)
                if num_chunks <= shape.num_chunks and num_samples <= shape.num_samples:
                    return shape
        return None

    def find(self, batch: MicroBatch) -> StepShape:
        """For a step that runs eagerly: rounded up, so that few kernels are compiled."""
        num_chunks = batch.num_rows - batch.num_decode_rows
        if num_chunks == 0:
            return decode_shape(batch.num_decode_rows)
        tokens = _round_up(batch.num_tokens, TOKENS_STEP)
        rows = _next(self._mixed_rows, batch.num_decode_rows)
        most_rows = _round_up(self._num_rows, 16)
        return StepShape(
            num_tokens=tokens,
            num_decode_rows=min(rows, tokens),
            num_chunks=MOST_CHUNKS if num_chunks <= MOST_CHUNKS else most_rows,
            num_samples=most_rows,
        )

    def _mixed(self, num_tokens: int, num_rows: int) -> StepShape:
        num_rows = min(num_rows, num_tokens)
        num_chunks = max(FEWEST_CHUNKS, min(MOST_CHUNKS, num_tokens // 16))
        # With many rows, not all of them decode while so many chunks end.
        num_samples = num_chunks if num_rows == 0 else max(num_rows, FEW_ROWS + num_chunks)
        return StepShape(
            num_tokens=num_tokens,
            num_decode_rows=num_rows,
            num_chunks=num_chunks,
            num_samples=min(num_samples, _round_up(self._num_rows, 16)),
        )


def shapes_for(device: torch.device, facts: PipelineFacts) -> GpuShapes | None:
    """None on a CPU, where every step is computed in its own shape."""
    if device.type == "cpu":
        return None
    return GpuShapes(num_rows=facts.num_rows, max_batch_tokens=facts.max_batch_tokens)


def _power_below(count: int) -> int:
    """The largest power of two up to count."""
    return 1 << (count.bit_length() - 1)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _next(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest that is enough."""
    return sizes[bisect_left(sizes, wanted)]
