"""TokenPool: the last sampled token of every row, handed from the last stage back to the first.

Written on the last stage's thread, read on the first one's; neither polls.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class TokenPool:
    """Lies on the first stage's device. Rows of different steps do not disturb each other: a row's
    next token is sampled only after its previous one was read."""

    def __init__(self, *, num_rows: int, device: torch.device) -> None:
        self._tokens_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._changed = threading.Condition()
        self._newest_step = -1
        self._is_closed = False

    def publish(self, step_id: int, rows_S: Tensor, token_ids_S: Tensor) -> None:
        """Store what a step sampled and let the first stage read it. Steps come in order."""
        self._tokens_R[rows_S.to(self._tokens_R.device)] = token_ids_S.to(self._tokens_R.device)
        with self._changed:
            self._newest_step = step_id
            self._changed.notify_all()

    def wait_for(self, step_id: int) -> bool:
        """Wait until that step is published; False if the pool was closed instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest_step >= step_id or self._is_closed)
            return not self._is_closed

    def read(self, rows_S: Tensor) -> Tensor:
        """[S] int64."""
        return self._tokens_R[rows_S]

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
