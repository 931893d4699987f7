"""StepInputs: what a stage's kernels must know of a micro-batch, packed into one integer array, so
that one copy brings it to the device.

Shapes: S decode rows, T prefill tokens (of hidden states: all tokens), C prefill chunks, N sampled
rows, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeserve.core.batch import MicroBatch

PADDING = -1
"""Position of a token that only fills a shape: it sees nothing and writes no cache slot."""

Array = TypeVar("Array")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How many of everything a step has, fillers included."""

    num_decode_rows: int
    num_prefill_tokens: int = 0
    num_chunks: int = 0
    num_samples: int = 0
    """Rows that sample in a step with prefill; a step of decode rows alone samples all of them."""

    @property
    def num_tokens(self) -> int:
        return self.num_decode_rows + self.num_prefill_tokens

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the fields of StepInputs."""
        rows, tokens, chunks = self.num_decode_rows, self.num_prefill_tokens, self.num_chunks
        return (rows, rows, tokens, tokens, tokens, chunks, chunks, chunks, self.num_samples)


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Array]):
    """Views of one array of numpy or torch, one after another."""

    rows_S: Array
    positions_S: Array
    prefill_ids_T: Array
    prefill_rows_T: Array
    prefill_positions_T: Array
    chunk_rows_C: Array
    chunk_first_positions_C: Array
    chunk_num_tokens_C: Array
    sampled_tokens_N: Array
    """Which of the step's tokens each sampled row ends in."""

    @classmethod
    def of(cls, array: Array, shape: StepShape) -> StepInputs[Array]:
        """The views of an array [pack's length]."""
        return cls(*(array[a:b] for a, b in pairwise(accumulate(shape.sizes, initial=0))))  # type: ignore[index]


def exact_shape(batch: MicroBatch) -> StepShape:
    """Without a filler."""
    num_chunks = batch.num_rows - batch.num_decode_rows
    return StepShape(
        num_decode_rows=batch.num_decode_rows,
        num_prefill_tokens=len(batch.prefill_token_ids),
        num_chunks=num_chunks,
        num_samples=int(batch.samples_S.sum()) if num_chunks else 0,
    )


def pack(batch: MicroBatch, shape: StepShape) -> npt.NDArray[np.int64]:
    """The fields of StepInputs for this micro-batch, in a shape that is at least as large.

    Fillers name row and token 0, stand at PADDING, and belong to no chunk.
    """
    array = np.zeros(sum(shape.sizes), dtype=np.int64)
    inputs = StepInputs.of(array, shape)
    num_decode = batch.num_decode_rows
    inputs.positions_S[num_decode:] = PADDING
    inputs.rows_S[:num_decode] = batch.rows_S[:num_decode]
    inputs.positions_S[:num_decode] = batch.first_positions_S[:num_decode]
    if num_decode < batch.num_rows:
        _pack_prefill(batch, shape, inputs)
    return array


def _pack_prefill(
    batch: MicroBatch, shape: StepShape, inputs: StepInputs[npt.NDArray[np.int64]]
) -> None:
    num_decode = batch.num_decode_rows
    rows_C, first_C, num_tokens_C = (
        array[num_decode:] for array in (batch.rows_S, batch.first_positions_S, batch.num_tokens_S)
    )
    num_chunks, num_tokens = len(rows_C), len(batch.prefill_token_ids)
    inputs.prefill_ids_T[:num_tokens] = batch.prefill_token_ids
    inputs.prefill_rows_T[:num_tokens] = np.repeat(rows_C, num_tokens_C)
    # Position of token t: t, moved so that each chunk begins at its first position.
    ends_C = np.cumsum(num_tokens_C)
    offsets_C = first_C - (ends_C - num_tokens_C)
    inputs.prefill_positions_T[num_tokens:] = PADDING
    inputs.prefill_positions_T[:num_tokens] = np.arange(num_tokens) + np.repeat(
        offsets_C, num_tokens_C
    )
    inputs.chunk_rows_C[:num_chunks] = rows_C
    inputs.chunk_first_positions_C[:num_chunks] = first_C
    inputs.chunk_num_tokens_C[:num_chunks] = num_tokens_C
    ends = np.concatenate((np.arange(num_decode), shape.num_decode_rows + ends_C - 1))
    sampled = ends[batch.samples_S]
    inputs.sampled_tokens_N[: len(sampled)] = sampled


def spread(hidden_TD: Tensor, batch: MicroBatch, shape: StepShape, *, out_TD: Tensor) -> Tensor:
    """A step's hidden states at the places that its tokens have in the shape."""
    num_decode = batch.num_decode_rows
    out_TD[:num_decode].copy_(hidden_TD[:num_decode])
    num_prefill = len(hidden_TD) - num_decode
    first = shape.num_decode_rows
    out_TD[first : first + num_prefill].copy_(hidden_TD[num_decode:])
    return out_TD[: shape.num_tokens]


def without_fillers(out_TD: Tensor, batch: MicroBatch, shape: StepShape) -> Tensor:
    """The reverse; a view where that is possible."""
    num_decode, num_prefill = batch.num_decode_rows, len(batch.prefill_token_ids)
    first = shape.num_decode_rows
    if num_prefill == 0:
        return out_TD[:num_decode]
    if num_decode == first:
        return out_TD[: first + num_prefill]
    return torch.cat((out_TD[:num_decode], out_TD[first : first + num_prefill]))
