"""Who goes first: priorities, shares of accounts, the background class; nobody for ever last."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings

from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.sequence import Sequence, SequenceStatus
from pipeserve.engine.waiting_line import WaitingLine
from tests.engine.scheduling import (
    assert_right,
    expect_short_outputs,
    fill,
    rig,
    run_all,
    run_step,
    run_until,
    sequence,
)

LARGE = {
    "num_stages": 2,
    "num_rows": 32,
    "num_blocks": 2048,
    "block_size": 16,
    "context_length": 4096,
    "max_batch_tokens": 256,
}


def steps_until_first_token(scheduler, stages, chat: Sequence) -> int:
    """Steps that are submitted from its arrival until the one that samples its first token."""
    scheduler.add(chat)
    batches = run_until(scheduler, stages, lambda: chat.num_in_flight + chat.num_output_tokens > 0)
    return len(batches)


@pytest.mark.parametrize("num_warm_up_steps", [0, 1, 7, 60])
@pytest.mark.parametrize("mixes", [True, False])
def test_a_full_queue_of_one_key_delays_the_chat_of_another_by_a_step_or_two(
    num_warm_up_steps: int, mixes: bool
) -> None:
    scheduler, stages = rig(AdmissionPolicy(mixes_prefill=mixes), **LARGE)
    for seq_id in range(500):
        scheduler.add(sequence(seq_id, 300, 200, account="bulk"))
    for _ in range(num_warm_up_steps):
        fill(scheduler, stages)
        run_step(scheduler, stages)
    fill(scheduler, stages)
    run_step(scheduler, stages)
    chat = sequence(1000, 40, 8, account="chat")
    most = 2 if mixes else 4  # prompts are computed in every third step
    assert steps_until_first_token(scheduler, stages, chat) <= most


def test_a_long_prompt_of_one_key_delays_the_chat_of_another_by_a_step_or_two() -> None:
    scheduler, stages = rig(**LARGE)
    scheduler.add(sequence(0, 4000, 8, account="long"))
    fill(scheduler, stages)
    run_step(scheduler, stages)
    chat = sequence(1, 40, 8, account="chat")
    assert steps_until_first_token(scheduler, stages, chat) <= 2


def test_a_chat_finds_room_when_another_key_holds_all_blocks() -> None:
    scheduler, stages = rig(**{**LARGE, "num_blocks": 256})
    expect_short_outputs(scheduler)
    for seq_id in range(40):
        scheduler.add(sequence(seq_id, 250, 500, account="bulk"))
    run_until(scheduler, stages, lambda: scheduler.pool.num_free < 20)
    chat = sequence(1000, 200, 8, account="chat")
    assert steps_until_first_token(scheduler, stages, chat) <= 3
    run_until(scheduler, stages, lambda: chat.is_ended)
    assert_right(chat)


def test_keys_share_by_tokens_not_by_requests() -> None:
    """One asks for long prompts, one for short ones: in a while both have had as many tokens."""
    scheduler, stages = rig(**LARGE)
    prompts = {"long": 1000, "short": 100}
    computed = dict.fromkeys(prompts, 0)
    sequences = {}
    for seq_id in range(400):
        account = "long" if seq_id % 2 else "short"
        sequences[seq_id] = sequence(seq_id, prompts[account], 1, account=account)
        scheduler.add(sequences[seq_id])
    for _ in range(60):
        fill(scheduler, stages)
        for seq_id in run_step(scheduler, stages).seq_ids:
            each = sequences[seq_id]
            computed[each.admission.account] += each.num_prompt_tokens
    assert min(computed.values()) > 5000
    assert abs(computed["long"] - computed["short"]) <= 2000


def test_lower_priorities_go_first_and_within_one_the_order_is_that_of_arrival() -> None:
    scheduler, stages = rig(num_rows=1)
    order: list[int] = []
    for seq_id, priority in enumerate([1, 0, -2, 0, 1]):
        scheduler.add(sequence(seq_id, max_tokens=1, priority=priority))
    while scheduler.num_waiting or scheduler.num_running:
        fill(scheduler, stages)
        order += run_step(scheduler, stages).seq_ids
    assert order == [2, 1, 3, 0, 4]


def test_whoever_waits_too_long_goes_first() -> None:
    """However many better ones keep arriving, and for each only once in a while."""
    scheduler, stages = rig(AdmissionPolicy(max_wait_s=10.0), num_rows=1, num_stages=1)
    patient = [sequence(seq_id, max_tokens=2, priority=5) for seq_id in range(3)]
    for each in patient:
        scheduler.add(each)
    ended_s: list[int] = []
    for now_s in range(1, 60):
        scheduler.tell_time(float(now_s))
        scheduler.add(sequence(100 + now_s, max_tokens=2, priority=-5, account=str(now_s)))
        for _ in range(2):
            fill(scheduler, stages)
            run_step(scheduler, stages)
        ended_s += [now_s] * (sum(each.is_ended for each in patient) - len(ended_s))
    assert len(ended_s) == 3
    assert all(later - earlier >= 9 for earlier, later in itertools.pairwise(ended_s))
    assert ended_s[0] <= 13
    assert ended_s[-1] <= 36


def test_a_prompt_that_has_begun_goes_on_whatever_arrives() -> None:
    """It holds a row and blocks, which nobody should do for ever."""
    scheduler, stages = rig(**LARGE)
    poor = sequence(0, 2000, 1, priority=5)
    scheduler.add(poor)
    fill(scheduler, stages)
    for seq_id in range(1, 200):
        scheduler.add(sequence(seq_id, 500, 1, priority=0))
        fill(scheduler, stages)
        run_step(scheduler, stages)
        if poor.is_ended:
            break
    assert scheduler.num_waiting > 20
    assert poor.is_ended


def test_background_fills_idle_rows_and_yields_at_once() -> None:
    scheduler, stages = rig(**{**LARGE, "num_rows": 8})
    batch = [sequence(seq_id, 100, 50, is_background=True) for seq_id in range(20)]
    for each in batch:
        scheduler.add(each)
    for _ in range(12):
        fill(scheduler, stages)
        run_step(scheduler, stages)
    assert scheduler.num_running == 8
    chats = [sequence(100 + index, 20, 8, account=f"{index % 2}") for index in range(6)]
    for chat in chats:
        scheduler.add(chat)
    fill(scheduler, stages)
    assert all(chat.status is SequenceStatus.RUNNING for chat in chats)
    assert scheduler.num_running == 8
    assert scheduler.num_preemptions == 6
    run_all(scheduler, stages)
    for each in (*batch, *chats):
        assert_right(each)


def test_background_never_goes_before_interactive() -> None:
    scheduler, stages = rig(AdmissionPolicy(max_wait_s=1.0), num_rows=2)
    scheduler.add(sequence(0, max_tokens=1, is_background=True, priority=-9))
    order: list[int] = []
    for seq_id in range(1, 8):
        scheduler.add(sequence(seq_id, max_tokens=2, priority=9))
    now_s = 0.0
    while scheduler.num_waiting or scheduler.num_running:
        now_s += 1.0
        scheduler.tell_time(now_s)
        fill(scheduler, stages)
        order += run_step(scheduler, stages).seq_ids
    assert order[-1] == 0 or 0 in order[-3:]
    assert order.index(0) > order.index(6)


def test_preempted_sequences_come_back_in_the_order_of_arrival() -> None:
    scheduler, stages = rig(
        num_blocks=24, block_size=2, context_length=32, num_rows=4, num_stages=2
    )
    expect_short_outputs(scheduler)
    everyone = [sequence(seq_id, 4, 24) for seq_id in range(8)]
    for each in everyone:
        scheduler.add(each)
    ended: list[int] = []
    while scheduler.num_waiting or scheduler.num_running:
        fill(scheduler, stages)
        events = run_step(scheduler, stages)
        pairs = zip(events.seq_ids, events.finish_reasons, strict=True)
        ended += [seq_id for seq_id, reason in pairs if reason is not None]
    assert scheduler.num_preemptions > 0
    assert ended == sorted(ended)
    for each in everyone:
        assert_right(each)


@settings(max_examples=40, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    arrivals=st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 400), st.integers(1, 30), st.integers(0, 3)
        ),
        min_size=1,
        max_size=40,
    ),
    chat_at=st.integers(0, 40),
)
def test_no_load_of_others_delays_a_single_chat(
    arrivals: list[tuple[str, int, int, int]], chat_at: int
) -> None:
    """Whatever three other keys ask for: a key's only chat starts within a few steps."""
    scheduler, stages = rig(**{**LARGE, "num_rows": 6, "num_blocks": 128, "context_length": 1024})
    for seq_id, (account, num_prompt, max_tokens, num_steps) in enumerate(arrivals):
        scheduler.add(sequence(seq_id, num_prompt, max_tokens, account=account))
        for _ in range(num_steps):
            fill(scheduler, stages)
            if scheduler.has_steps_in_flight:
                run_step(scheduler, stages)
        if seq_id == chat_at:
            break
    fill(scheduler, stages)
    if scheduler.has_steps_in_flight:
        run_step(scheduler, stages)
    # A turn for each of the others, and one by arrival; every step has room for its prompt.
    assert steps_until_first_token(scheduler, stages, sequence(1000, 30, 4, account="me")) <= 5
    run_all(scheduler, stages)


