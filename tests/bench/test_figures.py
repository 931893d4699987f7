"""Figures of runs made up by hand, whose every number can be said in advance."""

from __future__ import annotations

import threading

import pytest

from pipeserve.bench.arrivals import Request, Trace
from pipeserve.bench.figures import Figures, ModelCosts, make_figures, model_costs
from pipeserve.bench.recording import Mark, Moment, Recorder, Recording, Step
from pipeserve.bench.shapes import SHAPES
from pipeserve.bench.workload import Batch, Clients, Load
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.messages import EngineFailed, FrontMessage, Submit
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import StageFailedError, StageStalledError

COSTS = ModelCosts(weight_bytes=1000, kv_token_bytes=10, token_flops=100, position_flops=2)


def mark(time_s: float, *busy_s: float, num_preemptions: int = 0) -> Mark:
    stats = EngineStats(
        num_waiting=0,
        num_running=0,
        num_blocks=1,
        num_free_blocks=1,
        num_steps=0,
        num_prompt_tokens=0,
        num_generated_tokens=0,
        num_preemptions=num_preemptions,
        stage_busy_s=busy_s,
        uptime_s=time_s + 5.0,
    )
    return Mark(time_s=time_s, stats=stats)


def figures(
    load: Load,
    *,
    num_output_tokens: int,
    submitted_s: dict[int, float],
    steps: list[tuple[float, tuple[int, ...]]],
    marks: tuple[Mark, Mark, Mark, Mark],
) -> Figures:
    requests = {
        seq_id: Request(arrival_s=at_s, num_prompt_tokens=100, num_output_tokens=num_output_tokens)
        for seq_id, at_s in submitted_s.items()
    }
    recording = Recording(
        requests=requests,
        num_clients=load.num_clients if isinstance(load, Clients) else None,
        submitted_s=submitted_s,
        steps=[Step(time_s=time_s, seq_ids=seq_ids) for time_s, seq_ids in steps],
        marks=dict(zip(Moment, marks, strict=True)),
    )
    return make_figures(recording, load, COSTS)


def test_a_batch_whose_second_sequence_starts_later() -> None:
    run = figures(
        Batch(num_sequences=2),
        num_output_tokens=4,
        submitted_s={0: 10.0, 1: 10.0},
        steps=[
            (11.0, (0,)),
            (12.0, (0, 1)),
            (13.0, (0, 1)),
            (14.0, (0, 1)),
            (16.0, (1,)),
        ],
        marks=(mark(10.0, 0.0), mark(12.0, 1.0), mark(10.0, 0.0), mark(16.0, 4.0)),
    )
    assert run.duration_s == 6.0
    assert run.decode_tokens_per_s == 5 / 4
    assert run.full_batch_tokens_per_s == 4 / 2
    assert run.prefill_tokens_per_s == 200 / 2
    assert run.total_tokens_per_s == 208 / 6
    assert run.ttft_p50_ms == 1500.0
    assert run.ttft_p99_ms == pytest.approx(1990.0)
    assert run.itl_p50_ms == 1000.0
    assert run.stage_busy == (0.75,)
    # Two steps; contexts of 102 and 101, then of 103 and 102 tokens.
    assert run.decode_bytes_per_s == (2 * 1000 + 10 * (102 + 101 + 103 + 102)) / 2
    assert run.prefill_flops_per_s == 100 * (100 + 2 * 50.5)


def test_sequences_that_never_decode_together_have_no_full_batch() -> None:
    run = figures(
        Batch(num_sequences=2),
        num_output_tokens=2,
        submitted_s={0: 0.0, 1: 0.0},
        steps=[(1.0, (0,)), (2.0, (0,)), (3.0, (1,)), (4.0, (1,))],
        marks=(mark(0.0, 0.0), mark(3.0, 1.0), mark(0.0, 0.0), mark(4.0, 2.0, num_preemptions=1)),
    )
    assert run.decode_tokens_per_s == 1.0
    assert run.full_batch_tokens_per_s is None
    assert run.decode_bytes_per_s is None
    assert run.num_preemptions == 1


def test_one_output_token_measures_prefill_alone() -> None:
    run = figures(
        Batch(num_sequences=1),
        num_output_tokens=1,
        submitted_s={7: 1.0},
        steps=[(3.0, (7,))],
        marks=(mark(1.0, 0.5), mark(3.0, 2.0), mark(1.0, 0.5), mark(3.0, 2.0)),
    )
    assert run.prefill_tokens_per_s == 50.0
    assert run.decode_tokens_per_s is None
    assert run.itl_p50_ms is None
    assert run.stage_busy == (0.75,), "of the whole run"


def test_clients_are_measured_while_all_are_busy() -> None:
    run = figures(
        Clients(num_clients=1, num_sequences=3),
        num_output_tokens=2,
        submitted_s={0: 0.0, 1: 2.0, 2: 5.0},
        steps=[(1.0, (0,)), (2.0, (0,)), (4.0, (1,)), (5.0, (1,)), (6.0, (2,)), (7.0, (2,))],
        marks=(mark(0.0, 0.0), mark(1.0, 0.0), mark(5.0, 2.0), mark(7.0, 2.0)),
    )
    assert run.decode_tokens_per_s == 3 / 4
    assert run.prefill_tokens_per_s == 100 / 3, "sequence 1, three seconds into the steady state"
    assert run.total_tokens_per_s == 306 / 7
    assert run.ttft_p50_ms == 1000.0
    assert run.stage_busy == (0.5,)
    assert run.full_batch_tokens_per_s is None


def test_costs_of_the_8b_shape() -> None:
    costs = model_costs(SHAPES["llama-8b"], weight_bytes=1, kv_token_bytes=1)
    assert costs.token_flops == 2 * 6_979_321_856, "all weights but embedding, head and norms"
    assert costs.position_flops == 4 * 32 * 4096


@pytest.mark.parametrize(
    ("stalled", "kind"), [(False, StageFailedError), (True, StageStalledError)]
)
def test_a_dead_engine_ends_the_run(stalled: bool, kind: type[Exception]) -> None:
    def post(message: FrontMessage) -> None:
        if isinstance(message, Submit):
            failure = EngineFailed(error="stage 1 failed: boom", stalled=stalled)
            threading.Thread(target=recorder.deliver, args=(failure,)).start()

    sampling = SamplingParams(max_tokens=1, seed=0)
    submission = Submit(seq_id=0, prompt_token_ids=(1,), sampling=sampling)
    trace = Trace(requests=(Request(arrival_s=0.0, num_prompt_tokens=1, num_output_tokens=1),))
    recorder = Recorder(post=post, trace=trace, submissions=[submission])
    with pytest.raises(kind, match="stage 1 failed: boom"):
        recorder.run()
