"""The cut is the best of all cuts, and a split that cannot be is refused."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeserve.errors import ConfigError
from pipeserve.runtime.partition import check_split, cut_layers, layer_ranges


def slowest(split: tuple[int, ...], costs: list[int], head_cost: int) -> int:
    stages = [sum(costs[r.first : r.end]) for r in layer_ranges(split)]
    stages[-1] += head_cost
    return max(stages)


def all_splits(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(end - start for start, end in pairwise((0, *cuts, num_layers)))
        for cuts in combinations(range(1, num_layers), num_stages - 1)
    ]


@given(
    costs=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    head_cost=st.integers(0, 40),
    data=st.data(),
)
def test_no_other_cut_is_better(costs: list[int], head_cost: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    split = cut_layers(costs, head_cost=head_cost, num_stages=num_stages)
    best = min(slowest(s, costs, head_cost) for s in all_splits(len(costs), num_stages))
    assert split in all_splits(len(costs), num_stages)
    assert slowest(split, costs, head_cost) == best


def test_the_head_takes_layers_off_the_last_stage() -> None:
    assert cut_layers([1.0] * 30, head_cost=6.0, num_stages=2) == (18, 12)
    assert cut_layers([1.0] * 30, head_cost=6.0, num_stages=30) == (1,) * 30


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match="3 stages, but the model has 2 layers"):
        cut_layers([1.0, 1.0], head_cost=0.0, num_stages=3)


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
