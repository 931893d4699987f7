"""Transfers: what is taken is what was sent, also after the sender has gone on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pipeserve.core.loading import LoadEvent, LoadNotice
from pipeserve.errors import ConfigError
from pipeserve.runtime.hand_off import Pair, Way, _find_peers
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


CARDS = [torch.device("cuda", index) for index in range(3)]
ROUND: list[Pair] = [(CARDS[0], CARDS[1]), (CARDS[1], CARDS[2]), (CARDS[2], CARDS[0])]
"""What three stages on cards hand over: hidden states onwards, ids back."""


def find_peers(
    pairs: list[Pair], way: Way, broken: Collection[Pair] = ()
) -> tuple[frozenset[Pair], list[Pair], list[str]]:
    """What is found, which pairs were tried, and what the user is told."""
    tried: list[Pair] = []
    events: list[LoadEvent] = []

    def arrive(source: torch.device, target: torch.device) -> bool:
        tried.append((source, target))
        return (source, target) not in broken

    peers = _find_peers(pairs, way, events.append, arrive=arrive)
    assert all(isinstance(event, LoadNotice) for event in events)
    return peers, tried, [event.text for event in events if isinstance(event, LoadNotice)]


@pytest.mark.parametrize("way", ["auto", "peer"])
def test_every_ordered_pair_of_the_stages_cards_is_tried(way: Way) -> None:
    every = set(itertools.permutations(CARDS, 2))
    peers, tried, told = find_peers(ROUND, way)
    assert sorted(tried, key=str) == sorted(every, key=str)
    assert peers == every and told == []


def test_copies_that_do_not_arrive_are_staged_and_said() -> None:
    peers, _, (told,) = find_peers(ROUND, "auto", broken=ROUND[:1])
    assert ROUND[0] not in peers and peers.issuperset(ROUND[1:])
    assert "cuda:0 straight to cuda:1" in told and "through the host's memory" in told
    with pytest.raises(ConfigError, match='set hand_off to "auto"'):
        find_peers(ROUND, "peer", broken=ROUND[:1])


@pytest.mark.parametrize("way", ["auto", "peer"])
def test_a_broken_pair_that_hands_nothing_over_is_only_said(way: Way) -> None:
    unused = (CARDS[1], CARDS[0])
    peers, _, (told,) = find_peers(ROUND, way, broken=[unused])
    assert peers.issuperset(ROUND)
    assert "cuda:1 straight to cuda:0" in told and "no stage hands over" in told


def test_nothing_is_tried_where_all_is_to_be_staged() -> None:
    assert find_peers(ROUND, "staged") == (frozenset(), [], [])


def test_nothing_is_tried_where_no_two_cards_meet() -> None:
    for pair in ((CPU, CPU), (CARD, CARD), (CARD, CPU), (CPU, CARD)):
        assert find_peers([pair, pair[::-1]], "auto") == (frozenset(), [], [])


@pytest.mark.gpu
def test_copies_between_all_pairs_of_cards_arrive() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for source, target in itertools.permutations(cards, 2):
        assert copies_arrive(source, target)
