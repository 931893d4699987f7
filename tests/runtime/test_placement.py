"""Placement: from a real file, options and measured times to stages; on CPU stages of tiny models.

Times are measured where a test says so, else they are given: no test depends on a clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, permutations
from math import prod
from pathlib import Path

import pytest
import torch

from pipeserve.bench.shapes import find_shape
from pipeserve.bench.synthetic import write_model
from pipeserve.config import Config
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from pipeserve.runtime import layer_times, partition, survey, timing_cache
from pipeserve.runtime.cost_model import Curve, DeviceTimes, LayerTimes
from pipeserve.runtime.forecast import find_alternatives, find_limits, forecast
from pipeserve.runtime.layer_times import layer_kinds, measure_device
from pipeserve.runtime.loading import plan_shares, stage_backend
from pipeserve.runtime.partition import Partition
from pipeserve.runtime.placement import Placement, best_cut, choose, place
from pipeserve.runtime.plan import first_facts, layer_ranges, plan_pipeline, step_bytes
from pipeserve.runtime.survey import Survey, survey_devices, weight_bytes
from tests.runtime.test_partition import all_splits

CPU = torch.device("cpu")
MIB = 1024**2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of two kinds, as Q4_K_M mixes them, with a tied head."""
    path = tmp_path_factory.mktemp("placement") / "tiny-q4_k_m.gguf"
    write_model(path, find_shape("tiny"), "q4_k_m")
    return path


