"""`pipeserve bench schedule`: stages in virtual time, their figures, and what the scheduler gains.

Nothing here looks at a clock: every time is computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeserve.bench import arrivals
from pipeserve.bench.arrivals import Lengths, Request, Shape, Trace
from pipeserve.bench.policies import POLICIES
from pipeserve.bench.schedule import DEFAULT_FACTS, Options, run
from pipeserve.bench.schedule_costs import H200_8B, CostModel, StageCosts, parse_costs, split_costs
from pipeserve.bench.schedule_figures import (
    ScheduleFigures,
    bound_tokens_per_s,
    make_figures,
)
from pipeserve.bench.schedule_policy import SimulatedPolicy
from pipeserve.bench.schedule_run import Run, StepWork, row_work, total_work
from pipeserve.bench.schedule_simulator import simulate
from pipeserve.cli import main
from pipeserve.core.batch import PipelineFacts
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.errors import ConfigError
from tests.fakes import facts

SECOND = StageCosts(step_s=1.0, row_s=0.0, prefill_token_s=0.0, kv_position_s=0.0)
"""Every step takes a second on every stage, whatever it computes."""


def costs_of(*stages: StageCosts, handoff_s: float = 0.0, host_s: float = 0.0) -> CostModel:
    return CostModel(stages=stages, handoff_s=handoff_s, host_s=host_s)


def request(arrival_s: float, prompt: int, output: int) -> Request:
    return Request(arrival_s=arrival_s, num_prompt_tokens=prompt, num_output_tokens=output)


def run_policy(trace: Trace, policy: str, costs: CostModel, pipeline: PipelineFacts) -> Run:
    scheduler = POLICIES[policy](pipeline, AdmissionPolicy())
    return simulate(trace, SimulatedPolicy(scheduler), costs)


def simulated(trace: Trace, policy: str, costs: CostModel, **changes: int) -> Run:
    return run_policy(trace, policy, costs, facts(num_stages=len(costs.stages), **changes))


# Stages in virtual time


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_lone_sequence_passes_stage_after_stage(policy: str) -> None:
    costs = costs_of(SECOND, SECOND.scaled(2.0), handoff_s=0.1, host_s=0.25)
    result = simulated(Trace(requests=(request(5.0, 4, 2),)), policy, costs)
    assert result.submitted_s == {0: 5.0}
    prefill, decode = result.steps
    # Submitted at 5, hand-offs of 0.1 to either stage.
    assert [(s.start_s, s.end_s) for s in prefill.spans] == [
        (pytest.approx(5.1), pytest.approx(6.1)),
        (pytest.approx(6.2), pytest.approx(8.2)),
    ]
    assert [tokens.seq_ids for tokens in result.tokens] == [(0,), (0,)]
    assert result.tokens[0].time_s == pytest.approx(8.2 + 0.25)
    # Our decode step was queued ahead and waits for its token; the plain one is submitted with it.
    waits_for_host_s = 0.25 if policy in {"plain", "no-look-ahead"} else 0.0
    assert decode.spans[0].start_s == pytest.approx(8.2 + waits_for_host_s + 0.1)
    assert decode.work == StepWork(
        num_decode_rows=1,
        num_rows=1,
        num_prefill_tokens=0,
        num_kv_positions=5,
        num_prefill_pairs=0,
    )


def test_one_stage_keeps_its_tokens_without_a_hand_off() -> None:
    costs = costs_of(SECOND, handoff_s=0.1)
    result = simulated(Trace(requests=(request(0.0, 4, 3),)), "ours", costs)
    assert [step.spans[0].start_s for step in result.steps] == [
        pytest.approx(0.1 + index) for index in range(3)
    ]


def test_clients_submit_when_their_last_request_has_ended() -> None:
    requests = tuple(request(99.0, 4, 1) for _ in range(4))  # a client does not look at arrivals
    trace = Trace(requests=requests, num_clients=1)
    result = simulated(trace, "ours", costs_of(SECOND, SECOND))
    assert result.submitted_s == {index: 2.0 * index for index in range(4)}


def test_costs_count_every_kind_of_work() -> None:
    costs = StageCosts(
        step_s=1.0, row_s=10.0, prefill_token_s=100.0, kv_position_s=1e3, prefill_pair_s=1e4
    )
    chunk = row_work(first_position=2, num_tokens=3, samples=False, is_decode=False)
    decode = row_work(first_position=6, num_tokens=1, samples=True, is_decode=True)
    # Tokens at 2, 3, 4 attend to 3, 4 and 5 positions.
    assert chunk.num_prefill_pairs == 12
    assert costs.time_s(total_work([chunk, decode])) == 1 + 10 + 300 + (5 + 7) * 1e3 + 12e4
    assert costs.scaled(2.0).time_s(chunk) == 2 * costs.time_s(chunk)


ANY_COSTS = st.builds(
    StageCosts,
    step_s=st.floats(0.1, 2.0),
    row_s=st.floats(0.0, 0.1),
    prefill_token_s=st.floats(0.0, 0.1),
    kv_position_s=st.floats(0.0, 0.01),
)
ANY_REQUEST = st.builds(request, st.floats(0.0, 20.0), st.integers(1, 40), st.integers(1, 12))


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    stages=st.lists(ANY_COSTS, min_size=1, max_size=4),
    requests=st.lists(ANY_REQUEST, min_size=1, max_size=20),
    num_clients=st.none() | st.integers(1, 20),
    num_blocks=st.integers(32, 64),
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_stages_and_tokens_keep_their_order(
    policy: str,
    stages: list[StageCosts],
    requests: list[Request],
    num_clients: int | None,
    num_blocks: int,
) -> None:
    if num_clients is not None:
        num_clients = min(num_clients, len(requests))
    trace = Trace(requests=tuple(requests), num_clients=num_clients)
    costs = costs_of(*stages, handoff_s=0.01, host_s=0.02)
    result = simulated(trace, policy, costs, num_blocks=num_blocks)
    for stage in range(len(stages)):
        spans = [step.spans[stage] for step in result.steps]
        assert all(one.end_s <= other.start_s for one, other in pairwise(spans))
    for step in result.steps:
        assert step.submitted_s < step.spans[0].start_s
        assert all(one.end_s < other.start_s for one, other in pairwise(step.spans))
    counts = dict.fromkeys(range(len(requests)), 0)
    for tokens in result.tokens:
        for seq_id in tokens.seq_ids:
            assert tokens.time_s > result.submitted_s[seq_id]
            counts[seq_id] += 1
    assert counts == {index: each.num_output_tokens for index, each in enumerate(requests)}
    figures = make_figures(result, costs=costs)
    for busy, bubble in zip(figures.stage_busy, figures.stage_bubble, strict=True):
        assert 0 <= busy <= 1 + 1e-9
        assert 0 <= bubble <= 1 + 1e-9


def test_the_same_trace_gives_the_same_run() -> None:
    shape = Shape(num_requests=50, prompt=Lengths.parse("4-40"), output=Lengths.parse("2,9"))
    costs = costs_of(SECOND, SECOND)
    runs = [simulated(arrivals.poisson(0.2, shape), "ours", costs) for _ in range(2)]
    assert runs[0] == runs[1]


# Figures


def test_figures_of_a_run_that_can_be_counted_by_hand() -> None:
    # Two requests, two stages of one second; the second comes when all is idle.
    trace = Trace(requests=(request(0.0, 4, 1), request(10.0, 4, 2)))
    figures = make_figures(simulated(trace, "ours", costs_of(SECOND, SECOND)))
    assert figures.duration_s == pytest.approx(14.0)
    assert figures.total_tokens_per_s == pytest.approx(11 / 14)
    assert (figures.ttft_p50_ms, figures.itl_p50_ms) == (pytest.approx(2e3), pytest.approx(2e3))
    # From 0 to 10 the first request takes two seconds, one on each stage; then nobody waits.
    assert figures.stage_busy == (pytest.approx(0.1), pytest.approx(0.1))
    assert figures.stage_bubble == (pytest.approx(0.1), pytest.approx(0.1))
    assert figures.output_tokens_per_s == pytest.approx(1 / 10)
    assert figures.steady_tokens_per_s == pytest.approx(5 / 10)
    assert figures.bound_tokens_per_s is None


def test_the_bound_is_the_slowest_stages_work() -> None:
    trace = Trace(requests=(request(0.0, 4, 3),) * 4, num_clients=4)
    slow = StageCosts(step_s=1.0, row_s=0.5, prefill_token_s=0.25, kv_position_s=0.0)
    # 8 decode rows in steps of 2 are 4 steps; 12 rows sample; 16 prompt tokens.
    assert bound_tokens_per_s(trace, costs_of(SECOND.scaled(0.1), slow)) == pytest.approx(
        28 / (4 * 1.0 + 12 * 0.5 + 16 * 0.25)
    )


# Arrivals


def test_lengths_are_one_number_some_or_a_range() -> None:
    def drawn(text: str) -> list[int]:
        shape = Shape(num_requests=400, prompt=Lengths.parse(text), output=Lengths.parse("1"))
        return [each.num_prompt_tokens for each in arrivals.clients(2, shape).requests]

    assert set(drawn("7")) == {7}
    assert set(drawn("7, 9")) == {7, 9}
    ranged = drawn("16-1024")
    assert 16 <= min(ranged) < 32
    assert 512 < max(ranged) <= 1024
    # Log-uniform: as many below the geometric middle as above it.
    assert 160 < sum(length < 128 for length in ranged) < 240


@pytest.mark.parametrize("text", ["", "0", "-5", "5-", "1-2-3", "a", "4,0"])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"length is .*give a number above 0"):
        Lengths.parse(text)


def test_arrivals_come_at_their_rate_or_in_bursts() -> None:
    shape = Shape(num_requests=2000, prompt=Lengths.parse("1"), output=Lengths.parse("1"))
    poisson_s = [each.arrival_s for each in arrivals.poisson(50.0, shape).requests]
    assert poisson_s == sorted(poisson_s)
    assert poisson_s[-1] == pytest.approx(2000 / 50.0, rel=0.1)
    few = Shape(num_requests=5, prompt=Lengths.parse("1"), output=Lengths.parse("1"))
    bursts_s = [each.arrival_s for each in arrivals.bursts(2, 1.5, few).requests]
    assert bursts_s == [0.0, 0.0, 1.5, 1.5, 3.0]


def test_a_trace_file_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival_s": 2, "prompt_tokens": 8, "output_tokens": 3, "key": "a", "priority": -1}\n'
        '\n{"arrival_s": 0.5, "prompt_tokens": 9, "output_tokens": 4}\n'
    )
    assert arrivals.read_trace(path).requests == (
        request(0.5, 9, 4),
        Request(arrival_s=2.0, num_prompt_tokens=8, num_output_tokens=3, key="a", priority=-1),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"trace.jsonl:1: .*a line is like"),
        ('{"arrival_s": 1}', r":1: KeyError\('prompt_tokens'\)"),
        ("[1, 2]", ":1: "),
        ('{"arrival_s": -1, "prompt_tokens": 1, "output_tokens": 1}', r"arrival_s is -1\.0"),
        ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens 0"),
        ('{"arrival_s": 0, "prompt_tokens": 1e999, "output_tokens": 1}', ":1: OverflowError"),
        ("", "has no request"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        arrivals.read_trace(path)


# The command


def test_the_command_prints_every_figure_and_draws_the_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "stages.svg"
    arguments = ["bench", "schedule", "--clients", "4", "--prompt", "32,64", "--output", "8"]
    arguments += ["--split", "1,2,1", "--costs", "1000,10,5,0.01,0.001"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--timeline", str(picture)])
    printed = capsys.readouterr().out
    assert "4 clients, 32,64 prompt + 8 output tokens" in printed
    for word in ("ours", "plain", "busy", "bubble", "TTFT"):
        assert word in printed
    root = ElementTree.fromstring(picture.read_text())
    lanes = [text.text for text in root.iter() if (text.text or "").startswith("stage ")]
    assert lanes == ["stage 0", "stage 1", "stage 2"]

    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert [run["policy"] for run in values["runs"]] == ["ours", "plain"]
    assert values["costs"]["stages"][1]["step_s"] == pytest.approx(500e-6)
    for figures in values["runs"]:
        assert len(figures["stage_busy"]) == len(figures["stage_bubble"]) == 3
        assert figures["ttft_p99_ms"] >= figures["ttft_p50_ms"] > 0
        assert figures["itl_p99_ms"] >= figures["itl_p50_ms"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(clients=4, requests=5), "requests is 5 and clients 4"),
        (Options(clients=4, policies="ours,best"), "'best'; the known are ours, no-balancing, "),
        (Options(poisson=0.0), r"poisson is 0\.0"),
        (Options(bursts="8"), "bursts is '8'"),
        (Options(bursts="0/1"), "bursts is '0/1'"),
        (Options(clients=4, costs="1,2"), "costs is '1,2'"),
        (Options(clients=4, costs="1,2,3,-4"), "costs is '1,2,3,-4'"),
        (Options(clients=4, costs="0,0,0,0"), "costs is '0,0,0,0'"),
        (Options(clients=4, kv_tokens=512), "a request has 640 tokens and the KV cache holds 512"),
        (Options(trace=Path("nowhere")), "cannot read the trace nowhere"),
        (Options(replay=Path("nowhere")), "cannot read the record nowhere"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(options)


def test_costs_are_the_whole_models_and_split_over_the_stages() -> None:
    assert parse_costs("4,3,2,1").step_s == pytest.approx(4e-6)
    costs = split_costs(parse_costs("4,3,2,1"), (3, 1))
    assert [stage.row_s for stage in costs.stages] == [
        pytest.approx(2.25e-6),
        pytest.approx(0.75e-6),
    ]


def test_the_simulator_runs_without_torch() -> None:
    script = (
        "import sys; from pipeserve.bench import schedule, schedule_report\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# What the scheduler gains, on the costs of an 8B model


@cache  # tests compare the same runs
def steady(policy: str, split: tuple[int, ...]) -> ScheduleFigures:
    """64 clients for each stage, 512 tokens of prompt and 64 to 256 of output."""
    costs = split_costs(H200_8B, split)
    num_clients = 64 * len(split)
    shape = Shape(
        num_requests=6 * num_clients, prompt=Lengths.parse("512"), output=Lengths.parse("64-256")
    )
    trace = arrivals.clients(num_clients, shape)
    pipeline = replace(DEFAULT_FACTS, num_stages=len(split), num_blocks=65536, context_length=1024)
    return make_figures(run_policy(trace, policy, costs, pipeline), costs=costs)


@pytest.mark.parametrize("split", [(1, 1), (1, 1, 1, 1)])
def test_equal_stages_are_busy(split: tuple[int, ...]) -> None:
    figures = steady("ours", split)
    assert min(figures.stage_busy) >= 0.95
    assert figures.bound_tokens_per_s is not None
    assert figures.steady_tokens_per_s >= 0.93 * figures.bound_tokens_per_s


@pytest.mark.parametrize("split", [(1, 1), (1, 1, 1, 1)])
def test_equal_stages_do_more_than_under_the_plain_policy(split: tuple[int, ...]) -> None:
    ours, plain = steady("ours", split), steady("plain", split)
    assert ours.steady_tokens_per_s >= 1.2 * plain.steady_tokens_per_s
    assert ours.itl_p99_ms is not None
    assert plain.itl_p99_ms is not None
    assert ours.itl_p99_ms <= 0.75 * plain.itl_p99_ms


@pytest.mark.parametrize("split", [(3, 2), (2, 3, 3, 2)])
def test_uneven_stages_are_as_fast_as_the_slowest_allows(split: tuple[int, ...]) -> None:
    figures = steady("ours", split)
    assert max(figures.stage_busy) >= 0.97
