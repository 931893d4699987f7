"""TokenPool: a step waits for the tokens that it reads, and for no others."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import GivenTokens
from pipeserve.runtime.token_pool import TokenPool
from pipeserve.runtime.transfer import Arrival

CPU = torch.device("cpu")


class FakeEvent:
    """Done when it is told; notes when something would have waited for it."""

    def __init__(self) -> None:
        self.is_done = False
        self.num_waits = 0

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.num_waits += not self.is_done


@dataclass
class FakeTransfer:
    """Every tensor has an event of its own."""

    events: list[FakeEvent] = field(default_factory=list)

    def send(self, tensor: Tensor) -> Arrival:
        self.events.append(FakeEvent())
        return Arrival(tensor=tensor, event=self.events[-1])  # type: ignore[arg-type]


def make_pool() -> tuple[TokenPool, FakeTransfer]:
    transfer = FakeTransfer()
    return TokenPool(num_rows=4, device=CPU, transfer=transfer), transfer


def publish(pool: TokenPool, step_id: int, rows: list[int], ids: list[int]) -> None:
    pool.publish(step_id, np.array(rows, dtype=np.int32), torch.tensor(ids))


def tokens(pool: TokenPool) -> list[int]:
    return pool.read(torch.arange(4)).tolist()


def test_a_step_does_not_wait_for_tokens_that_it_does_not_read() -> None:
    pool, transfer = make_pool()
    publish(pool, 0, [0, 1], [10, 11])
    publish(pool, 1, [2, 3], [12, 13])
    assert pool.receive(needs_step=None)
    assert tokens(pool) == [0, 0, 0, 0]
    assert pool.receive(needs_step=0)
    assert tokens(pool) == [10, 11, 0, 0]
    assert [event.num_waits for event in transfer.events] == [1, 0]
    assert pool.receive(needs_step=1)
    assert tokens(pool) == [10, 11, 12, 13]
    assert [event.num_waits for event in transfer.events] == [1, 1]


def test_what_is_there_is_entered_before_its_buffer_is_used_again() -> None:
    pool, transfer = make_pool()
    publish(pool, 0, [0], [10])
    publish(pool, 1, [1], [11])
    publish(pool, 2, [2], [12])
    transfer.events[0].is_done = transfer.events[1].is_done = True
    assert pool.receive(needs_step=None)
    assert tokens(pool) == [10, 11, 0, 0]
    assert [event.num_waits for event in transfer.events] == [0, 0, 0]


def test_tokens_are_entered_in_the_order_of_the_steps() -> None:
    pool, transfer = make_pool()
    publish(pool, 0, [0], [10])
    publish(pool, 1, [0], [11])
    transfer.events[1].is_done = True
    assert pool.receive(needs_step=None)
    assert tokens(pool)[0] == 0
    assert pool.receive(needs_step=0)
    assert tokens(pool)[0] == 11


def test_steps_without_a_row_count_too() -> None:
    pool, _ = make_pool()
    publish(pool, 0, [], [])
    assert pool.receive(needs_step=0)
    pool.close()
    assert not pool.receive(needs_step=0)


def test_what_is_given_lies_over_what_was_published_before() -> None:
    """Also where that has not arrived when the step is launched."""
    pool, transfer = make_pool()
    publish(pool, 0, [0, 1], [10, 11])
    publish(pool, 1, [2, 1], [12, 13])
    assert pool.receive(needs_step=1)
    one = np.array([1], dtype=np.int32)
    pool.give(GivenTokens(rows_G=one, ids_G=np.array([77], dtype=np.int32)))
    assert pool.receive(needs_step=None)
    assert tokens(pool) == [10, 77, 12, 0]
    assert [event.num_waits for event in transfer.events] == [1, 1]
