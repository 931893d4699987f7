"""Policies with a part left out, and the plain one: what they do otherwise, and that ids are right.

The same objects schedule on fake stages, in the simulator and on real stages.
"""

from __future__ import annotations

import json
import queue
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeserve.bench import arrivals
from pipeserve.bench.arrivals import Lengths, Request, Shape, Trace
from pipeserve.bench.numbered import Numbered
from pipeserve.bench.plain_scheduler import PlainScheduler
from pipeserve.bench.policies import OURS, POLICIES, choose_policies
from pipeserve.bench.policy_loads import (
    LOADS,
    choose_loads,
    limit_facts,
    longest_sequence,
    make_workload,
    shorten,
)
from pipeserve.bench.prediction import Prediction, foretell
from pipeserve.bench.recording import Moment, Recorder, Recording, Step
from pipeserve.bench.schedule_costs import H200_8B, split_costs
from pipeserve.bench.schedule_figures import make_figures
from pipeserve.bench.schedule_policy import SimulatedPolicy
from pipeserve.bench.schedule_record import RecordedRun, append_run, read_runs
from pipeserve.bench.schedule_run import Run
from pipeserve.bench.schedule_simulator import simulate
from pipeserve.bench.timeline import WatchedPipeline
from pipeserve.bench.workload import Clients, Poisson, Workload
from pipeserve.cli import main
from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.attention_cost import AttentionCost, StepWork
from pipeserve.engine.cohorts import Cohorts
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.late_rows import LateRows
from pipeserve.engine.messages import EngineMessage, Shutdown, Submit, TokenEvents
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.prefill_budget import PrefillBudget
from pipeserve.engine.scheduler import Scheduler
from pipeserve.errors import ConfigError
from tests.engine.scheduling import fill, run_step, sequence
from tests.fakes import FakePipeline, FakeStages, expected_tokens, facts

POLICY = AdmissionPolicy()


def scheduler_of(policy: str, **changes: int) -> Scheduler:
    return POLICIES[policy](facts(**changes), POLICY)


# On fake stages


def submissions(num: int, first_id: int = 0) -> list[Submit]:
    """Prompts of 5 to 29 tokens that begin alike, 3 to 12 tokens of output."""
    return [
        Submit(
            seq_id=first_id + index,
            prompt_token_ids=(*range(4), *range(index, index + 1 + 5 * (index % 6))),
            sampling=SamplingParams(max_tokens=3 + index % 10, seed=index),
        )
        for index in range(num)
    ]


def generated(pipeline: WatchedPipeline, inbox: Inbox, policy: str, num: int) -> None:
    """Check every token of a crowd, under the policy."""
    wanted = {each.seq_id: each for each in submissions(num)}
    token_ids: dict[int, list[int]] = {seq_id: [] for seq_id in wanted}
    num_left = num
    is_done = threading.Event()

    def post(message: EngineMessage) -> None:
        nonlocal num_left
        assert isinstance(message, TokenEvents), message
        for seq_id, token_id in zip(message.seq_ids, message.token_ids, strict=True):
            token_ids[seq_id].append(token_id)
        num_left -= sum(reason is not None for reason in message.finish_reasons)
        if num_left == 0:
            is_done.set()

    engine = Engine(
        pipeline=pipeline,
        inbox=inbox,
        post=post,
        stage_timeout_s=60.0,
        scheduler=POLICIES[policy](pipeline.facts, POLICY),
    )
    engine.start()
    for each in wanted.values():
        inbox.put(each)
    assert is_done.wait(60.0), "every sequence ends"
    inbox.put(Shutdown())
    assert engine.join(10.0)
    for seq_id, each in wanted.items():
        assert token_ids[seq_id] == expected_tokens(each.prompt_token_ids, each.sampling)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_engines_of_all_policies_use_one_pipeline_in_turn(num_stages: int) -> None:
    """The fake stages refuse steps that are not numbered on, and ids show lost or mixed KV."""
    inbox: Inbox = queue.SimpleQueue()
    numbered = Numbered(inbox)
    own_facts = facts(num_stages=num_stages, num_blocks=40)
    pipeline = FakePipeline(own_facts, numbered.post)
    try:
        for policy in POLICIES:
            generated(numbered.begin(pipeline, own_facts), inbox, policy, 20)
            numbered.wait_until_empty(10.0)
            steps = numbered.timeline.steps()
            assert steps[0].step_id == 0
            numbered.timeline.clear()
    finally:
        assert pipeline.close(10.0)


