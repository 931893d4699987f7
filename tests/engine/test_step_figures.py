"""What the recorder makes of steps whose times are known."""

from __future__ import annotations

import pickle

import numpy as np

from pipeserve.core.batch import MicroBatch, RowStart, Span
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.stats import EngineStats, total_stats
from pipeserve.engine.step_figures import (
    MAX_ACCOUNTS,
    OTHER_ACCOUNTS,
    ROW_BOUNDS,
    StepFigures,
    StepRecorder,
    Wait,
)

NONE = np.zeros(0, np.int32)


def batch(*, num_rows: int, starts: tuple[int, ...] = ()) -> MicroBatch:
    rows = np.arange(num_rows, dtype=np.int32)
    return MicroBatch(
        step_id=0,
        num_decode_rows=num_rows,
        rows_S=rows,
        first_positions_S=rows,
        num_tokens_S=np.ones(num_rows, np.int32),
        samples_S=np.ones(num_rows, np.bool_),
        prefill_token_ids=NONE,
        starts=tuple(
            RowStart(
                row=0,
                sampling=SamplingParams(max_tokens=1, seed=0),
                token_ids=NONE,
                num_prompt_tokens=0,
                seq_id=seq_id,
            )
            for seq_id in starts
        ),
        block_rows=NONE,
        block_columns=NONE,
        block_ids=NONE,
        needs_step=None,
    )


def spans(*times: tuple[float, float]) -> tuple[Span, ...]:
    return tuple(Span(start_s=start_s, end_s=end_s) for start_s, end_s in times)


def test_bubbles_and_hand_offs_of_two_steps_that_overlap() -> None:
    """Stage 0 works at 1-3 and 3-5, stage 1 at 4-6 and 6.5-8; submitted at 0, all back at 9."""
    recorder = StepRecorder(2)
    recorder.note_submitted(batch(num_rows=1), 0.0)
    recorder.note_submitted(batch(num_rows=1), 0.5)
    recorder.note_output(spans((1, 3), (4, 6)), 6.0, is_idle=False)
    recorder.note_output(spans((3, 5), (6.5, 8)), 9.0, is_idle=True)
    figures = recorder.figures()
    assert recorder.stage_busy_s == (4.0, 3.5)
    assert figures.stage_bubble_s == (1.0 + 4.0, 4.0 + 0.5 + 1.0)
    assert [
        busy + bubble
        for busy, bubble in zip(recorder.stage_busy_s, figures.stage_bubble_s, strict=True)
    ] == [9.0, 9.0]
    assert figures.stage_hand_off_s == (0.0, 1.0 + 0.5)


def test_a_rest_is_no_bubble() -> None:
    recorder = StepRecorder(1)
    for now_s in (0.0, 100.0):
        recorder.note_submitted(batch(num_rows=1), now_s)
        recorder.note_output(spans((now_s + 1, now_s + 2)), now_s + 2, is_idle=True)
    assert recorder.figures().stage_bubble_s == (2.0,)


def test_rows_fall_into_buckets() -> None:
    recorder = StepRecorder(1)
    for num_rows in (1, 2, 3, 4, 5000):
        recorder.note_submitted(batch(num_rows=num_rows), 0.0)
    counts = dict(zip((*ROW_BOUNDS, None), recorder.figures().row_counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {1: 1, 2: 1, 4: 2, None: 1}
    assert recorder.figures().num_rows == 5010


def test_a_wait_is_counted_once_and_to_its_account() -> None:
    recorder = StepRecorder(1)
    for seq_id, account in enumerate(("alice", "bob", "alice", "alice")):
        recorder.note_arrival(seq_id, account, 10.0)
    recorder.note_submitted(batch(num_rows=1, starts=(0, 1)), 11.0)
    recorder.note_submitted(batch(num_rows=1, starts=(0, 2)), 13.0)  # 0 was preempted
    recorder.note_end(3)  # left while it waited
    recorder.note_submitted(batch(num_rows=1, starts=(3,)), 99.0)
    assert recorder.figures().waits == {
        "alice": Wait(count=2, sum_s=4.0),
        "bob": Wait(count=1, sum_s=1.0),
    }


def test_accounts_have_a_limit() -> None:
    recorder = StepRecorder(1)
    for seq_id in range(MAX_ACCOUNTS + 3):
        recorder.note_arrival(seq_id, f"key-{seq_id}", 0.0)
        recorder.note_submitted(batch(num_rows=1, starts=(seq_id,)), 1.0)
    waits = recorder.figures().waits
    assert len(waits) == MAX_ACCOUNTS + 1
    assert waits[OTHER_ACCOUNTS].count == 3


def test_lives_and_replicas_add_up() -> None:
    def figures(seconds: float, account: str) -> StepFigures:
        return StepFigures(
            stage_bubble_s=(seconds, 0.0),
            stage_hand_off_s=(0.0, seconds),
            row_counts=(1,) * (len(ROW_BOUNDS) + 1),
            num_rows=7,
            waits={account: Wait(count=1, sum_s=seconds)},
        )

    now = figures(1.0, "alice").with_past(figures(2.0, "alice"))
    assert now.stage_bubble_s == (3.0, 0.0)
    assert (now.num_rows, now.row_counts[0]) == (14, 2)
    assert now.waits == {"alice": Wait(count=2, sum_s=3.0)}
    assert now.with_past(StepFigures()) == now
    assert pickle.loads(pickle.dumps(now)) == now
    nothing = EngineStats.of_nothing(2)
    both = total_stats(
        [
            EngineStats(**{**{n: getattr(nothing, n) for n in nothing.__slots__}, "figures": each})
            for each in (now, figures(5.0, "bob"))
        ]
    ).figures
    assert both.stage_bubble_s == (3.0, 0.0, 5.0, 0.0)
    assert both.num_rows == 21
    assert set(both.waits) == {"alice", "bob"}
