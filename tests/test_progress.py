"""Progress bars: one per stage on a terminal, none elsewhere, no thread left behind."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from pipeserve.core.loading import StageProgress
from pipeserve.progress import ProgressBars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def load_two_stages(bars: ProgressBars) -> None:
    for num_read in (0, 600, 1000):
        for stage, num_bytes in ((0, 1000), (1, 2000)):
            bars.update(
                StageProgress(
                    stage=stage,
                    num_stages=2,
                    num_read=num_read * num_bytes // 1000,
                    num_bytes=num_bytes,
                )
            )


def test_a_terminal_shows_a_bar_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    num_threads = threading.active_count()
    load_two_stages(ProgressBars())
    shown = terminal.getvalue()
    for line in ("loading stage 1: 100%", "1.00k/1.00k", "loading stage 2: 100%", "2.00k/2.00k"):
        assert line in shown
    assert threading.active_count() == num_threads


def test_a_log_file_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bars = ProgressBars()
    load_two_stages(bars)
    assert not bars.is_shown
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