def test_a_step_that_is_still_out_keeps_the_next_engine_away() -> None:
    numbered = Numbered(queue.SimpleQueue())
    pipeline = FakePipeline(facts(), numbered.post)
    pipeline.gate.clear()
    watched = numbered.begin(pipeline, facts())
    scheduler = scheduler_of(OURS)
    scheduler.add(sequence(0))
    batch = scheduler.schedule()
    assert batch is not None
    watched.submit(batch)
    numbered.wait_until_empty(0.0)
    with pytest.raises(AssertionError, match="the pipeline is empty"):
        numbered.begin(pipeline, facts())
    pipeline.gate.set()
    numbered.wait_until_empty(10.0)
    numbered.begin(pipeline, facts())
    pipeline.close(10.0)


# What each part does


def decode_together(policy: str, num: int, **changes: int) -> tuple[Scheduler, FakeStages]:
    """So many sequences that all decode, nothing in flight."""
    scheduler = scheduler_of(policy, **changes)
    stages = FakeStages(scheduler.facts)
    members = [sequence(index, num_prompt=4, max_tokens=20) for index in range(num)]
    for each in members:
        scheduler.add(each)
    while not all(each.is_decoding for each in members):
        fill(scheduler, stages)
        run_step(scheduler, stages)
    while scheduler.has_steps_in_flight:
        run_step(scheduler, stages)
    return scheduler, stages


def sizes(batches: list[MicroBatch]) -> list[int]:
    return [batch.num_decode_rows for batch in batches]


def test_the_plain_policy_takes_all_that_can_run_and_nothing_ahead() -> None:
    scheduler, stages = decode_together("plain", 6)
    assert sizes(fill(scheduler, stages)) == [6], "one batch, and nobody is left for another"
    scheduler.add(sequence(6, num_prompt=50, max_tokens=2))
    (chunk,) = fill(scheduler, stages)
    assert (chunk.num_decode_rows, chunk.num_tokens) == (0, 32), "as much as fits, at once"
    run_step(scheduler, stages)
    (mixed,) = fill(scheduler, stages)
    assert (mixed.num_decode_rows, mixed.num_tokens) == (6, 24), "the rest beside those that decode"


def test_our_policy_spreads_the_same_sequences_over_the_stages() -> None:
    scheduler, stages = decode_together(OURS, 6)
    assert sizes(fill(scheduler, stages)) == [3, 3, 3]
    scheduler, stages = decode_together("no-look-ahead", 6)
    assert sizes(fill(scheduler, stages)) == [3, 3]


def test_the_plain_policy_admits_only_what_can_run_to_its_end() -> None:
    scheduler = PlainScheduler(facts(num_blocks=32), POLICY)  # 128 tokens
    stages = FakeStages(scheduler.facts)
    for index in range(4):
        scheduler.add(sequence(index, num_prompt=20, max_tokens=40))
    running = []
    while scheduler.num_waiting or scheduler.num_running:
        fill(scheduler, stages)
        running.append(scheduler.num_running)
        run_step(scheduler, stages)
    assert max(running) == 2, "of 15 blocks each"
    assert scheduler.num_preemptions == 0


def test_the_plain_policy_serves_in_the_order_of_arrival() -> None:
    scheduler = scheduler_of("plain", num_rows=1)
    stages = FakeStages(scheduler.facts)
    for index in range(3):
        scheduler.add(sequence(index, max_tokens=1, priority=-index, account=str(index % 2)))
    order = []
    while scheduler.num_waiting or scheduler.num_running:
        fill(scheduler, stages)
        order += run_step(scheduler, stages).seq_ids
    assert order == [0, 1, 2]


