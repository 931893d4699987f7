"""Cost models from recorded runs: known costs are found again, and another load is foretold."""

from __future__ import annotations

import zlib
from dataclasses import asdict, astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeserve.bench import arrivals, schedule_report
from pipeserve.bench.arrivals import Lengths, Shape
from pipeserve.bench.engine import measure
from pipeserve.bench.schedule import MEASURED, Options, run
from pipeserve.bench.schedule_costs import CostModel, StageCosts
from pipeserve.bench.schedule_figures import make_figures
from pipeserve.bench.schedule_fit import fit_costs, solve_non_negative
from pipeserve.bench.schedule_policy import SimulatedPolicy
from pipeserve.bench.schedule_record import RecordedRun, append_run, read_runs
from pipeserve.bench.schedule_run import Run, StepWork
from pipeserve.bench.schedule_simulator import simulate
from pipeserve.bench.shapes import find_shape
from pipeserve.bench.synthetic import provide_model
from pipeserve.bench.workload import make_workload
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.engine.scheduler import Scheduler
from pipeserve.errors import ConfigError
from tests.fakes import facts

TRUTH = CostModel(
    stages=(
        StageCosts(
            step_s=2e-3,
            row_s=5e-5,
            prefill_token_s=3e-5,
            kv_position_s=4e-7,
            prefill_pair_s=2e-8,
            prefill_step_s=1e-3,
        ),
        StageCosts(step_s=3e-3, row_s=9e-5, prefill_token_s=2e-5, kv_position_s=2e-7),
    ),
    handoff_s=5e-5,
    host_s=4e-4,
)


def some_facts() -> PipelineFacts:
    return facts(num_rows=64, num_blocks=8192, context_length=2048, max_batch_tokens=512)


def made_up(num_clients: int, costs: CostModel, prompt: str = "32-512") -> RecordedRun:
    shape = Shape(
        num_requests=4 * num_clients, prompt=Lengths.parse(prompt), output=Lengths.parse("16-64")
    )
    trace = arrivals.clients(num_clients, shape)
    return RecordedRun(
        about=f"{num_clients} clients",
        facts=some_facts(),
        run=simulate(trace, SimulatedPolicy(Scheduler(some_facts())), costs),
    )


