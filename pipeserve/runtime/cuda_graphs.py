"""DecodeGraphs: one stage's decode step as CUDA graphs, one per number of rows.

Captured at load, before the stage's thread starts; replayed on that thread. Prefill runs eagerly.

Shapes: S rows of a bucket, D model dim, V vocabulary, B blocks of a row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import MicroBatch
from pipeserve.models.layers import AttentionMetadata, DecodeMetadata, Decoder, LayerCache
from pipeserve.runtime.block_table import BlockTable
from pipeserve.runtime.token_pool import TokenPool

PADDING = -1
"""Position of a row that only fills the bucket: it has no length and writes no slot."""


def buckets_up_to(num_rows: int) -> tuple[int, ...]:
    """1, 2, 4 and then every 8, up to num_rows: rows are padded to the next one."""
    sizes = [size for size in (1, 2, 4) if size < num_rows]
    return (*sizes, *range(8, num_rows, 8), num_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    out: Tensor
    """[S, D] hidden states, or on the last stage [S, V] logits; the next replay overwrites it."""


class DecodeGraphs:
    """The same arithmetic as eager decode, on inputs of fixed addresses."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        caches: Sequence[LayerCache],
        block_table: BlockTable,
        token_pool: TokenPool,
        num_rows: int,
        device: torch.device,
    ) -> None:
        """Compile the kernels and capture; takes seconds. Call under no other capture."""
        self._decoder = decoder
        self._caches = caches
        self._block_table = block_table
        self._token_pool = token_pool
        self._device = device
        self._sizes = buckets_up_to(num_rows)
        with torch.cuda.device(device), torch.inference_mode():
            # Row and position of each row, in one tensor: one copy per step brings both.
            self._inputs_2S = torch.zeros((2, num_rows), dtype=torch.int64, device=device)
            self._inputs_2S[1] = PADDING
            self._hidden_SD = torch.zeros((num_rows, decoder.config.hidden_size), device=device)
            pool = torch.cuda.graph_pool_handle()
            # Largest first: the smaller ones fit into its memory.
            self._captured = {size: self._capture(size, pool) for size in reversed(self._sizes)}

    @property
    def num_rows(self) -> int:
        """Most rows of a step that can be replayed."""
        return self._sizes[-1]

    def _capture(self, size: int, pool: Any) -> _Captured:
        self._compute(size)  # compiles what this size needs, outside the capture
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = self._compute(size)
        return _Captured(graph=graph, out=out)

    def _compute(self, size: int) -> Tensor:
        rows_S, positions_S = self._inputs_2S[0, :size], self._inputs_2S[1, :size]
        decoder = self._decoder
        is_first, is_last = decoder.embedding is not None, decoder.head is not None
        x_SD = decoder.embed(self._token_pool.read(rows_S)) if is_first else self._hidden_SD[:size]
        slots_S = self._block_table.slots(rows_S, positions_S.clamp(min=0))
        metadata = AttentionMetadata(
            positions_T=positions_S,
            slots_T=torch.where(positions_S < 0, PADDING, slots_S),
            num_decode_rows=size,
            decode=DecodeMetadata(
                block_table_SB=self._block_table.whole_rows(rows_S), lengths_S=positions_S + 1
            ),
            prefill=None,
        )
        x_SD = decoder.forward(x_SD, self._caches, metadata)
        return decoder.logits(x_SD) if is_last else x_SD

    def replay(self, batch: MicroBatch, hidden_SD: Tensor | None) -> Tensor:
        """Compute a step of decode rows alone: [S, D], or [S, V] on the last stage.

        The result is the caller's own where it may outlive the next replay: hidden states are
        copied, logits are not.
        """
        count = batch.num_rows
        size = self._sizes[bisect_left(self._sizes, count)]
        inputs = np.full((2, size), PADDING, dtype=np.int64)
        inputs[0] = 0
        inputs[0, :count], inputs[1, :count] = batch.rows_S, batch.first_positions_S
        pinned = torch.from_numpy(inputs).pin_memory()
        self._inputs_2S[:, :size].copy_(pinned, non_blocking=True)
        if hidden_SD is not None:
            self._hidden_SD[:count].copy_(hidden_SD, non_blocking=True)
        captured = self._captured[size]
        captured.graph.replay()
        out = captured.out[:count]
        return out if self._decoder.head is not None else out.clone()
