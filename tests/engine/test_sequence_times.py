"""What stages did for a sequence: of steps whose times are known, and of a running engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from pipeserve.core.batch import MicroBatch, RowStart, Span
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.messages import SequenceTimes, StageWork, TraceMark
from pipeserve.engine.sequence_times import SequenceTimer
from tests.engine.running import running_engine
from tests.fakes import facts

MARK = TraceMark(parent="00-1-2-01", choice=0, submitted_s=0.0)
NONE = np.zeros(0, np.int32)


def batch(
    rows: list[int], *, samples: bool = True, starts: dict[int, int] | None = None
) -> MicroBatch:
    """starts: row -> sequence."""
    begun = [
        RowStart(
            row=row,
            seq_id=seq_id,
            sampling=SamplingParams(max_tokens=1, seed=0),
            token_ids=NONE,
            num_prompt_tokens=0,
        )
        for row, seq_id in (starts or {}).items()
    ]
    count = len(rows)
    return MicroBatch(
        step_id=0,
        num_decode_rows=0,
        rows_S=np.array(rows, np.int32),
        first_positions_S=np.zeros(count, np.int32),
        num_tokens_S=np.ones(count, np.int32),
        samples_S=np.full(count, samples),
        prefill_token_ids=NONE,
        starts=tuple(begun),
        block_rows=NONE,
        block_columns=NONE,
        block_ids=NONE,
        needs_step=None,
    )


def run(timer: SequenceTimer, step: MicroBatch, start_s: float) -> None:
    """Both stages work for half a second, one after the other."""
    timer.note_submitted(step)
    times = [(start_s, start_s + 0.5), (start_s + 0.5, start_s + 1.0)]
    timer.note_output([Span(start_s=a, end_s=b) for a, b in times])


def work(start_s: float, end_s: float, num_steps: int) -> StageWork:
    return StageWork(start_s=start_s, end_s=end_s, busy_s=num_steps / 2, num_steps=num_steps)


def test_chunks_are_prefill_until_the_first_token() -> None:
    timer = SequenceTimer(facts())
    timer.note_arrival(7, MARK)
    run(timer, batch([3], samples=False, starts={3: 7}), 1.0)
    run(timer, batch([3, 4], starts={4: 8}), 2.0)
    run(timer, batch([4]), 3.0)  # without it
    run(timer, batch([3, 4]), 4.0)
    run(timer, batch([3]), 5.0)
    assert timer.take(7, 9.0) == SequenceTimes(
        mark=MARK,
        ended_s=9.0,
        prefill=(work(1.0, 2.5, 2), work(1.5, 3.0, 2)),
        decode=(work(4.0, 5.5, 2), work(4.5, 6.0, 2)),
    )
    assert timer.take(7, 9.0) is None
    assert timer.take(8, 9.0) is None


def test_a_row_that_another_takes_over_tells_of_each_its_own() -> None:
    timer = SequenceTimer(facts())
    timer.note_arrival(1, MARK)
    run(timer, batch([0], starts={0: 1}), 1.0)
    timer.note_arrival(2, MARK)
    run(timer, batch([0], starts={0: 2}), 2.0)  # 1 was preempted
    run(timer, batch([5], samples=False, starts={5: 1}), 3.0)  # and computed again
    run(timer, batch([5]), 4.0)
    first, second = timer.take(1, 9.0), timer.take(2, 9.0)
    assert first is not None
    assert second is not None
    assert first.prefill[0] == work(1.0, 1.5, 1)
    assert first.decode[0] == work(3.0, 4.5, 2)  # it had its first token before
    assert (second.prefill[0], second.decode) == (work(2.0, 2.5, 1), ())


def test_what_never_began_only_waited() -> None:
    timer = SequenceTimer(facts())
    timer.note_arrival(1, MARK)
    assert timer.take(1, 4.0) == SequenceTimes(mark=MARK, ended_s=4.0)


def test_nothing_is_kept_where_nobody_asks() -> None:
    timer = SequenceTimer(facts())
    step = batch([0], starts={0: 1})
    timer.note_submitted(step)
    assert timer._in_flight == type(timer._in_flight)([None])
    timer.note_arrival(2, MARK)  # after it was submitted
    timer.note_output([Span(start_s=1.0, end_s=2.0)] * 2)
    assert timer.take(2, 3.0) == SequenceTimes(mark=MARK, ended_s=3.0)


async def test_an_engine_tells_the_times_of_marked_sequences() -> None:
    told: list[SequenceTimes] = []
    sampling = SamplingParams(max_tokens=5, seed=0)
    async with running_engine(pipeline_facts=facts(num_rows=2), take_times=told.append) as engine:

        async def generate(choice: int, *, tokens: int | None = None) -> None:
            mark = replace(MARK, choice=choice)
            async with engine.client.generate(range(40, 90), sampling, mark=mark) as generation:
                async for _ in generation:
                    if tokens is not None:
                        return

        unmarked = engine.client.generate((1, 2, 3), sampling)
        await asyncio.gather(*(generate(choice) for choice in range(6)))
        await generate(6, tokens=1)
        async with asyncio.timeout(10):
            while len(told) < 7:
                await asyncio.sleep(0.01)
        async with unmarked:
            pass
    assert {times.mark.choice for times in told} == set(range(7))
    for times in told[:6]:
        assert [len(works) for works in (times.prefill, times.decode)] == [2, 2]
        for first, second in zip(times.prefill, times.decode, strict=True):
            assert first.num_steps >= 1
            assert second.num_steps >= 4  # one more where it looked ahead
            for each in (first, second):  # the fake's steps take a millisecond
                assert each.busy_s == pytest.approx(each.num_steps / 1000)