@pytest.fixture
def file(path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(path) as gguf_file:
        yield gguf_file


def given_times(kinds: tuple[str, ...], facts: object) -> DeviceTimes:
    """Layers of the first kind take 1 ms and 0.1 ms per row, of others twice; the head 2 ms."""

    def layer(factor: float) -> LayerTimes:
        return LayerTimes(
            decode=Curve(sizes=(1, 64), seconds=(1.1e-3 * factor, 7.4e-3 * factor)),
            prefill=Curve(sizes=(256,), seconds=(20e-3 * factor,)),
        )

    return DeviceTimes(
        layers={kind: layer(1.0 + (kind != kinds[0])) for kind in kinds},
        head=Curve(sizes=(1, 64), seconds=(2e-3, 4e-3)),
        spared=Curve(sizes=(256,), seconds=(4e-3,)),
        step_s=1e-4,
    )


@pytest.fixture
def without_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(gguf_file: GGUFFile, model, device, config, facts) -> DeviceTimes:  # type: ignore[no-untyped-def]
        kinds = layer_kinds(gguf_file, model.num_layers, stage_backend(device, config))
        return given_times(kinds, facts)

    monkeypatch.setattr(survey, "_times", times)


def make_survey(
    file: GGUFFile, num_devices: int, slowdowns: list[float] | None = None, **options: object
) -> Survey:
    config = Config(**options)  # type: ignore[arg-type]
    model = check_model(file)
    return survey_devices(file, model, config, (CPU,) * num_devices, slowdowns=slowdowns)


def placed(
    file: GGUFFile, num_devices: int, slowdowns: list[float] | None = None, **options: object
) -> Placement:
    config = Config(**options)  # type: ignore[arg-type]
    return place(file, check_model(file), config, ("cpu",) * num_devices, slowdowns=slowdowns)


# --- the cut follows times and memory


@pytest.mark.parametrize("num_stages", range(1, 9))
@pytest.mark.usefixtures("without_clock")
def test_any_number_of_stages(num_stages: int, file: GGUFFile) -> None:
    placement = placed(file, num_stages)
    assert len(placement.split) == len(placement.devices) == num_stages
    assert sum(placement.split) == 8
    assert sorted(placement.order) == list(range(num_stages))
    assert (placement.reason is None) == (num_stages == 1)
    plan = plan_pipeline(check_model(file), Config(), placement.devices, placement.split)
    assert plan.facts.num_stages == num_stages
    with pytest.raises(ConfigError, match="9 stages, but the model has 8 layers"):
        placed(file, 9)


def every_cut(survey: Survey) -> list[Partition]:
    num_stages = len(survey.devices)
    costs = survey.costs(survey.facts.num_rows)
    return [
        survey.price(partition.price(costs, split, order))
        for split in all_splits(survey.model.num_layers, num_stages)
        for order in permutations(range(num_stages))
    ]


@pytest.mark.parametrize("factor", [1.5, 3.0])
@pytest.mark.parametrize("slow", [0, 1, 2])
@pytest.mark.usefixtures("without_clock")
def test_a_slowed_device_gets_its_share(factor: float, slow: int, file: GGUFFile) -> None:
    slowdowns = [factor if index == slow else 1.0 for index in range(3)]
    survey = make_survey(file, 3, slowdowns)
    best = best_cut(survey)
    assert best is not None
    assert best.slowest_s <= 1.03 * min(cut.slowest_s for cut in every_cut(survey))
    even = partition.price(survey.costs(64), (3, 3, 2))
    assert best.slowest_s < even.slowest_s
    assert placed(file, 3, slowdowns).order == best.order


def stage_limit(file: GGUFFile, *, num_layers: int, num_tokens: int) -> int:
    """Memory that just holds a middle stage of so many layers and so many tokens of KV."""
    model, config = check_model(file), Config()
    weights = weight_bytes(file, model, stage_backend(CPU, config))
    facts = first_facts(model, config, (CPU, CPU))
    kv_token_bytes = 2 * model.kv_size * 4
    kv = num_layers * num_tokens * kv_token_bytes
    return max(weights.layers) * num_layers + kv + step_bytes(model, facts, CPU)


@pytest.mark.usefixtures("without_clock")
def test_a_capped_device_gets_what_fits(file: GGUFFile) -> None:
    limits = (2**32, stage_limit(file, num_layers=2, num_tokens=2048), 2**32)
    survey = make_survey(file, 3, memory_limit_bytes=limits)
    best = best_cut(survey)
    assert best is not None
    stage = best.order.index(1)
    assert best.split[stage] <= 2
    assert 0 < stage < 2, "embedding and head are on the others"
    assert best.num_tokens >= 2048
    assert best.slowest_s <= 1.03 * min(
        cut.slowest_s for cut in every_cut(survey) if cut.num_tokens >= 2048
    )


@pytest.mark.usefixtures("without_clock")
def test_the_limit_holds_for_weights_and_kv_cache(file: GGUFFile) -> None:
    limits = (2**32, stage_limit(file, num_layers=2, num_tokens=2048), 2**32)
    config = Config(memory_limit_bytes=limits)  # type: ignore[arg-type]
    model = check_model(file)
    placement = place(file, model, config, ("cpu",) * 3)
    plan = plan_pipeline(model, config, placement.devices, placement.split, rooms=placement.rooms)
    shares = plan_shares(file, model, plan.ranges, devices=placement.devices, config=config)
    for which, share, kv_bytes in zip(placement.order, shares, plan.kv_bytes, strict=True):
        assert kv_bytes is not None
        steps = step_bytes(model, plan.facts, CPU)
        assert share.device_bytes + kv_bytes + steps <= limits[which]
    assert plan.facts.num_blocks * 16 >= 2048


@pytest.mark.usefixtures("without_clock")
def test_more_sequences_weigh_more_than_an_even_load(file: GGUFFile) -> None:
    """A cut that is even but holds a single sequence is worse than one that holds many."""
    limit = stage_limit(file, num_layers=4, num_tokens=700)
    survey = make_survey(file, 2, memory_limit_bytes=(limit, 2**34), context_length=640)
    best = best_cut(survey)
    assert best is not None
    even = next(cut for cut in every_cut(survey) if cut.split == (4, 4) and cut.order == (0, 1))
    assert survey.num_running(best) > survey.num_running(even)
    assert best.slowest_s < even.slowest_s
    assert best.slowest_s <= 1.03 * min(
        cut.slowest_s for cut in every_cut(survey) if cut.num_tokens >= 640
    )


@pytest.mark.usefixtures("without_clock")
def test_one_row_of_a_context_that_ends_within_a_block(file: GGUFFile) -> None:
    assert sum(placed(file, 2, max_num_seqs=1, context_length=250).split) == 8


# --- what is refused


@pytest.mark.usefixtures("without_clock")
@pytest.mark.parametrize(
    ("num_devices", "options", "words"),
    [
        (2, {"memory_limit_bytes": (MIB, MIB)}, "no cut of the 8 layers fits"),
        (1, {"memory_limit_bytes": (MIB, MIB)}, "memory_limit_bytes has 2 values for 1 devices"),
        (2, {"kv_cache_bytes": 1000}, "raise memory_limit_bytes or kv_cache_bytes"),
        (2, {"kv_cache_bytes": 2**30, "memory_limit_bytes": (2**30,)}, "no cut of the 8 layers"),
        (2, {"layer_split": (4, 5)}, "9 layers together"),
        (1, {"layer_split": (4, 4)}, "2 numbers for 1 devices"),
    ],
)
def test_what_cannot_be_is_refused(
    num_devices: int, options: dict[str, object], words: str, file: GGUFFile
) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(file, num_devices, **options)
    assert words in str(caught.value)


def test_a_single_stage_must_fit_its_limit(file: GGUFFile) -> None:
    config = Config(memory_limit_bytes=(MIB,))  # type: ignore[arg-type]
    model = check_model(file)
    placement = place(file, model, config, ("cpu",))
    with pytest.raises(ConfigError, match="memory_limit_bytes leaves 0 bytes"):
        plan_pipeline(model, config, placement.devices, placement.split, rooms=placement.rooms)
    config = Config(memory_limit_bytes=(2**30,), kv_cache_bytes=2**30)  # type: ignore[arg-type]
    placement = place(file, model, config, ("cpu",))
    with pytest.raises(ConfigError, match="but kv_cache_bytes asks for 1073741824"):
        plan_pipeline(model, config, placement.devices, placement.split, rooms=placement.rooms)


# --- the user's own split


@pytest.mark.usefixtures("without_clock")
def test_a_split_by_hand_is_kept_and_priced(file: GGUFFile) -> None:
    slowdowns = [1.0, 3.0]
    placement = placed(file, 2, slowdowns, layer_split=(2, 6))
    assert (placement.split, placement.order) == ((2, 6), (0, 1))
    survey = make_survey(file, 2, slowdowns)
    own, best = choose(survey, Config(layer_split=(2, 6)))
    assert best is not None
    slower = own.slowest_s / best.slowest_s - 1
    assert placement.reason is not None
    assert f"{slower:.0%} slower than {' + '.join(map(str, best.split))} layers" in placement.reason
    assert "as fast as in any cut" in (placed(file, 2, layer_split=best.split).reason or "") or (
        best.order != (0, 1)
    )


# --- forecast


@pytest.mark.usefixtures("without_clock")
def test_a_forecast_agrees_with_its_cut(file: GGUFFile) -> None:
    survey = make_survey(file, 2)
    cut = best_cut(survey)
    assert cut is not None
    expected = forecast(survey, cut)
    assert expected.layer_split == cut.split
    assert max(stage.busy for stage in expected.stages) == 1.0
    assert expected.output_tokens_per_s == pytest.approx(1 / cut.slowest_s)
    rates = [load.decode_tokens_per_s for load in expected.loads]
    assert rates == sorted(rates)
    assert [load.num_running for load in expected.loads] == [1, 8, 32, 64, 64]
    assert any("is the slowest" in limit for limit in find_limits(survey, cut))


@pytest.mark.usefixtures("without_clock")
def test_short_memory_is_named_and_int8_helps(file: GGUFFile) -> None:
    survey = make_survey(file, 2, kv_cache_bytes=8 * MIB)
    cut = best_cut(survey)
    assert cut is not None
    expected = forecast(survey, cut)
    assert expected.loads[-1].num_running < 64
    assert any("memory: the KV cache of stage" in limit for limit in find_limits(survey, cut))
    by_change = {each.change: each.forecast for each in find_alternatives(survey, cut)}
    int8 = by_change['kv_cache_dtype = "int8"']
    assert int8.kv_tokens > 3 * expected.kv_tokens
    assert int8.loads[-1].num_running > expected.loads[-1].num_running
    fewer = by_change["without the last device (cpu)"]
    assert fewer.layer_split == (8,)
    assert fewer.output_tokens_per_s < expected.output_tokens_per_s


@pytest.mark.usefixtures("without_clock")
@pytest.mark.parametrize(
    ("options", "rows"), [({}, (256, 512, 768)), ({"max_num_seqs": 64}, (64,) * 3)]
)
def test_cards_bring_their_rows_unless_the_options_say_how_many(
    options: dict[str, int], rows: tuple[int, ...], file: GGUFFile
) -> None:
    made = make_survey(file, 2, **options)
    cards = tuple(
        replace(each, device=torch.device("cuda", index), kv_bytes=2**34)
        for index, each in enumerate(made.devices)
    )
    facts = replace(made.facts, num_rows=rows[1], max_batch_tokens=max(256, rows[1]))
    survey = replace(made, devices=cards, facts=facts)
    cut = best_cut(survey)
    assert cut is not None
    context = survey.facts.context_length
    assert forecast(survey, cut).kv_tokens == rows[1] * context
    by_change = {each.change: each.forecast for each in find_alternatives(survey, cut)}
    assert by_change["without the last device (cuda:1)"].kv_tokens == rows[0] * context
    more = by_change["one more device like the last (cuda:1)"]
    assert more.kv_tokens == rows[2] * context


# --- weights


@pytest.mark.parametrize("weights", ["quantised", "fp8"])
def test_weights_are_counted_as_stages_load_them(weights: str, file: GGUFFile) -> None:
    model, config = check_model(file), Config(weights=weights)  # type: ignore[arg-type]
    counted = weight_bytes(file, model, stage_backend(CPU, config))
    for split in [(8,), (3, 5), (1, 6, 1)]:
        ranges = layer_ranges(split)
        shares = plan_shares(file, model, ranges, devices=(CPU,) * len(split), config=config)
        for share, (first, end) in zip(
            shares, pairwise((0, *(sum(split[: i + 1]) for i in range(len(split))))), strict=True
        ):
            expected = sum(counted.layers[first:end])
            expected += counted.embedding * (first == 0) + counted.head * (end == 8)
            expected -= counted.shared * (first == 0 and end == 8)
            assert share.device_bytes == expected
    embedding = prod(file.tensors["token_embd.weight"].shape) * 4
    assert counted.embedding == counted.shared == embedding


# --- measuring, and what is kept of it


def test_every_kind_of_layer_is_measured(file: GGUFFile) -> None:
    model, config = check_model(file), Config()
    kinds = layer_kinds(file, model.num_layers, stage_backend(CPU, config))
    assert len(set(kinds)) == 2
    facts = first_facts(model, config, (CPU, CPU))
    times = measure_device(file, model, CPU, config=config, facts=facts)
    assert times.layers.keys() == set(kinds)
    curves = [times.head, *(own.decode for own in times.layers.values())]
    for curve in curves:
        assert curve.sizes == (1, 8, 64)
        assert min(curve.seconds) > 0
    assert all(own.prefill.sizes == (256,) for own in times.layers.values())
    assert all(own.prefill.seconds[0] > 0 for own in times.layers.values())
    assert times.step_s >= 0


@pytest.mark.parametrize(
    ("num_rows", "context_length", "num_tokens"),
    [(1, 1024, 512), (2, 1024, 1024), (3, 1024, 1200), (2, 100, 200), (64, 100, 1200)],
)
def test_a_prefill_step_is_timed_under_the_tokens_that_it_has(
    num_rows: int, context_length: int, num_tokens: int, file: GGUFFile
) -> None:
    """Of a few rows, not under those that the options allow."""
    model = check_model(file)
    config = Config(
        max_num_seqs=num_rows, max_num_batched_tokens=1200, context_length=context_length
    )
    facts = first_facts(model, config, (CPU,))
    trial = layer_times._Trial(file, model, CPU, config, facts)
    assert trial._sizes.chunk_tokens == trial._prefill_batch().num_tokens == num_tokens


def test_threads_are_those_of_a_stage_while_measuring(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(layer_times._Trial, "measure", lambda trial: seen.append(-1))
    model, config = check_model(file), Config(threads_per_stage=3)
    facts = first_facts(model, config, (CPU,))
    measure_device(file, model, CPU, config=config, facts=facts)
    assert seen == [3, -1, before]


@pytest.fixture
def kept_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a card's are."""
    monkeypatch.setattr(survey, "are_kept", lambda device: True)


def test_times_of_a_cpu_are_not_kept(file: GGUFFile, tmp_path: Path) -> None:
    make_survey(file, 2, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("kept_times")
def test_times_are_kept_and_used_again(
    file: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_survey(file, 2, cache_dir=tmp_path)
    (kept,) = (tmp_path / "timings").iterdir()

    def fail(*arguments: object, **options: object) -> DeviceTimes:
        raise AssertionError("measured again")

    monkeypatch.setattr(survey, "measure_device", fail)
    assert make_survey(file, 3, cache_dir=tmp_path).devices[0].times == first.devices[0].times
    for changes in ({"max_num_seqs": 3}, {"kv_cache_dtype": "int8"}, {"threads_per_stage": 2}):
        with pytest.raises(AssertionError, match="measured again"):
            make_survey(file, 2, cache_dir=tmp_path, **changes)
    monkeypatch.setattr(timing_cache, "device_name", lambda device: "another")
    with pytest.raises(AssertionError, match="measured again"):
        make_survey(file, 2, cache_dir=tmp_path)
    assert list((tmp_path / "timings").iterdir()) == [kept]


@pytest.mark.usefixtures("kept_times")
@pytest.mark.parametrize("damage", ["truncated", "of another key", "without times", "no JSON"])
def test_a_broken_file_is_measured_and_written_again(
    damage: str, file: GGUFFile, tmp_path: Path
) -> None:
    make_survey(file, 2, cache_dir=tmp_path)
    (kept,) = (tmp_path / "timings").iterdir()
    whole = json.loads(kept.read_text())
    broken = {
        "truncated": kept.read_text()[:100],
        "of another key": json.dumps(whole | {"key": {"device": "another"}}),
        "without times": json.dumps(whole | {"times": {"layers": {}}}),
        "no JSON": "\x00" * 50,
    }
    kept.write_text(broken[damage])
    make_survey(file, 2, cache_dir=tmp_path)
    again = json.loads(kept.read_text())
    assert again["key"] == whole["key"]
    assert again["times"]["layers"].keys() == whole["times"]["layers"].keys()
    assert list((tmp_path / "timings").iterdir()) == [kept]


@pytest.mark.usefixtures("kept_times")
def test_a_cache_that_cannot_be_written_is_done_without(file: GGUFFile, tmp_path: Path) -> None:
    (tmp_path / "timings").write_text("a file where the folder should be")
    assert make_survey(file, 2, cache_dir=tmp_path).devices[0].times.head.seconds[0] > 0


def test_one_layer_of_a_model_is_measured_too(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind with a single layer is counted twice, the first layer with its embedding left out."""
    monkeypatch.setattr(layer_times, "layer_kinds", lambda *_: tuple("abcdefgh"))
    with GGUFFile.open(path) as file:
        model, config = check_model(file), Config()
        facts = first_facts(model, config, (CPU,))
        times = measure_device(file, model, CPU, config=config, facts=facts)
    assert times.layers.keys() == set("abcdefgh")