class RealStage(StageCosts):
    """As a device is: rows are computed in fours, and no step takes quite what the last took."""

    def time_s(self, work: StepWork) -> float:
        padded = replace(work, num_rows=-(-work.num_rows // 4) * 4)
        noise = zlib.crc32(repr(work).encode()) / 2**32 - 0.5
        return super().time_s(padded) * (1 + 0.2 * noise)


def real(costs: StageCosts) -> StageCosts:
    return RealStage(**asdict(costs))


def test_known_costs_are_found_again() -> None:
    fit = fit_costs([made_up(8, TRUTH).run, made_up(3, TRUTH).run])
    for found, true in zip(fit.costs.stages, TRUTH.stages, strict=True):
        assert astuple(found) == pytest.approx(astuple(true), rel=1e-6, abs=1e-12)
    assert fit.costs.handoff_s == pytest.approx(TRUTH.handoff_s)
    assert fit.costs.host_s == pytest.approx(TRUTH.host_s)
    assert max(fit.stage_errors) < 1e-9


@given(
    st.lists(st.tuples(*[st.floats(0, 10)] * 3, st.floats(-5, 20)), min_size=3, max_size=12).filter(
        lambda rows: np.linalg.cond(np.array(rows)[:, :3]) < 1e3
    )
)
@settings(max_examples=100, deadline=None)
def test_no_non_negative_costs_fit_better(rows: list[tuple[float, ...]]) -> None:
    """By the conditions of Karush, Kuhn and Tucker, which only the best solution meets."""
    table = np.array(rows)
    matrix, target = table[:, :3], table[:, 3]
    found = solve_non_negative(matrix, target)
    slope = matrix.T @ (matrix @ found - target)
    # A column that lowers the error by less than 1e-9 of it is left out: its slope is at most
    # sqrt(2e-9) times its length and the error's.
    lengths = np.linalg.norm(matrix, axis=0)
    tolerance = 1e-5 + 1e-4 * lengths.max() * np.linalg.norm(target)
    assert (found >= 0).all()
    assert (slope >= -tolerance).all()
    assert np.abs(slope[found > 0]).max(initial=0.0) <= tolerance


@pytest.mark.parametrize(("fitted", "foretold"), [(12, 40), (40, 12), (24, 6)])
def test_another_load_of_a_noisy_pipeline_is_foretold(
    fitted: int, foretold: int, tmp_path: Path
) -> None:
    pipeline = replace(TRUTH, stages=tuple(map(real, TRUTH.stages)))
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    append_run(one, made_up(fitted, pipeline))
    append_run(other, made_up(foretold, pipeline, prompt="64-256"))
    result = run(Options(fit=one, replay=other, policies="ours"))
    measured, predicted = (case.figures for case in result.cases)
    assert [case.policy for case in result.cases] == [MEASURED, "ours"]
    assert predicted.total_tokens_per_s == pytest.approx(measured.total_tokens_per_s, rel=0.1)
    assert predicted.ttft_p50_ms == pytest.approx(measured.ttft_p50_ms, rel=0.2)
    assert "ours against measured: total" in schedule_report.as_text(result)


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    written = [made_up(2, TRUTH), made_up(3, TRUTH)]
    for each in written:
        append_run(path, each)
    for found, expected in zip(read_runs(path), written, strict=True):
        assert (found.about, found.facts) == (expected.about, expected.facts)
        figures, again = make_figures(expected.run), make_figures(found.run)
        assert again.total_tokens_per_s == pytest.approx(figures.total_tokens_per_s)
        assert again.itl_p99_ms == pytest.approx(figures.itl_p99_ms, rel=1e-4)
        assert [step.work for step in found.run.steps] == [step.work for step in expected.run.steps]


@pytest.mark.parametrize("text", ["", "{", '{"kind": "step"}', '{"kind": "run"}', "[]"])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"runs.jsonl is not a record of this version"):
        read_runs(path)


def test_a_run_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, made_up(2, TRUTH))
    lines = path.read_text().splitlines(keepends=True)
    num_requests = sum('"kind":"request"' in line for line in lines)
    for num_left in (1, 1 + num_requests, len(lines) // 2):
        path.write_text("".join(lines[:num_left]))
        with pytest.raises(ConfigError, match="some requests or their tokens are missing"):
            read_runs(path)


def test_a_record_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    workload = make_workload(
        prompt=Lengths.parse("1"),
        output=Lengths.parse("1"),
        batches=(1,),
        num_clients=None,
        num_requests=None,
    )
    with pytest.raises(ConfigError, match=r"cannot write the record .*runs\.jsonl: No such"):
        measure(
            Config(model=str(tmp_path / "no model")),
            workload,
            on_run=lambda figures: None,
            record=tmp_path / "no folder" / "runs.jsonl",
        )


def test_a_fit_needs_steps_of_one_pipeline() -> None:
    short = replace(made_up(2, TRUTH).run, steps=[])
    with pytest.raises(ConfigError, match="there are 0 steps and 1 numbers of stages"):
        fit_costs([short])
    single = replace(TRUTH, stages=TRUTH.stages[:1])
    with pytest.raises(ConfigError, match="2 numbers of stages"):
        fit_costs([made_up(2, TRUTH).run, made_up(2, single).run])


def test_the_engine_benchmark_records_its_runs(tmp_path: Path) -> None:
    path = provide_model("tiny", find_shape("tiny"), "q4_k_m", folder=tmp_path)
    record = tmp_path / "runs.jsonl"
    workload = make_workload(
        prompt=Lengths.parse("20"),
        output=Lengths.parse("5"),
        batches=(1,),
        num_clients=2,
        num_requests=6,
    )
    config = Config(model=str(path), devices=("cpu", "cpu"), cache_dir=tmp_path)
    result = measure(config, workload, on_run=lambda figures: None, record=record)
    (recorded,) = read_runs(record)
    assert recorded.about == (
        "tiny-q4_k_m.gguf on cpu, cpu, 2 clients, 20 prompt + 5 output tokens"
    )
    assert recorded.facts == result.facts
    check_recorded_run(recorded.run)
    figures = make_figures(recorded.run)
    assert figures.ttft_p50_ms == pytest.approx(result.runs[0].ttft_p50_ms, rel=1e-3)
    assert figures.itl_p50_ms == pytest.approx(result.runs[0].itl_p50_ms, rel=1e-3)
    replayed = run(Options(fit=record, replay=record, policies="ours"))
    assert [case.figures.num_requests for case in replayed.cases] == [6, 6]


def check_recorded_run(recorded: Run) -> None:
    """Two clients, six requests of 20 + 5 tokens."""
    assert recorded.trace.num_clients == 2
    assert sorted(recorded.submitted_s) == list(range(6))
    assert recorded.submitted_s[0] == recorded.submitted_s[1] == 0.0
    assert sum(step.work.num_prefill_tokens for step in recorded.steps) == 6 * 20
    assert sum(step.work.num_decode_rows for step in recorded.steps) == 6 * 4
    assert sum(step.work.num_rows for step in recorded.steps) == 6 * 5
    assert sum(len(tokens.seq_ids) for tokens in recorded.tokens) == 6 * 5
    for step in recorded.steps:
        assert 0 <= step.submitted_s <= step.spans[0].start_s
        assert step.spans[0].end_s <= step.spans[1].start_s
