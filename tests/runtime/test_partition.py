"""The cut is the best of all cuts in all orders, and a split that cannot be is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeserve.errors import ConfigError
from pipeserve.runtime.partition import (
    SLACK,
    DeviceCosts,
    Partition,
    WeightBytes,
    best_partition,
    check_split,
    price,
)
from pipeserve.runtime.plan import layer_ranges

LEAST_TOKENS, MOST_TOKENS = 16, 400


def device(
    layer_s: Sequence[float],
    *,
    head_s: float = 0.0,
    stage_s: float = 0.0,
    layer_bytes: int = 100,
    room_bytes: int | None = None,
    kv_bytes: int | None = None,
    least_kv_bytes: int = 0,
) -> DeviceCosts:
    weights = WeightBytes(layers=(layer_bytes,) * len(layer_s), embedding=50, head=70, shared=30)
    return DeviceCosts(
        layer_s=tuple(layer_s),
        head_s=head_s,
        stage_s=stage_s,
        weights=weights,
        kv_token_bytes=2,
        room_bytes=room_bytes,
        kv_bytes=kv_bytes,
        least_kv_bytes=least_kv_bytes,
    )


def best(devices: Sequence[DeviceCosts], least_tokens: int = 1) -> Partition:
    found = best_partition(devices, least_tokens=least_tokens, most_tokens=10**9)
    assert found is not None
    return found


def all_splits(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(end - start for start, end in pairwise((0, *cuts, num_layers)))
        for cuts in combinations(range(1, num_layers), num_stages - 1)
    ]


def all_orders(devices: Sequence[DeviceCosts], left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Of equal devices the first comes first."""
    if not left:
        yield ()
    for which in {devices[index]: index for index in reversed(left)}.values():
        for rest in all_orders(devices, tuple(index for index in left if index != which)):
            yield (which, *rest)


