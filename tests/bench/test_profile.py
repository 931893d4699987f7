"""Profiles of kernels' times made up by hand, and what is said where nothing can be traced."""

from __future__ import annotations

import queue
import threading

import pytest
import torch

from pipeserve.bench.profile import CardProfile, Interval, make_profile, short_name
from pipeserve.bench.report import profile_lines
from pipeserve.bench.tracing import NotTraced, SteadyDecode, trace_decode
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    FinishReason,
    FrontMessage,
    Submit,
    TokenEvents,
)
from pipeserve.errors import StageFailedError

GEMV = "_gemv_kernel"
COPY = "Memcpy HtoD (Pinned -> Device)"


def interval(name: str, start_us: float, end_us: float) -> Interval:
    return Interval(name=name, start_us=start_us, end_us=end_us)


def profiled(*intervals: Interval) -> CardProfile:
    return make_profile(
        intervals, device="cuda:0", num_concurrent=4, num_steps=2, window_us=(100.0, 200.0)
    )


def test_kernels_are_summed_by_name_within_the_window() -> None:
    made = profiled(
        interval(GEMV, 90.0, 120.0),  # from 100 on
        interval(GEMV, 121.0, 141.0),
        interval(COPY, 141.0, 151.0),
        interval(GEMV, 195.0, 230.0),  # up to 200
        interval("outside", 200.0, 260.0),
    )
    gemv, copy = made.kernels
    assert (gemv.name, gemv.us_per_step, gemv.count_per_step) == (GEMV, 22.5, 1.5)
    assert (copy.name, copy.us_per_step, copy.count_per_step) == ("Memcpy HtoD", 5.0, 0.5)
    assert gemv.share + copy.share == 1.0
    assert gemv.share == 45 / 55
    assert made.step_us == 50.0


def test_idle_is_what_no_kernel_covers_and_waits_are_its_long_gaps() -> None:
    made = profiled(
        interval(GEMV, 101.0, 150.0),
        interval(COPY, 110.0, 120.0),  # at the same time
        interval(GEMV, 152.0, 160.0),
        interval(COPY, 158.0, 190.0),  # overlaps the last
    )
    assert made.idle_share == pytest.approx((1 + 2 + 10) / 100)
    assert made.wait_share == pytest.approx(10 / 100)


def test_a_card_that_is_always_busy_never_waits() -> None:
    made = profiled(interval(GEMV, 0.0, 1000.0))
    assert (made.idle_share, made.wait_share) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("_paged_decode_kernel", "_paged_decode_kernel"),
        ("nvjet_tst_128x64_64x7_2x1_v_bz_coopA_TNT", "nvjet_tst_128x64_64x7_2x1_v_bz_coopA_TNT"),
        ("void cutlass::Kernel2<cutlass_80_tensorop>(Params)", "Kernel2"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<long>>(int)",
            "vectorized_elementwise_kernel Fill",
        ),
        (
            "void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long>(int)",
            "indexSelectSmallIndex",
        ),
    ],
)
def test_names_are_shortened(name: str, shown: str) -> None:
    assert short_name(name) == shown


def test_the_table_says_what_the_gpu_does() -> None:
    shown = profile_lines([profiled(interval(GEMV, 100.0, 149.0), interval(GEMV, 150.0, 190.0))])
    assert shown[1] == (
        "4 at once on cuda:0: 50 us per step over 2 traced steps; the GPU is idle 11.0% of the "
        "time, 10.0% in gaps of 5 us and more (it waits)"
    )
    assert shown[-1].split() == ["44.5", "100.0%", "1.00", GEMV]


def test_without_a_card_the_output_says_so() -> None:
    steady = SteadyDecode(post=lambda message: None, batch=[])
    profiles = trace_decode(steady, num_concurrent=8, devices=[torch.device("cpu")])
    assert profiles == (NotTraced(num_concurrent=8, reason="no stage is on a CUDA card"),)
    assert profile_lines(profiles)[1] == "8 at once, not traced: no stage is on a CUDA card"


def events(*seq_ids: int, ends: bool = False) -> TokenEvents:
    count = len(seq_ids)
    return TokenEvents(
        seq_ids=seq_ids,
        token_ids=(0,) * count,
        finish_reasons=(FinishReason.LENGTH if ends else None,) * count,
        logprobs=(None,) * count,
    )


def steady_pair() -> tuple[SteadyDecode, queue.SimpleQueue[FrontMessage]]:
    posted: queue.SimpleQueue[FrontMessage] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=9, seed=0)
    batch = [Submit(seq_id=seq_id, prompt_token_ids=(1,), sampling=sampling) for seq_id in (7, 8)]
    return SteadyDecode(post=posted.put, batch=batch), posted


def test_a_step_is_one_token_of_every_sequence() -> None:
    steady, posted = steady_pair()
    steady.start()
    assert [posted.get().seq_id for _ in range(2)] == [7, 8]  # type: ignore[union-attr]

    # 3 is of an earlier batch; the first tokens are of prompts; then two cohorts, then one.
    for message in (events(3), events(7), events(8), events(7)):
        steady.deliver(message)
    assert steady.num_steps == 0
    steady.deliver(events(8))
    assert steady.num_steps == 1
    engine = threading.Timer(0.05, steady.deliver, (events(7, 8),))
    engine.start()
    first, second = steady.wait_for(1), steady.wait_for(2)
    engine.join()
    assert first is not None
    assert second is not None
    assert first < second
    steady.deliver(events(7, 8, ends=True))
    assert steady.wait_for(4) is None
    steady.stop()
    assert {posted.get() for _ in range(2)} == {Abort(seq_id=7), Abort(seq_id=8)}


def test_a_dead_engine_ends_the_wait() -> None:
    steady, _ = steady_pair()
    steady.deliver(EngineFailed(error="stage 0 failed: boom", stalled=False))
    with pytest.raises(StageFailedError, match="boom"):
        steady.wait_for(1)