def test_prompts_fill_a_step_unless_they_are_throttled() -> None:
    asked = {"num_decode_rows": 2, "num_pending": 100, "is_decoding": True}
    own_facts = facts(max_batch_tokens=256)
    throttled = PrefillBudget(own_facts).num_tokens(**asked)
    assert throttled < 50
    assert PrefillBudget(own_facts, is_throttled=False).num_tokens(**asked) == 254


@pytest.mark.parametrize(("is_balanced", "left"), [(True, [2, 2]), (False, [4, 0])])
def test_cohorts_are_evened_out_unless_they_are_not_balanced(
    is_balanced: bool, left: list[int]
) -> None:
    late_rows = LateRows(is_used=False)
    cohorts = Cohorts(count=2, num_look_ahead=1, late_rows=late_rows, is_balanced=is_balanced)
    members = [sequence(index) for index in range(8)]
    for each in members:
        cohorts.join(each)
    for each in members[1::2]:
        cohorts.leave(each)
    remaining = [each.cohort for each in members[::2]]
    assert sorted((remaining.count(0), remaining.count(1)), reverse=True) == left


@pytest.mark.parametrize("is_learned", [True, False])
def test_late_chunks_are_cut_smaller_unless_they_are_not_weighed(is_learned: bool) -> None:
    cost = AttentionCost(is_learned=is_learned)
    for index in range(64):
        first, num_tokens = 500 * (index % 16), 100 + index
        pairs = num_tokens * first
        work = StepWork(
            num_rows=index % 5,
            num_positions=7 * (index % 11),
            num_prompt_tokens=num_tokens,
            num_pairs=pairs,
        )
        cost.note(work, 1e-3 + 1e-5 * num_tokens + 1e-8 * pairs)
    assert (cost.num_tokens(8000, 100) < 100) is is_learned


def test_without_the_reserve_more_is_preempted() -> None:
    def preemptions(policy: str) -> int:
        costs = split_costs(H200_8B, (1, 1))
        shape = Shape(
            num_requests=96, prompt=Lengths.parse("64"), output=Lengths.parse("16-256"), seed=1
        )
        scheduler = scheduler_of(
            policy, num_rows=32, num_blocks=512, context_length=320, max_batch_tokens=256
        )
        simulated = SimulatedPolicy(scheduler)
        simulate(arrivals.clients(32, shape), simulated, costs)
        return simulated.num_preemptions

    assert preemptions("no-reserve") > 2 * preemptions(OURS)
    assert preemptions("plain") == 0


@pytest.mark.parametrize("policy", ["no-mixing", "no-prefix-cache"])
def test_switches_that_are_options_too_are_switched(policy: str) -> None:
    changed = {"no-mixing": "mixes_prefill", "no-prefix-cache": "shares_prefixes"}
    assert getattr(scheduler_of(policy).policy, changed[policy]) is False
    assert getattr(scheduler_of(OURS).policy, changed[policy]) is True


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="policies has 'best'; the known are ours, no-balancing"):
        choose_policies("ours, best")


# Loads


def test_a_load_with_arrivals_needs_the_one_that_sets_their_rate() -> None:
    assert [load.name for load in choose_loads("poisson, uniform")] == ["uniform", "poisson"]
    with pytest.raises(ConfigError, match="the rate of arrivals is a share of what uniform gives"):
        choose_loads("mixed,poisson")
    with pytest.raises(ConfigError, match="loads has 'all'; the known are uniform, varied"):
        choose_loads("all")


def test_lengths_are_divided_for_slow_devices() -> None:
    assert str(shorten("64-8192", 8)) == "8-1024"
    assert str(shorten("4", 8)) == "1"
    assert longest_sequence(LOADS, 8) == (8192 + 256) // 8