def by_hand(
    devices: Sequence[DeviceCosts], cut: tuple[int, ...], order: tuple[int, ...]
) -> Partition:
    """As price, without its matrices."""
    times, tokens = [], []
    for layers, which in zip(layer_ranges(cut), order, strict=True):
        own = devices[which]
        head_s = own.head_s if layers.is_last else 0.0
        times.append(sum(own.layer_s[layers.first : layers.end]) + own.stage_s + head_s)
        weights = sum(own.weights.layers[layers.first : layers.end])
        weights += own.weights.embedding * layers.is_first + own.weights.head * layers.is_last
        weights -= own.weights.shared * (layers.is_first and layers.is_last)
        rooms = [] if own.room_bytes is None else [own.room_bytes - weights]
        rooms += [] if own.kv_bytes is None else [own.kv_bytes]
        each = own.kv_token_bytes * len(layers)
        fits = own.room_bytes is None or own.room_bytes - weights >= own.least_kv_bytes
        held = min((room // each for room in rooms), default=float("inf"))
        tokens.append(held if fits or held < 0 else -1 // each)
    return Partition(order=order, split=cut, times_s=tuple(times), tokens=tuple(tokens))


@st.composite
def machines(
    draw: st.DrawFn, num_devices: st.SearchStrategy[int], num_kinds: int
) -> list[DeviceCosts]:
    count = draw(num_devices)
    num_layers = draw(st.integers(count, count + 4))
    room = st.none() | st.integers(300, 3000)
    kinds = [
        device(
            draw(st.lists(st.integers(1, 20), min_size=num_layers, max_size=num_layers)),
            head_s=draw(st.integers(0, 40)),
            stage_s=draw(st.integers(0, 5)),
            room_bytes=draw(room),
            kv_bytes=draw(st.none() | st.integers(100, 2000)),
            least_kv_bytes=draw(st.just(0) | st.integers(0, 1000)),
        )
        for _ in range(num_kinds)
    ]
    return [draw(st.sampled_from(kinds)) for _ in range(count)]


@settings(deadline=None)
@given(machines(st.integers(1, 4), 4) | machines(st.integers(5, 8), 2))
def test_no_cut_in_any_order_is_better(devices: list[DeviceCosts]) -> None:
    everything = [
        by_hand(devices, cut, order)
        for cut in all_splits(len(devices[0].layer_s), len(devices))
        for order in all_orders(devices, tuple(range(len(devices))))
    ]
    fitting = [cut for cut in everything if cut.num_tokens >= LEAST_TOKENS]
    chosen = best_partition(devices, least_tokens=LEAST_TOKENS, most_tokens=MOST_TOKENS)
    if not fitting:
        assert chosen is None
        return
    fastest_s = min(cut.slowest_s for cut in fitting)
    close = [cut for cut in fitting if cut.slowest_s <= fastest_s * (1 + SLACK)]
    most_tokens = max(min(cut.num_tokens, MOST_TOKENS) for cut in close)
    roomiest = [cut for cut in close if min(cut.num_tokens, MOST_TOKENS) == most_tokens]
    assert chosen is not None
    assert chosen in everything, "its times and tokens are those of its cut"
    assert chosen.slowest_s <= fastest_s * 1.03
    assert min(chosen.num_tokens, MOST_TOKENS) == most_tokens
    assert chosen.slowest_s == min(cut.slowest_s for cut in roomiest)


@given(machines(st.integers(1, 4), 3))
def test_a_price_is_that_of_the_cut(devices: list[DeviceCosts]) -> None:
    order = tuple(range(len(devices)))
    for cut in all_splits(len(devices[0].layer_s), len(devices)):
        assert price(devices, cut) == by_hand(devices, cut, order)


@pytest.mark.parametrize("factor", [1.5, 3.0])
@pytest.mark.parametrize("num_stages", range(2, 9))
def test_a_slow_device_gets_fewer_layers_than_even_or_memory_would_give_it(
    num_stages: int, factor: float
) -> None:
    num_layers = 8 * num_stages
    fast = device([1.0] * num_layers, head_s=1.0, room_bytes=40_000)
    slow = device([factor] * num_layers, head_s=factor, room_bytes=40_000)
    devices = [*[fast] * (num_stages - 1), slow]
    chosen = best(devices)
    even = price(devices, (8,) * num_stages)  # by memory too: each has as much
    assert chosen.slowest_s < even.slowest_s
    assert chosen.split[chosen.order.index(num_stages - 1)] < 8


def test_a_split_by_memory_is_beaten() -> None:
    """The larger card is the slower one: memory would give it most of the layers."""
    fast, slow = device([1.0] * 12, room_bytes=1500), device([2.0] * 12, room_bytes=3000)
    by_memory = price([fast, slow], (4, 8))
    chosen = best([fast, slow])
    assert chosen.slowest_s < by_memory.slowest_s
    assert chosen.split == (8, 4)


def test_a_small_device_gets_what_fits() -> None:
    whole = device([1.0] * 10, room_bytes=10_000)
    small = replace(whole, room_bytes=300)  # two layers, and what the last stage has besides
    chosen = best([whole, small], least_tokens=5)
    assert dict(zip(chosen.order, chosen.split, strict=True))[1] == 2
    assert min(chosen.tokens) >= 5


def test_memory_decides_between_cuts_that_are_about_as_fast() -> None:
    """6 + 6 layers would be the fastest; a layer fewer costs 0.2 % and leaves more room for KV."""
    layer_s = [100.0] * 5 + [1.0] * 2 + [100.0] * 5
    large, small = device(layer_s, room_bytes=3000), device(layer_s, room_bytes=1200)
    chosen = best([large, small])
    assert dict(zip(chosen.order, chosen.split, strict=True)) == {0: 7, 1: 5}
    assert chosen.slowest_s > price([large, small], (6, 6)).slowest_s


def test_equal_devices_keep_their_order() -> None:
    same = device([1.0] * 9)
    assert best([same] * 3).order == (0, 1, 2)
    other = device([2.0] * 9)
    assert best([same, other, same]).order in {(0, 1, 2), (1, 0, 2), (0, 2, 1)}


def test_the_head_takes_layers_off_the_last_stage() -> None:
    assert best([device([1.0] * 30, head_s=6.0)] * 2).split == (18, 12)
    assert best([device([1.0] * 30, head_s=6.0)] * 30).split == (1,) * 30


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match="3 stages, but the model has 2 layers"):
        best([device([1.0, 1.0])] * 3)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ((15, 15, 0), "at least 1 layer"),
        ((15, 15), "2 numbers for 3 devices"),
        ((10, 10, 11), "31 layers together, but the model has 30"),
    ],
)
def test_a_wrong_split_is_refused(split: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_split(split, num_layers=30, num_stages=3)


def test_layer_ranges_follow_each_other() -> None:
    first, second, third = layer_ranges((1, 4, 2))
    assert [(r.first, r.end) for r in (first, second, third)] == [(0, 1), (1, 5), (5, 7)]
    assert (first.is_first, first.is_last) == (True, False)
    assert (second.is_first, second.is_last) == (False, False)
    assert (third.is_first, third.is_last) == (False, True)
