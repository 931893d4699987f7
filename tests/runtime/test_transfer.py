"""Transfers: what is taken is what was sent, also after the sender has gone on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pipeserve.core.loading import LoadEvent, LoadNotice
from pipeserve.errors import ConfigError
from pipeserve.runtime.hand_off import Way, _use_peer
from pipeserve.runtime.peer_check import copies_arrive
from pipeserve.runtime.transfer import (
    CardTransfer,
    HostTransfer,
    Parcels,
    PeerTransfer,
    StagedTransfer,
    Transfer,
    make_transfer,
)

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
LAST_CARD = torch.device("cuda", max(0, torch.cuda.device_count() - 1))
"""Another one where there are two."""
PARCELS = Parcels(shape=(3000, 1000), dtype=torch.float32, depth=3)


def test_between_cpu_stages_a_tensor_changes_hands() -> None:
    tensor = torch.ones(2, 2)
    assert make_transfer(PARCELS, CPU, CPU, use_peer=False).send(tensor).take() is tensor


@contextmanager
def stream_of(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


WAYS: dict[str, tuple[Callable[[], Transfer], torch.device, torch.device]] = {
    "host": (HostTransfer, CPU, CPU),
    "card": (lambda: CardTransfer(PARCELS, CARD), CARD, CARD),
    "staged": (lambda: StagedTransfer(PARCELS, CARD, CARD), CARD, CARD),
    "to host": (lambda: StagedTransfer(PARCELS, CARD, CPU), CARD, CPU),
    "from host": (lambda: StagedTransfer(PARCELS, CPU, CARD), CPU, CARD),
    "peer": (lambda: PeerTransfer(PARCELS, CARD, LAST_CARD), CARD, LAST_CARD),
    "staged to the other card": (
        lambda: StagedTransfer(PARCELS, CARD, LAST_CARD),
        CARD,
        LAST_CARD,
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_ring_holds_what_is_on_its_way(way: str) -> None:
    make, source, target = WAYS[way]
    if way == "peer" and source == target:
        pytest.skip("needs two cards")
    transfer = make()
    num_lines = (1, 3000, 17, 256, 2999, 3000, 5)

    def compute(index: int) -> Tensor:
        """Slow on a card, so that a copy that does not wait for it is seen."""
        tensor = torch.full((num_lines[index], 1000), float(index), device=source)
        for _ in range(200):
            tensor = tensor + 1.0
        return tensor

    with stream_of(source):
        for first in range(0, len(num_lines), 2):  # two on their way: depth 3
            indices = range(first, min(first + 2, len(num_lines)))
            arrivals = []
            for index in indices:
                tensor = compute(index)
                arrivals.append(transfer.send(tensor))
                if way != "host":
                    tensor.fill_(-1.0)
            with stream_of(target):
                taken = [arrival.take().clone() for arrival in arrivals]
            torch.cuda.synchronize()
            for index, received in zip(indices, taken, strict=True):
                assert received.device == target
                assert received.shape == (num_lines[index], 1000)
                assert (received == index + 200.0).all()


@pytest.mark.gpu
def test_the_way_follows_from_the_devices() -> None:
    assert isinstance(make_transfer(PARCELS, CARD, CARD, use_peer=True), CardTransfer)
    assert isinstance(make_transfer(PARCELS, CARD, CPU, use_peer=True), StagedTransfer)
    assert isinstance(make_transfer(PARCELS, CPU, CARD, use_peer=True), StagedTransfer)


def test_copies_that_do_not_arrive_are_staged_and_said() -> None:
    events: list[LoadEvent] = []
    pair = (CARD, torch.device("cuda", 1))

    def use_peer(way: Way, *, works: bool) -> bool:
        return _use_peer(*pair, way, events.append, arrive=lambda source, target: works)

    assert use_peer("auto", works=True) and use_peer("peer", works=True)
    assert not use_peer("staged", works=True)
    assert events == []
    assert not use_peer("auto", works=False)
    (notice,) = events
    assert isinstance(notice, LoadNotice) and "cuda:0 straight to cuda:1" in notice.text
    with pytest.raises(ConfigError, match='set hand_off to "auto"'):
        use_peer("peer", works=False)


def test_nothing_is_tried_where_no_two_cards_meet() -> None:
    def arrive(source: torch.device, target: torch.device) -> bool:
        raise AssertionError("no copy is needed")

    for pair in ((CPU, CPU), (CARD, CARD), (CARD, CPU), (CPU, CARD)):
        assert not _use_peer(*pair, "auto", lambda event: None, arrive=arrive)


@pytest.mark.gpu
def test_copies_between_all_pairs_of_cards_arrive() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for source, target in itertools.permutations(cards, 2):
        assert copies_arrive(source, target)