def test_a_tight_cache_holds_less_than_all_clients_and_at_least_one_sequence() -> None:
    (tight,) = (load for load in LOADS if load.is_tight)

    def limited(num_clients: int) -> PipelineFacts:
        workload = make_workload(
            tight, num_clients=num_clients, shorter=8, rate_per_s=None, run_s=1.0
        )
        return limit_facts(facts(num_blocks=4096, context_length=1024), tight, workload)

    assert limited(1).num_blocks == 48, "64 + 128 tokens"
    assert limited(1).context_length == 192
    assert limited(16).num_blocks == 0.25 * 16 * 48
    assert limited(1000).num_blocks == 4096, "no more than there are"


def test_all_loads_are_made() -> None:
    for load in LOADS:
        workload = make_workload(load, num_clients=4, shorter=8, rate_per_s=2.5, run_s=4.0)
        (how,) = workload.loads
        assert set(load.policies) <= set(POLICIES)
        assert load.policies[0] == OURS
        if load.is_open:
            assert how == Poisson(rate_per_s=2.5, num_sequences=10)
        else:
            assert isinstance(how, Clients)
            assert how.num_clients == 4


# Recording


def recorded(trace: Trace, most_s: float = 60.0) -> Recording:
    """The trace through an engine on fake stages."""
    inbox: Inbox = queue.SimpleQueue()
    pipeline = FakePipeline(facts(), inbox.put)
    recorder = Recorder(
        post=inbox.put,
        trace=trace,
        submissions=[
            Submit(
                seq_id=100 + index,
                prompt_token_ids=(1,) * request.num_prompt_tokens,
                sampling=SamplingParams(max_tokens=request.num_output_tokens, seed=0),
            )
            for index, request in enumerate(trace.requests)
        ],
        most_s=most_s,
    )
    engine = Engine(pipeline=pipeline, inbox=inbox, post=recorder.deliver, stage_timeout_s=60.0)
    engine.start()
    try:
        return recorder.run()
    finally:
        inbox.put(Shutdown())
        engine.join(10.0)
        pipeline.close(10.0)


def request(arrival_s: float, prompt: int = 4, output: int = 3) -> Request:
    return Request(arrival_s=arrival_s, num_prompt_tokens=prompt, num_output_tokens=output)


def test_clients_stop_when_their_time_is_over() -> None:
    trace = Trace(requests=(request(0.0),) * 50, num_clients=4)
    recording = recorded(trace, most_s=0.0)
    assert list(recording.requests) == [100, 101, 102, 103]
    assert set(recording.marks) == set(Moment)
    assert len(recorded(trace).requests) == 50


def test_arrivals_are_submitted_one_by_one_with_their_own_lengths() -> None:
    requests = tuple(request(0.01 * (index + 1), 4 + index, 2) for index in range(5))
    recording = recorded(Trace(requests=requests))
    submitted_s = list(recording.submitted_s.values())
    assert submitted_s == sorted(submitted_s)
    assert submitted_s[-1] - submitted_s[0] >= 0.01
    assert [each.num_prompt_tokens for each in recording.requests.values()] == [4, 5, 6, 7, 8]
    assert recording.num_clients is None
    assert sum(len(step.seq_ids) for step in recording.steps) == 10
    assert recording.marks[Moment.ALL_STARTED].time_s <= submitted_s[0]
    assert recording.marks[Moment.ALL_SUBMITTED].time_s <= submitted_s[-1]


def test_latencies_of_the_start_can_be_left_out() -> None:
    """One client, whose first token takes long."""
    trace = Trace(requests=(request(0.0, 4, 2),) * 3, num_clients=1)
    run = Run(
        trace=trace,
        num_stages=1,
        submitted_s={0: 0.0, 1: 12.0, 2: 15.0},
        steps=[],
        tokens=[
            Step(time_s=at_s, seq_ids=(seq_id,))
            for at_s, seq_id in ((10.0, 0), (12.0, 0), (13.0, 1), (15.0, 1), (19.0, 2), (24.0, 2))
        ],
    )
    everything, steady = make_figures(run), make_figures(run, skips_start=True)
    assert everything.ttft_p50_ms == 4000.0, "of 10, 1 and 4 s"
    assert everything.itl_p50_ms == 2000.0, "of 2, 2 and 5 s"
    # From 10 to 15 s: the second and the third request, and the tokens at 12 and 15 s.
    assert steady.ttft_p50_ms == 2500.0
    assert steady.itl_p99_ms == 2000.0
    assert steady.steady_tokens_per_s == everything.steady_tokens_per_s


