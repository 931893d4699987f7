"""StepInputs: what a stage's kernels must know of a micro-batch, packed into one integer array, so
that one copy brings it to the device.

Shapes: T tokens (those of decode rows, then of prefill chunks), R most decode rows, C most prefill
chunks, N sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pipeserve.core.batch import MicroBatch

PADDING = -1
"""Position of a token that only fills a shape: it sees nothing and writes no cache slot."""
FROM_POOL = -1
"""Id of a token that only the token pool knows: the newest one of its row."""

Array = TypeVar("Array")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How many of everything a step has, fillers included."""

    num_tokens: int
    num_decode_rows: int
    """At most: with prefill, the first tokens may be of so many decode rows or of fewer."""
    num_chunks: int = 0
    num_samples: int = 0
    """Rows that sample in a step with prefill; a step of decode rows alone samples all of them."""

    @property
    def has_prefill(self) -> bool:
        return self.num_chunks > 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the fields of StepInputs."""
        tokens, chunks = self.num_tokens, self.num_chunks
        if not self.has_prefill:
            return (tokens, tokens, 0, 0, 0, 0, 0, 0, 0)
        rows = self.num_decode_rows
        return (tokens, tokens, tokens, rows, chunks, chunks, chunks, chunks, self.num_samples)


def decode_shape(num_rows: int) -> StepShape:
    """Of a step without prefill."""
    return StepShape(num_tokens=num_rows, num_decode_rows=num_rows)


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Array]):
    """Views of one array of numpy or torch, one after another. A step of decode rows alone has only
    the first two."""

    rows_T: Array
    positions_T: Array
    token_ids_T: Array
    lengths_R: Array
    """Cache positions that the token of a decode row sees; 0 where there is no such row."""
    chunk_rows_C: Array
    chunk_starts_C: Array
    """The token in which each chunk begins."""
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
        num_tokens=batch.num_tokens,
        num_decode_rows=batch.num_decode_rows,
        num_chunks=num_chunks,
        num_samples=int(batch.samples_S.sum()) if num_chunks else 0,
    )


def pack(batch: MicroBatch, shape: StepShape) -> npt.NDArray[np.int64]:
    """The fields of StepInputs for this micro-batch, in a shape that is at least as large.

    Fillers name row and token 0, stand at PADDING, and belong to no decode row and no chunk.
    """
    array = np.zeros(sum(shape.sizes), dtype=np.int64)
    inputs = StepInputs.of(array, shape)
    num_tokens = batch.num_tokens
    ends_S = np.cumsum(batch.num_tokens_S)
    starts_S = ends_S - batch.num_tokens_S
    inputs.rows_T[:num_tokens] = np.repeat(batch.rows_S, batch.num_tokens_S)
    # Position of token t: t, moved so that each row begins at its first position.
    offsets_T = np.repeat(batch.first_positions_S - starts_S, batch.num_tokens_S)
    inputs.positions_T[:num_tokens] = np.arange(num_tokens) + offsets_T
    inputs.positions_T[num_tokens:] = PADDING
    if not shape.has_prefill:
        return array
    num_decode, num_chunks = batch.num_decode_rows, batch.num_rows - batch.num_decode_rows
    inputs.token_ids_T[:num_decode] = FROM_POOL
    inputs.token_ids_T[num_decode:num_tokens] = batch.prefill_token_ids
    inputs.lengths_R[:num_decode] = batch.first_positions_S[:num_decode] + 1
    inputs.chunk_rows_C[:num_chunks] = batch.rows_S[num_decode:]
    inputs.chunk_starts_C[:num_chunks] = starts_S[num_decode:]
    inputs.chunk_first_positions_C[:num_chunks] = batch.first_positions_S[num_decode:]
    inputs.chunk_num_tokens_C[:num_chunks] = batch.num_tokens_S[num_decode:]
    sampled = ends_S[batch.samples_S] - 1
    inputs.sampled_tokens_N[: len(sampled)] = sampled
    return array
