"""`pipeserve plan`: what it prints for people and programs, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeserve import cli, planning
from pipeserve.bench.shapes import find_shape
from pipeserve.bench.synthetic import write_model
from pipeserve.config import Config
from pipeserve.core.layout import LayoutForecast, LayoutSurvey
from pipeserve.errors import ConfigError
from pipeserve.planning import as_json, as_text, make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning")
    write_model(folder / "tiny.gguf", find_shape("tiny"), "q4_k_m")
    return folder


def plan_config(folder: Path, **options: object) -> Config:
    values = {"model": str(folder / "tiny.gguf"), "cache_dir": folder, "devices": ("cpu", "cpu")}
    return Config(**{**values, **options})  # type: ignore[arg-type]


def test_json_holds_stages_loads_limits_and_alternatives(folder: Path) -> None:
    plan: dict[str, Any] = json.loads(as_json(make_plan(plan_config(folder))))
    assert plan["num_layers"] == 8
    stages = plan["forecast"]["stages"]
    assert [stage["device"] for stage in stages] == ["cpu", "cpu"]
    assert sum(stage["num_layers"] for stage in stages) == 8
    assert all(stage["weight_bytes"] > 0 and stage["kv_tokens"] > 0 for stage in stages)
    loads = plan["forecast"]["loads"]
    assert [load["num_sequences"] for load in loads] == [1, 8, 32, 128, 256]
    assert all(load["decode_tokens_per_s"] > 0 for load in loads)
    assert plan["forecast"]["prefill_tokens_per_s"] > 0
    assert plan["limits"]
    changes = [each["change"] for each in plan["alternatives"]]
    assert 'kv_cache_dtype = "int8"' in changes
    assert "without the last device (cpu)" in changes


def test_text_says_the_same(folder: Path) -> None:
    plan = make_plan(plan_config(folder))
    text = as_text(plan)
    assert plan.reason in text
    split = "+".join(map(str, plan.forecast.layer_split))
    (line,) = [line for line in text.splitlines() if line.strip().startswith("this plan")]
    assert split in line
    for alternative in plan.alternatives:
        assert alternative.change in text
    for limit in plan.limits:
        assert f"limited by {limit}" in text
    assert max(map(len, text.splitlines()[4:])) <= 110


def test_a_split_by_hand_is_priced(folder: Path) -> None:
    plan = make_plan(plan_config(folder, layer_split=(1, 7)))
    assert plan.forecast.layer_split == (1, 7)
    assert "% slower than" in plan.reason
    assert plan.alternatives[0].change == "layer_split left out"


@pytest.mark.parametrize("num_stages", [1, 3, 8])
def test_any_number_of_stages(num_stages: int, folder: Path) -> None:
    plan = make_plan(plan_config(folder, devices=("cpu",) * num_stages))
    assert len(plan.forecast.stages) == num_stages
    assert ("without the last device (cpu)" in as_text(plan)) == (num_stages > 1)


def test_replicas_are_planned_as_they_would_be_loaded(folder: Path) -> None:
    """The split holds for every replica, whose devices are its share of all."""
    options = {"devices": ("cpu",) * 4, "replicas": 2, "layer_split": (3, 5)}
    plan = make_plan(plan_config(folder, **options))
    assert len(plan.other_replicas) == 1
    for each in (plan, *plan.other_replicas):
        assert each.forecast.layer_split == (3, 5)
    text = as_text(plan)
    assert text.startswith("2 replicas (the options ask for it on 4 devices)")
    assert "replica 1:" in text
    (other,) = json.loads(as_json(plan))["other_replicas"]
    assert len(other["forecast"]["stages"]) == 2
    assert f"together {plan.output_tokens_per_s:.0f} output tokens/s" in text
    both = sum(each.forecast.output_tokens_per_s for each in (plan, *plan.other_replicas))
    assert plan.output_tokens_per_s == both


def test_the_layout_that_auto_would_choose_is_planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecasts = (
        LayoutForecast(num_replicas=1, output_tokens_per_s=100.0),
        LayoutForecast(num_replicas=2, output_tokens_per_s=190.0),
    )
    found = LayoutSurvey(devices=("cpu", "cpu"), forecasts=forecasts)
    monkeypatch.setattr(planning, "needs_survey", lambda config, **facts: True)
    monkeypatch.setattr(planning, "is_open", lambda config, devices: True)
    monkeypatch.setattr(planning, "survey_layouts", lambda gguf_file, config: found)
    monkeypatch.setattr(planning, "check_toolchain", lambda: None)
    plan = make_plan(plan_config(folder))
    assert len(plan.forecast.stages) == len(plan.other_replicas) == 1
    assert "2 replicas: 190 output tokens/s expected" in as_text(plan)


def test_more_threads_than_cores_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    more = make_plan(plan_config(folder, devices=("cpu",) * 3))
    assert any(limit.startswith("cores: CPU stages share 2") for limit in more.limits)
    fitting = make_plan(plan_config(folder))
    assert not any(limit.startswith("cores") for limit in fitting.limits)
    changes = [alternative.change for alternative in fitting.alternatives]
    assert not any(change.startswith("one more") for change in changes)


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="9 stages, but the model has 8 layers"):
        make_plan(plan_config(folder, devices=("cpu",) * 9))
    with pytest.raises(ConfigError, match="no cut of the 8 layers fits"):
        make_plan(plan_config(folder, memory_limit_bytes=(2**20,)))


def test_the_command_takes_the_options_of_serve(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left changed for this process: logging and Triton's folder stay as they are."""
    monkeypatch.setattr(cli, "configure_logging", lambda **options: None)
    monkeypatch.setattr(cli, "keep_kernels_in", lambda folder: None)
    options = ["--cache-dir", str(folder), "--devices", "cpu,cpu", "--layer-split", "3,5", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(folder / "tiny.gguf"), *options])
    assert ended.value.code == 0
    stages = json.loads(capsys.readouterr().out)["forecast"]["stages"]
    assert [stage["num_layers"] for stage in stages] == [3, 5]
    devices = ["--devices", "cpu,cpu,cpu,cpu", "--replicas", "2"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(folder / "tiny.gguf"), *options, *devices])
    assert ended.value.code == 0
    assert len(json.loads(capsys.readouterr().out)["other_replicas"]) == 1
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["plan", str(folder / "tiny.gguf"), *options[:-1], "--memory-limit-bytes", "1,2,3"]
        )
    assert ended.value.code == 1
    assert "memory_limit_bytes has 3 values for 2 devices" in capsys.readouterr().err
