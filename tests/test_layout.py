"""One pipeline or replicas: what the options say, and what auto makes of forecasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize

from pipeserve.config import Config
from pipeserve.core.layout import LayoutForecast, LayoutSurvey
from pipeserve.engine_host import may_have_several_gpus
from pipeserve.errors import ConfigError
from pipeserve.layout import choose_layout, needs_survey

FOUR = ("cuda:0", "cuda:1", "cuda:2", "cuda:3")


def survey(*rates: float | None, devices: tuple[str, ...] = FOUR[:2]) -> LayoutSurvey:
    """Of 1, 2, 4, ... replicas."""
    forecasts = tuple(
        LayoutForecast(num_replicas=2**power, output_tokens_per_s=rate)
        for power, rate in enumerate(rates)
    )
    return LayoutSurvey(devices=devices, forecasts=forecasts)


def shares(config: Config, found: LayoutSurvey | None = None) -> list[tuple[str, ...]]:
    return [each.devices for each in choose_layout(config, found).replicas]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [4]),
        ({"layout": "pipeline"}, [4]),
        ({"layout": "replicas"}, [1, 1, 1, 1]),
        ({"layout": "replicas", "stages": 2}, [2, 2]),
        ({"replicas": 2}, [2, 2]),
        ({"replicas": 4, "stages": 1}, [1, 1, 1, 1]),
        ({"stages": 4}, [4]),
        ({"layout": "pipeline", "replicas": 1}, [4]),
    ],
)
def test_by_hand_devices_are_dealt_out_in_order(options: dict[str, Any], sizes: list[int]) -> None:
    config = Config(devices=("cpu", *FOUR[:3]), **options)
    dealt = shares(config)
    assert [len(share) for share in dealt] == sizes
    assert tuple(device for share in dealt for device in share) == config.devices


def test_one_device_is_one_replica_whatever_the_layout() -> None:
    for layout in ("auto", "pipeline", "replicas"):
        config = Config(devices=("cuda:0",), layout=layout)
        assert not needs_survey(config, may_have_several_gpus=True)
        assert choose_layout(config, None).replicas == (config,)


def test_limits_go_with_their_devices_and_a_replica_is_a_pipeline() -> None:
    config = Config(
        devices=FOUR,
        replicas=2,
        memory_limit_bytes=tuple(map(ByteSize, (1, 2, 3, 4))),
        layer_split=(10, 20),
    )
    first, second = choose_layout(config, None).replicas
    assert (first.memory_limit_bytes, second.memory_limit_bytes) == ((1, 2), (3, 4))
    assert first.layer_split == second.layer_split == (10, 20)
    assert choose_layout(second, None).replicas == (second,)
    one_for_all = config.model_copy(update={"memory_limit_bytes": (5,)})
    assert choose_layout(one_for_all, None).replicas[1].memory_limit_bytes == (5,)


@pytest.mark.parametrize(
    ("rates", "num_replicas"),
    [
        ((1000.0, 1200.0, 1100.0), 2),
        ((1000.0, 1100.0, 1200.0), 4),
        ((1000.0, 1040.0, 1049.0), 1),
        ((1000.0, None, None), 1),
        ((1000.0, None, 1300.0), 4),
        ((None, None, None), 1),
        ((None, 900.0, 910.0), 2),
    ],
)
def test_auto_takes_the_fewest_replicas_that_nothing_beats_by_much(
    rates: tuple[float | None, ...], num_replicas: int
) -> None:
    layout = choose_layout(Config(devices=FOUR), survey(*rates, devices=FOUR))
    assert len(layout.replicas) == num_replicas
    for rate in rates:
        assert "no room" if rate is None else f"{rate:.0f} output tokens/s" in layout.reason


def test_auto_finds_the_devices_by_themselves() -> None:
    config = Config()
    assert needs_survey(config, may_have_several_gpus=True)
    assert shares(config, survey(1000.0, 1200.0)) == [("cuda:0",), ("cuda:1",)]
    assert choose_layout(config, survey(1000.0, 900.0)).replicas == (config,)
    by_hand = Config(layout="replicas")
    assert needs_survey(by_hand, may_have_several_gpus=False)
    found = LayoutSurvey(devices=("cpu", "cpu"), forecasts=())
    assert shares(by_hand, found) == [("cpu",), ("cpu",)]
    assert choose_layout(config, found).replicas == (config,)


@pytest.mark.parametrize(
    ("options", "is_open"),
    [
        ({"devices": FOUR}, True),
        ({"devices": FOUR, "replicas": 2}, False),
        ({"devices": FOUR, "stages": 2}, False),
        ({"devices": FOUR, "layout": "pipeline"}, False),
        ({"devices": FOUR, "layer_split": (1, 2, 3, 4)}, False),
        ({"devices": ("cuda:0", "cuda:0")}, False),
        ({"devices": ("cuda:0", "cpu")}, False),
        ({"devices": ("cpu", "cpu")}, False),
    ],
)
def test_auto_chooses_only_between_gpus_of_their_own(
    options: dict[str, Any], is_open: bool
) -> None:
    assert needs_survey(Config(**options), may_have_several_gpus=True) is is_open


@pytest.mark.parametrize("count", [2, 3, 5])
def test_limits_are_dealt_out_only_where_every_device_has_one(count: int) -> None:
    """Two for the stages of each of two replicas would leave the second one without any."""
    config = Config(devices=FOUR, replicas=2, memory_limit_bytes=(ByteSize(2**30),) * count)
    with pytest.raises(ConfigError, match=f"memory_limit_bytes has {count} values for 4 devices"):
        choose_layout(config, None)


def test_replicas_share_a_gpu_only_with_a_limit() -> None:
    options: dict[str, Any] = {"devices": ("cuda:0", "cuda:0"), "replicas": 2}
    with pytest.raises(ConfigError, match=r"cuda:0 more than once .* set kv_cache_bytes"):
        choose_layout(Config(**options), None)
    for limit in ("kv_cache_bytes", "memory_limit_bytes"):
        options[limit] = 2**30
        assert len(choose_layout(Config(**options), None).replicas) == 2
        del options[limit]


def test_devices_that_were_found_must_go_with_the_options() -> None:
    with pytest.raises(ConfigError, match="replicas is 3, which does not divide the 4 devices"):
        choose_layout(Config(replicas=3), survey(1.0, devices=FOUR))


@pytest.mark.parametrize(
    ("nodes", "environ", "expected"),
    [
        (("nvidiactl", "nvidia0"), {}, False),
        (("nvidiactl", "nvidia0", "nvidia1"), {}, True),
        (("nvidiactl", "nvidia0", "nvidia1"), {"CUDA_VISIBLE_DEVICES": "1"}, False),
        (("nvidiactl", "nvidia0", "nvidia1"), {"CUDA_VISIBLE_DEVICES": "1,0"}, True),
        (("kfd",), {}, True),
        ((), {}, False),
    ],
)
def test_what_can_be_known_of_gpus_without_torch(
    nodes: tuple[str, ...], environ: dict[str, str], expected: bool, tmp_path: Path
) -> None:
    for node in nodes:
        (tmp_path / node).touch()
    assert may_have_several_gpus(folder=tmp_path, environ=environ) is expected
