"""What pipeline and replicas are expected to bring, from given times and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeserve.bench.shapes import find_shape
from pipeserve.bench.synthetic import write_model
from pipeserve.config import Config
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from pipeserve.runtime import survey
from pipeserve.runtime.cost_model import Curve, DeviceTimes, LayerTimes
from pipeserve.runtime.layer_times import layer_kinds
from pipeserve.runtime.layouts import find_devices, forecast_layouts, survey_layouts
from pipeserve.runtime.loading import stage_backend
from pipeserve.runtime.survey import Survey, survey_devices

CPU = torch.device("cpu")
MIB = 1024**2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "tiny-q4_k_m.gguf"
    write_model(path, find_shape("tiny"), "q4_k_m")
    return path


@pytest.fixture
def file(path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(path) as gguf_file:
        yield gguf_file


@pytest.fixture(autouse=True)
def given_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step of a layer takes 1 ms, whatever the rows; the head and prompts nothing."""

    def times(gguf_file, model, device, config, facts) -> DeviceTimes:  # type: ignore[no-untyped-def]
        layer = LayerTimes(
            decode=Curve(sizes=(1, 64), seconds=(1e-3, 1e-3)),
            prefill=Curve(sizes=(256,), seconds=(0.0,)),
        )
        kinds = layer_kinds(gguf_file, model.num_layers, stage_backend(device, config))
        head = Curve(sizes=(1, 64), seconds=(0.0, 0.0))
        return DeviceTimes(layers=dict.fromkeys(kinds, layer), head=head, spared=head, step_s=0.0)

    monkeypatch.setattr(survey, "_times", times)


CONFIG = Config(max_num_seqs=16, context_length=1024)


def make_survey(file: GGUFFile, num_devices: int) -> Survey:
    return survey_devices(file, check_model(file), CONFIG, (CPU,) * num_devices)


def rates(survey: Survey) -> dict[int, float | None]:
    return {
        each.num_replicas: each.output_tokens_per_s for each in forecast_layouts(survey, CONFIG)
    }


def test_weight_bound_steps_make_replicas_faster(file: GGUFFile) -> None:
    # Eight layers: 8 ms for a step of 16 rows on one device; in a pipeline of P devices a stage
    # takes 8 / P ms for 16 / P rows, which is what one device does.
    one = 16 / 8e-3
    assert rates(make_survey(file, 4)) == pytest.approx({1: one, 2: 2 * one, 4: 4 * one})
    assert set(rates(make_survey(file, 6))) == {1, 2, 3, 6}


def test_a_slow_device_brings_what_it_can(file: GGUFFile) -> None:
    slowed = survey_devices(file, check_model(file), CONFIG, (CPU, CPU), slowdowns=[1.0, 4.0])
    assert rates(slowed)[2] == pytest.approx(16 / 8e-3 * 1.25)


def test_short_kv_caches_leave_rows_empty(file: GGUFFile) -> None:
    wide = make_survey(file, 2)
    kv_token_bytes = wide.devices[0].kv_token_bytes
    # Of a whole model, 4 sequences of 640 tokens; of half of one, 8.
    narrow = replace(
        wide,
        devices=tuple(
            replace(each, kv_bytes=8 * kv_token_bytes * 4 * 640) for each in wide.devices
        ),
    )
    assert rates(narrow) == pytest.approx({1: 8 / 8e-3, 2: 2 * 4 / 8e-3})


def test_no_replica_where_a_device_cannot_hold_a_full_context(file: GGUFFile) -> None:
    wide = make_survey(file, 2)
    kv_token_bytes = wide.devices[0].kv_token_bytes
    tight = replace(
        wide,
        devices=tuple(replace(each, kv_bytes=6 * kv_token_bytes * 1024) for each in wide.devices),
    )
    found = rates(tight)
    assert found[2] is None
    assert found[1] is not None
    unnamed = replace(tight, wanted_tokens=None)  # a shorter context would fit
    assert rates(unnamed)[2] is None


def test_devices_are_found_and_every_layout_is_forecast(file: GGUFFile) -> None:
    config = Config(devices=("cpu", "cpu"), max_num_seqs=16, context_length=1024)
    assert find_devices(file, config) == ("cpu", "cpu")
    found = survey_layouts(file, config)
    assert found.devices == ("cpu", "cpu")
    assert found.forecasts == forecast_layouts(make_survey(file, 2), config)
