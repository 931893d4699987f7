"""A failed engine is started again at once, then more slowly, then not at all."""

from __future__ import annotations

from pipeserve.restarts import MAX_FAILURES, STEADY_S, Restarts


def test_failures_in_a_row_wait_longer_and_end() -> None:
    restarts = Restarts()
    delays = [restarts.note_failure(served_s=served_s) for served_s in (5.0, 0.0, 1.0, 0.0)]
    assert delays == [0.0, 1.0, 2.0, None]
    assert len(delays) == MAX_FAILURES


def test_an_engine_that_served_for_long_ends_the_row() -> None:
    restarts = Restarts()
    for _ in range(3):
        for served_s in (STEADY_S, 0.0, 0.0):
            assert restarts.note_failure(served_s=served_s) is not None