# Predictions

PLAIN_OPTIONS = AdmissionPolicy()


def made_up(num_clients: int, admission: AdmissionPolicy = PLAIN_OPTIONS) -> RecordedRun:
    shape = Shape(
        num_requests=5 * num_clients, prompt=Lengths.parse("512"), output=Lengths.parse("32-64")
    )
    own_facts = facts(
        num_rows=64, num_blocks=16384, context_length=1024, max_batch_tokens=512, block_size=16
    )
    policy = SimulatedPolicy(Scheduler(own_facts, admission))
    costs = split_costs(H200_8B, (3, 2))
    return RecordedRun(
        about=f"{num_clients} clients",
        facts=own_facts,
        run=simulate(arrivals.clients(num_clients, shape), policy, costs),
        policy=admission,
    )


def test_a_run_without_mixing_is_foretold_without_it(tmp_path: Path) -> None:
    record = tmp_path / "runs.jsonl"
    append_run(record, made_up(16, AdmissionPolicy(mixes_prefill=False)))
    (prediction,) = foretell(read_runs(record))
    assert prediction.is_within_bounds
    assert prediction.predicted.itl_p99_ms == pytest.approx(prediction.measured.itl_p99_ms, rel=0.1)


def test_every_load_is_foretold_from_every_load() -> None:
    predictions = foretell([made_up(16), made_up(48)])
    assert [(each.fitted_to, each.foretold) for each in predictions] == [
        ("16 clients", "16 clients"),
        ("16 clients", "48 clients"),
        ("48 clients", "16 clients"),
        ("48 clients", "48 clients"),
    ]
    assert [each.is_own_load for each in predictions] == [True, False, False, True]
    for each in predictions:
        assert abs(each.throughput_error) < 0.02
        assert each.is_within_bounds


@pytest.mark.parametrize(
    ("rate", "ttft", "is_within"), [(1.1, 0.8, True), (1.11, 1.0, False), (1.0, 1.21, False)]
)
def test_bounds_are_of_the_measured_values(rate: float, ttft: float, is_within: bool) -> None:
    run = made_up(4).run
    measured = make_figures(run)
    predicted = replace(
        measured,
        total_tokens_per_s=measured.total_tokens_per_s * rate * (1 - 1e-9),
        ttft_p50_ms=measured.ttft_p50_ms * ttft * (1 + 1e-9),
    )
    prediction = Prediction(
        fitted_to="",
        foretold="",
        is_own_load=False,
        measured=measured,
        predicted=predicted,
        stage_errors=(),
    )
    assert prediction.is_within_bounds is is_within


# The commands, on real stages

TINY = ["--shape", "tiny", "--devices", "cpu,cpu", "--layer-split", "4,4"]


