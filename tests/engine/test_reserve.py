"""What is expected of outputs, and how many blocks that will take at the fullest moment."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeserve.engine.reserve import FIRST_GUESS, MEMORY, OutputReserve
from pipeserve.engine.sequence import Sequence, SequenceStatus
from tests.engine.scheduling import assert_right, rig, run_all, sequence


def expected(reserve: OutputReserve, *num_output: int) -> list[float]:
    return reserve.expected(np.array(num_output, np.int64)).tolist()


def taught(lengths: list[int], *, block_size: int = 1) -> OutputReserve:
    """It remembers these alone."""
    reserve = OutputReserve(block_size=block_size)
    for index in range(MEMORY):
        reserve.note_finished(lengths[index % len(lengths)])
    return reserve


def running(num_prompt: int, num_output: int, max_tokens: int) -> Sequence:
    each = sequence(0, num_prompt, max_tokens)
    each.move_to(SequenceStatus.RUNNING)
    each.token_ids += [1] * num_output
    return each


def test_before_any_has_ended_a_guess_counts() -> None:
    assert expected(OutputReserve(block_size=16), 0, 28) == [FIRST_GUESS, FIRST_GUESS - 28]


def test_a_sequence_is_expected_to_end_as_others_did_that_were_as_long() -> None:
    reserve = taught([10, 100])
    assert expected(reserve, 0, 10, 50) == [55.0, 90.0, 50.0]


def test_one_that_is_longer_than_all_before_is_expected_to_double() -> None:
    assert expected(taught([10]), 10, 40) == [10.0, 40.0]


def test_the_fullest_moment_is_not_the_sum_of_all_wishes() -> None:
    reserve = taught([100])
    both = [running(50, 90, 1000), running(50, 20, 1000)]
    # After 10 tokens each the first ends with its 140; the other's further 70 fit where it was.
    assert reserve.num_blocks(both) == 2 + 20
    assert reserve.num_blocks(both[1:]) == 1 + 80
    assert reserve.num_blocks([]) == 0


def test_max_tokens_bounds_what_is_expected() -> None:
    assert taught([100]).num_blocks([running(50, 0, 30)]) == 1 + 30


def test_preemptions_make_it_cautious_and_ends_less_so() -> None:
    reserve = taught([100])
    one = [running(50, 0, 1000)]
    for _ in range(10):
        reserve.note_preemption()
    assert reserve.num_blocks(one) == 1 + 150
    for _ in range(2000):
        reserve.note_finished(100)
    assert reserve.num_blocks(one) == 1 + 100
    assert reserve.most_blocks(3) >= 3 * 100


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_reserve_keeps_preemption_rare(
    num_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """400 sequences whose lengths only chance knows, in a cache that holds about ten of them."""
    learned = preemptions(num_stages)
    monkeypatch.setattr(OutputReserve, "num_blocks", lambda self, sequences: 0)
    without = preemptions(num_stages)
    assert without > 100
    assert learned < without / 10


def preemptions(num_stages: int) -> int:
    scheduler, stages = rig(
        num_stages=num_stages, num_rows=32, num_blocks=256, block_size=4, context_length=256
    )
    chance = random.Random(0)
    everyone = [
        sequence(seq_id, chance.randint(4, 40), min(200, 1 + int(chance.expovariate(1 / 60))))
        for seq_id in range(400)
    ]
    for each in everyone:
        scheduler.add(each)
    run_all(scheduler, stages)
    for each in everyone:
        assert_right(each)
    return scheduler.num_preemptions