def test_a_key_that_was_away_has_no_credit() -> None:
    line = WaitingLine(max_wait_s=1e9)
    for account, num_tokens in (("busy", 10_000), ("new", 0)):
        each = sequence(0, account=account)
        line.arrive(each)
        line.charge(account, num_tokens)
        line.begin_step(())
        line.remove(each)
    assert line.tag(sequence(2, account="away")) == 10_000
    assert line.tag(sequence(3, account="new")) == 10_000


def test_what_was_served_while_nobody_waited_is_no_debt() -> None:
    line = WaitingLine(max_wait_s=1e9)
    for account, num_tokens in (("alone", 5000), ("other", 10)):
        each = sequence(0, account=account)
        line.arrive(each)
        line.charge(account, num_tokens)
        line.remove(each)
        line.begin_step(())
    assert line.tag(sequence(1, account="alone")) == line.tag(sequence(1, account="other"))


def test_the_only_chat_of_a_key_keeps_its_row_when_blocks_run_out() -> None:
    """Though it came last: those of a key with more give way first."""
    scheduler, stages = rig(num_blocks=32, block_size=2, context_length=32, num_rows=4)
    expect_short_outputs(scheduler)
    bulk = [sequence(seq_id, 4, 24, account="bulk") for seq_id in range(3)]
    for each in bulk:
        scheduler.add(each)
    run_until(scheduler, stages, lambda: bulk[2].num_output_tokens > 0)
    chat = sequence(100, 4, 24, account="chat")
    scheduler.add(chat)
    run_until(scheduler, stages, lambda: chat.is_ended)
    assert scheduler.num_preemptions > 0
    assert chat.generation == 1, "it gave its row up only at its end"
    run_all(scheduler, stages)


def test_who_has_had_more_than_others_takes_no_row_from_them() -> None:
    """It would go to and fro between the two: whoever gave way is next in the line again."""
    scheduler, stages = rig(**{**LARGE, "num_rows": 3, "max_batch_tokens": 2048})
    for seq_id in range(2):
        scheduler.add(sequence(seq_id, 4, 400, account="modest"))
    greedy = sequence(10, 1500, 1, account="greedy")
    scheduler.add(greedy)
    fill(scheduler, stages)
    patient = [sequence(seq_id, 4, 400, account="patient", priority=5) for seq_id in (20, 21)]
    for each in patient:
        scheduler.add(each)
    run_until(scheduler, stages, lambda: patient[0].num_output_tokens > 0)
    assert greedy.is_ended
    again = sequence(11, 4, 1, account="greedy")
    scheduler.add(again)
    run_until(scheduler, stages, lambda: again.is_ended)
    assert scheduler.num_preemptions <= 1
    run_all(scheduler, stages)


def test_accounts_that_come_and_go_are_forgotten() -> None:
    line = WaitingLine(max_wait_s=1e9)
    for index in range(5000):
        each = sequence(index, account=f"key {index}")
        line.arrive(each)
        line.remove(each)
    assert line.num_accounts <= 1024
