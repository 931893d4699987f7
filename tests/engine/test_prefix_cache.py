"""Blocks that are computed once and read by others: which, when, by whom, and for how long."""

from __future__ import annotations

import pytest

from pipeserve.engine.block_hashes import hash_blocks
from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.sequence import SequenceStatus
from tests.engine.scheduling import assert_right, fill, rig, run_all, run_step, sequence

SYSTEM = range(2000)
BLOCK = 16


def num_prefilled(batches: list) -> int:
    return sum(len(batch.prefill_token_ids) for batch in batches)


@pytest.mark.parametrize("accounts", [1, 64])
@pytest.mark.parametrize("num_aborted_after", [None, 0, 1, 3])
@pytest.mark.parametrize(("num_stages", "max_batch_tokens"), [(1, 2048), (2, 256), (3, 512)])
def test_a_system_prompt_of_64_chats_is_computed_once(
    accounts: int, num_aborted_after: int | None, num_stages: int, max_batch_tokens: int
) -> None:
    """Arrived together, of one key or of 64; also if the first is aborted after so many steps."""
    scheduler, stages = rig(
        num_stages=num_stages,
        max_batch_tokens=max_batch_tokens,
        num_rows=64,
        num_blocks=1024,
        block_size=BLOCK,
        context_length=4096,
    )
    chats = [
        sequence(
            seq_id,
            prompt=[*SYSTEM, *range(5000 + 20 * seq_id, 5020 + 20 * seq_id)],
            account=str(seq_id % accounts),
        )
        for seq_id in range(64)
    ]
    for chat in chats:
        scheduler.add(chat)
    batches = []
    if num_aborted_after is not None:
        for _ in range(num_aborted_after):
            batches += fill(scheduler, stages)
            run_step(scheduler, stages)
        first = chats.pop(0)
        scheduler.end(first, SequenceStatus.ABORTED)
    batches += run_all(scheduler, stages)
    num_own = 20 * len(chats)
    num_of_aborted = 0 if num_aborted_after is None else 20
    computed = num_prefilled(batches)
    assert 2000 + num_own <= computed <= 2000 + num_own + num_of_aborted
    for chat in chats:
        assert_right(chat)
    num_cached = sorted(chat.num_cached_tokens for chat in chats)
    assert num_cached[1:] == [2000] * (len(chats) - 1)


def test_the_first_token_says_how_many_were_cached() -> None:
    scheduler, stages = rig(num_stages=1)
    scheduler.add(sequence(0, prompt=range(10), max_tokens=2))
    run_all(scheduler, stages)
    scheduler.add(sequence(1, prompt=range(10), max_tokens=3))
    fill(scheduler, stages)
    assert run_step(scheduler, stages).num_cached_tokens == ((1, 8),)
    fill(scheduler, stages)
    assert run_step(scheduler, stages).num_cached_tokens == ()
    assert scheduler.prefix_cache.num_queried_tokens == 20
    assert scheduler.prefix_cache.num_hit_tokens == 8


def test_generated_tokens_are_found_too() -> None:
    """The next turn of a chat begins with the answer of the last."""
    scheduler, stages = rig()
    first = sequence(0, prompt=range(10), max_tokens=12)
    scheduler.add(first)
    run_all(scheduler, stages)
    second = sequence(1, prompt=[*first.token_ids, 7, 7, 7])
    scheduler.add(second)
    run_all(scheduler, stages)
    assert second.num_cached_tokens == 20  # the last one's keys and values were never computed
    assert_right(second)


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler, stages = rig()
    for seq_id in range(2):
        scheduler.add(sequence(seq_id, prompt=range(8)))
        run_all(scheduler, stages)
    assert scheduler.prefix_cache.num_hit_tokens == 4


def test_a_block_is_not_read_in_the_step_that_computes_it() -> None:
    scheduler, stages = rig()
    for seq_id in range(2):
        scheduler.add(sequence(seq_id, prompt=[1, 2, 3, 4, 5, 6 + seq_id]))
    first, second = fill(scheduler, stages)[:2]
    assert first.num_rows == 1
    assert (second.num_tokens_S[-1], second.first_positions_S[-1]) == (2, 4)


def test_salts_keep_tenants_apart() -> None:
    scheduler, stages = rig()
    for seq_id, salt in enumerate(["", "a", "b", "a"]):
        scheduler.add(sequence(seq_id, prompt=range(10), cache_salt=salt))
        run_all(scheduler, stages)
    assert scheduler.prefix_cache.num_hit_tokens == 8


def test_who_must_compute_every_token_reads_nothing_but_shares_it() -> None:
    scheduler, stages = rig()
    for seq_id, num_logprobs in enumerate([None, 0, None]):
        scheduler.add(sequence(seq_id, prompt=range(10), num_prompt_logprobs=num_logprobs))
        run_all(scheduler, stages)
    assert scheduler.prefix_cache.num_queried_tokens == 20
    assert scheduler.prefix_cache.num_hit_tokens == 8


def test_by_option_nothing_is_shared() -> None:
    scheduler, stages = rig(AdmissionPolicy(shares_prefixes=False))
    for seq_id in range(3):
        scheduler.add(sequence(seq_id, prompt=range(10)))
    assert num_prefilled(run_all(scheduler, stages)) == 30


def test_what_was_used_longest_ago_is_handed_out_first() -> None:
    pool = BlockPool(5)
    held = {}
    for name in (b"a", b"b"):
        held[name] = pool.allocate(2)
        for part, block_id in zip((b"1", b"2"), held[name], strict=True):
            pool.name(block_id, name + part)
    pool.free(held[b"b"])
    pool.free(held[b"a"])
    (nameless,) = pool.allocate(1)
    assert all(pool.find(name) is not None for name in (b"a1", b"a2", b"b1", b"b2"))
    pool.free([nameless])
    pool.allocate(2)
    # Nameless first, then of those that were freed first the end, without which the start is found.
    assert pool.find(b"b2") is None
    assert all(pool.find(name) is not None for name in (b"a1", b"a2", b"b1"))
    pool.share([pool.find(b"b1")])
    assert pool.allocate(3) is None
    pool.allocate(2)
    assert pool.find(b"b1") is not None
    assert pool.find(b"a1") is None


def test_a_preempted_sequence_finds_what_it_had_computed() -> None:
    """Its blocks keep their content until others need them."""
    scheduler, stages = rig(num_stages=1, num_rows=1)
    background = sequence(0, prompt=range(20), max_tokens=20, is_background=True)
    scheduler.add(background)
    for _ in range(4):
        fill(scheduler, stages)
        run_step(scheduler, stages)
    scheduler.add(sequence(1))
    batches = run_all(scheduler, stages)
    assert scheduler.num_preemptions == 1
    assert num_prefilled(batches) < 4 + 8
    assert_right(background)


def test_names_depend_on_all_that_came_before() -> None:
    names = hash_blocks(range(12), 4)
    assert len(names) == len(set(names)) == 3
    assert hash_blocks([*range(8), 99], 4) == names[:2]
    assert not set(hash_blocks([99, *range(1, 12)], 4)) & set(names)
    assert not set(hash_blocks(range(12), 4, salt="tenant")) & set(names)
    assert hash_blocks(range(15), 4) == names
    assert hash_blocks(range(400), 4, max_blocks=2) == names[:2]
