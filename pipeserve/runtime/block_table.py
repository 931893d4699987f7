"""BlockTable: which KV blocks each row holds. One per stage, owned by the stage's thread.

Shapes: S rows of a step, T tokens, B entries of a row, R all rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import MicroBatch
from pipeserve.runtime.devices import int_tensor


class BlockTable:
    """[R, B] block ids on the stage's device; a micro-batch brings only what changed."""

    def __init__(
        self, *, num_rows: int, blocks_per_row: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        self._table_RB = torch.zeros((num_rows, blocks_per_row), dtype=torch.int64, device=device)

    def apply(self, batch: MicroBatch) -> None:
        """Enter the step's new blocks."""
        if len(batch.block_ids) == 0:
            return
        changes = np.stack((batch.block_rows, batch.block_columns, batch.block_ids))
        rows, columns, block_ids = int_tensor(changes, self._device)
        self._table_RB[rows, columns] = block_ids

    @property
    def block_size(self) -> int:
        return self._block_size

    def columns(self, *, max_length: int | None) -> Tensor:
        """[R, B] of all rows, with as many columns as max_length tokens need; None: all."""
        if max_length is None:
            return self._table_RB
        return self._table_RB[:, : -(-max_length // self._block_size)]

    def rows(self, rows_S: Tensor, *, max_length: int | None) -> Tensor:
        """`columns` [S, B] of these rows."""
        return self.columns(max_length=max_length).index_select(0, rows_S)

    def slots(self, rows_T: Tensor, positions_T: Tensor) -> Tensor:
        """Cache slot of every token, from its row and its position in the sequence."""
        blocks_T = self._table_RB[rows_T, positions_T // self._block_size]
        return blocks_T * self._block_size + positions_T % self._block_size
