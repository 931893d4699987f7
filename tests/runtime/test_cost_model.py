"""The cost model: interpolation, the mix, and what it foretells of pipelines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeserve.runtime.cost_model import (
    HANDOFF_S,
    Curve,
    DeviceTimes,
    LayerTimes,
    Mix,
    StageTimes,
    decode_tokens_per_s,
    prefill_tokens_per_s,
)

ROWS = (1, 64, 256)


def line(at_none: float, slope: float, sizes: tuple[int, ...] = ROWS) -> Curve:
    return Curve(sizes=sizes, seconds=tuple(at_none + slope * size for size in sizes))


def device_times(
    *, fixed_s: float, row_s: float, head_s: float = 0.0, spared_s: float = 0.0, step_s: float = 0.0
) -> DeviceTimes:
    layer = LayerTimes(decode=line(fixed_s, row_s), prefill=line(0.0, row_s, (512, 2048)))
    wide = LayerTimes(decode=line(2 * fixed_s, row_s), prefill=line(0.0, 3 * row_s, (512, 2048)))
    return DeviceTimes(
        layers={"narrow": layer, "wide": wide},
        head=line(head_s, 0.0),
        spared=line(spared_s, 0.0, (512, 2048)),
        step_s=step_s,
    )


def pipeline(times: DeviceTimes, *split: int) -> list[StageTimes]:
    last = len(split) - 1
    return [
        StageTimes(times=times, kinds=("narrow",) * count, has_head=index == last)
        for index, count in enumerate(split)
    ]


def test_a_curve_goes_through_its_points_and_straight_between() -> None:
    curve = Curve(sizes=(1, 8, 32), seconds=(2.0, 9.0, 21.0))
    assert [curve.at(size) for size in curve.sizes] == list(curve.seconds)
    assert curve.at(4.5) == pytest.approx(5.5)
    assert curve.at(20) == pytest.approx(15.0)
    assert curve.at(0.5) == 2.0
    assert curve.at(64) == 42.0
    assert curve.scaled(3.0).at(20) == pytest.approx(45.0)


@given(
    rows=st.integers(1, 256),
    chunk=st.integers(512, 2048),
    kinds=st.lists(st.sampled_from(["narrow", "wide"]), min_size=1, max_size=9),
    has_head=st.booleans(),
    factor=st.floats(1.0, 3.0),
)
def test_a_stage_costs_what_its_layers_and_head_do(
    rows: int, chunk: int, kinds: list[str], has_head: bool, factor: float
) -> None:
    """What is cut by (the sum over layers) is what is foretold of a stage."""
    times = device_times(fixed_s=1e-3, row_s=1e-5, head_s=2e-3, spared_s=4e-3, step_s=1e-4)
    times = times.scaled(factor)
    mix = Mix(rows=rows, chunk_tokens=chunk)
    stage = StageTimes(times=times, kinds=kinds, has_head=has_head)
    layers_s = sum(mix.layer_s(times.layers[kind]) for kind in kinds)
    parts_s = layers_s + mix.step_s(times) + has_head * mix.head_s(times)
    whole_s = mix.per_output_token_s(stage.decode_s(rows), stage.prefill_s(chunk))
    assert whole_s == pytest.approx(parts_s)


def test_the_mix_counts_four_prompt_tokens_per_output_token() -> None:
    times = device_times(fixed_s=2e-3, row_s=1e-5)
    mix = Mix(rows=10, chunk_tokens=1000)
    decode_s, prefill_s = 2e-3 + 10 * 1e-5, 1000 * 1e-5
    assert mix.layer_s(times.layers["narrow"]) == pytest.approx(
        decode_s / 10 + 4 * prefill_s / 1000
    )


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.1, 1.0, 5.0])
def test_equal_stages_at_fixed_concurrency(num_stages: int, share: float) -> None:
    """P stages and P cohorts of B rows in all, where a step takes a + c b: the speed-up is
    (1 + r) / (1 + r / P) with r = c B / a."""
    num_rows, fixed_s = 64, 1.0
    times = device_times(fixed_s=fixed_s, row_s=share * fixed_s / num_rows)
    alone = decode_tokens_per_s(pipeline(times, 8), num_rows)
    together = decode_tokens_per_s(pipeline(times, *[8 // num_stages] * num_stages), num_rows)
    assert together / alone == pytest.approx((1 + share) / (1 + share / num_stages), rel=1e-3)


def test_one_sequence_passes_through_all_stages() -> None:
    times = device_times(fixed_s=1.0, row_s=0.5, head_s=2.0)
    cycle_s = 8 * 1.5 + 2.0 + 4 * HANDOFF_S
    assert decode_tokens_per_s(pipeline(times, 2, 2, 2, 2), 1) == pytest.approx(1 / cycle_s)


def test_the_slowest_stage_sets_the_pace() -> None:
    times = device_times(fixed_s=1.0, row_s=0.0)
    assert decode_tokens_per_s(pipeline(times, 3, 1), 64) == pytest.approx(64 / 6.0)
    assert prefill_tokens_per_s(
        pipeline(device_times(fixed_s=1.0, row_s=1e-3), 3, 1), 1000
    ) == pytest.approx(1000 / 3.0)
    assert prefill_tokens_per_s(
        pipeline(device_times(fixed_s=1.0, row_s=1e-3, spared_s=0.75), 2, 2), 1000
    ) == pytest.approx(1000 / 2.0), "the first stage has no last layer"
    assert prefill_tokens_per_s(
        pipeline(device_times(fixed_s=1.0, row_s=1e-3, spared_s=0.75), 1, 3), 1000
    ) == pytest.approx(1000 / 2.25)