def printed(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 0
    return capfd.readouterr().out


def test_policies_are_compared_on_real_stages(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--cache-dir", str(tmp_path), "--shorter", "32", "--clients", "3"]
    options += ["--seconds", "0.1", "--loads", "uniform,mixed,poisson,shared,tight", "--json"]
    options += ["--block-size", "4"]
    values = json.loads(printed(capfd, "policies", *options))
    chosen = choose_loads("uniform,mixed,poisson,shared,tight")
    assert [(case["load"], case["policy"]) for case in values["cases"]] == [
        (load.name, policy) for load in chosen for policy in load.policies
    ]
    cached = {(case["load"], case["policy"]): case["cached_share"] for case in values["cases"]}
    assert 0 < cached["shared", OURS] < 1
    assert cached["shared", "no-prefix-cache"] == cached["uniform", OURS] == 0
    for case in values["cases"]:
        figures = case["figures"]
        assert figures["steady_tokens_per_s"] > 0
        assert figures["ttft_p99_ms"] >= figures["ttft_p50_ms"] > 0
        assert len(figures["stage_busy"]) == 2


@pytest.mark.gpu
def test_policies_are_compared_on_two_stages_of_a_card(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--shape", "tiny", "--devices", "cuda:0,cuda:0", "--layer-split", "4,4"]
    options += ["--cache-dir", str(tmp_path), "--kv-cache-bytes", "64MiB", "--clients", "8"]
    options += ["--shorter", "8", "--seconds", "0.2", "--loads", "uniform", "--json"]
    values = json.loads(printed(capfd, "policies", *options, "--policies", ",".join(POLICIES)))
    assert [case["policy"] for case in values["cases"]] == list(POLICIES)
    for case in values["cases"]:
        assert case["figures"]["num_requests"] >= 8
        assert all(busy > 0 for busy in case["figures"]["stage_busy"])


def test_the_table_of_policies_is_markdown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--cache-dir", str(tmp_path), "--shorter", "64", "--clients", "2"]
    options += ["--seconds", "0", "--loads", "uniform", "--rounds", "2"]
    lines = printed(capfd, "policies", *options).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows if "---" not in row[0]}) == 1
    assert [row[1] for row in rows[2:]] == ["ours", "plain", "ours", "plain"]
    assert rows[2][0] == "| 2 clients, 8 prompt + 2 output tokens"
    assert rows[2][3] == "1.00", "to ours"


def test_predictions_are_made_on_real_stages(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "runs.jsonl"
    options = [*TINY, "--cache-dir", str(tmp_path), "--clients", "1,3", "--prompt", "16"]
    options += ["--output", "8", "--seconds", "0.3", "--record", str(record)]
    values = json.loads(printed(capfd, "prediction", *options, "--json"))
    assert len(values) == 4
    for each in values:
        off = each["predicted"]["ttft_p50_ms"] / each["measured"]["ttft_p50_ms"] - 1
        assert each["ttft_error"] == pytest.approx(off)
        assert each["predicted"]["num_requests"] == each["measured"]["num_requests"]
    assert record.read_text().count('"kind":"run"') == 2


def test_the_engine_benchmark_takes_arrivals_mixed_lengths_and_a_policy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--cache-dir", str(tmp_path), "--poisson", "40", "--requests", "6"]
    options += ["--prompt", "4-40", "--output", "2,3", "--policy", "plain"]
    values = json.loads(printed(capfd, "engine", *options, "--json"))
    assert values["policy"] == "plain"
    (run,) = values["runs"]
    assert (run["num_concurrent"], run["num_sequences"]) == (None, 6)
    trace = Workload(
        prompt=Lengths.parse("4-40"),
        output=Lengths.parse("2,3"),
        loads=(),
    ).make_trace(Poisson(rate_per_s=40.0, num_sequences=6))
    num_tokens = sum(r.num_prompt_tokens + r.num_output_tokens for r in trace.requests)
    assert run["total_tokens_per_s"] * run["duration_s"] == pytest.approx(num_tokens)


@pytest.mark.parametrize("mix_prefill", ["on", "off"])
def test_the_engine_benchmark_heeds_the_options_of_scheduling(
    mix_prefill: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "run.jsonl"
    options = [*TINY, "--cache-dir", str(tmp_path), "--clients", "4", "--requests", "24"]
    options += ["--prompt", "40", "--output", "8", "--mix-prefill", mix_prefill]
    printed(capfd, "engine", *options, "--record", str(record))
    steps = [json.loads(line) for line in record.read_text().splitlines()]
    has_mixed = any(
        step["num_decode_rows"] and step["num_prefill_tokens"]
        for step in steps
        if step["kind"] == "step"
    )
    assert has_mixed is (mix_prefill == "on")
