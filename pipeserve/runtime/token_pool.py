"""TokenPool: the last sampled token of every row, handed from the last stage back to the first.

Published on the last stage's thread, everything else happens on the first one's; neither polls, and
no GPU is waited for.
"""

from __future__ import annotations

import queue
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import GivenTokens, IntArray
from pipeserve.runtime.devices import int_tensor
from pipeserve.runtime.transfer import Arrival, Transfer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Published:
    step_id: int
    rows_S: IntArray
    ids_S: Arrival


class TokenPool:
    """Lies on the first stage's device. Rows of different steps do not disturb each other: a row's
    next token is sampled only after its previous one was read.

    What is published of a late row means nothing: its token is given instead, in a step that needs
    the one in which it was sampled, and so lies over it."""

    def __init__(self, *, num_rows: int, device: torch.device, transfer: Transfer) -> None:
        """transfer: from the last stage's device to this one, for num_rows ids."""
        self._device = device
        self._transfer = transfer
        self._tokens_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._queue: queue.SimpleQueue[_Published | None] = queue.SimpleQueue()
        self._pending: deque[_Published] = deque()
        self._newest_step = -1
        self._is_closed = False

    def publish(self, step_id: int, rows_S: IntArray, ids_S: Tensor) -> None:
        """Send what a step sampled on its way. Steps come in order, also those without a row."""
        arrival = self._transfer.send(ids_S)
        self._queue.put(_Published(step_id=step_id, rows_S=rows_S, ids_S=arrival))

    def give(self, given: GivenTokens) -> None:
        """Enter tokens that the host knows, behind those of the steps that were received."""
        given_2G = int_tensor(np.stack((given.rows_G, given.ids_G)), self._device)
        self._tokens_R.index_copy_(0, given_2G[0], given_2G[1])

    def receive(self, needs_step: int | None) -> bool:
        """Enter the tokens up to those of needs_step, once they were sent.

        Later ones only if they are there already: a GPU would wait for them, and for nothing. To be
        called before each step, since what is on its way lies in a ring. False if the pool was
        closed.
        """
        while not self._is_closed:
            is_awaited = needs_step is not None and self._newest_step < needs_step
            try:
                published = self._queue.get(block=is_awaited)
            except queue.Empty:
                self._enter_pending(needs_step)
                return True
            if published is None:
                break
            self._newest_step = published.step_id
            self._pending.append(published)
        return False

    def _enter_pending(self, needs_step: int | None) -> None:
        """In the order of the steps."""
        needed = -1 if needs_step is None else needs_step
        while self._pending:
            first = self._pending[0]
            if first.step_id > needed and not first.ids_S.is_there:
                return
            self._enter(self._pending.popleft())

    def _enter(self, published: _Published) -> None:
        if len(published.rows_S) > 0:
            rows_S = int_tensor(published.rows_S, self._device)
            self._tokens_R.index_copy_(0, rows_S, published.ids_S.take())

    def read(self, rows_S: Tensor) -> Tensor:
        """[S] int64."""
        return self._tokens_R[rows_S]

    def close(self) -> None:
        """Wake whoever waits."""
        self._is_closed = True
        self._queue.put(None)
