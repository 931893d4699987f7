"""Says how far each stage has loaded: in the log, to the service manager, on a terminal as bars.

One caller at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import structlog
from tqdm import tqdm

from pipeserve.core.loading import LoadEvent, LoadNotice, LoadReport, OnProgress, StageProgress

log = structlog.get_logger()


def report_progress(tell: Callable[[str], None]) -> OnProgress:
    """Logs and tells of every tenth of a stage's weights that was read; on a terminal bars take
    the place of the log lines."""
    bars = ProgressBars()
    told: dict[int, int] = {}

    def report(event: LoadEvent) -> None:
        if isinstance(event, LoadNotice):
            log.warning("loading", notice=event.text)
            return
        if isinstance(event, LoadReport):
            log.info("loading", report=event.text)
            return
        bars.update(event)
        if told.get(event.stage) == event.percent // 10:
            return
        told[event.stage] = event.percent // 10
        stage = f"{event.stage + 1} of {event.num_stages}"
        tell(f"loading stage {stage}, {event.percent} %")
        if not bars.is_shown:
            log.info("loading weights", stage=stage, percent=event.percent)

    return report


class ProgressBars:
    """Bars on stderr; none where that is no terminal."""

    def __init__(self) -> None:
        # Else tqdm starts a thread of its own, which the daemon's end would wait for.
        tqdm.monitor_interval = 0
        self.is_shown = sys.stderr.isatty()
        self._bars: list[_Bar] = []

    def update(self, progress: StageProgress) -> None:
        if not self.is_shown:
            return
        if not self._bars:
            self._bars = [
                _Bar(
                    desc=f"loading stage {stage + 1}",
                    total=progress.num_bytes,
                    position=stage,
                    unit="B",
                    unit_scale=True,
                    file=sys.stderr,
                )
                for stage in range(progress.num_stages)
            ]
        bar = self._bars[progress.stage]
        bar.total = progress.num_bytes
        bar.update(progress.num_read - bar.n)
        if progress.num_read == progress.num_bytes:
            bar.close()


class _Bar(tqdm):  # type: ignore[misc]
    monitor_interval = 0
    """No thread of tqdm's own, which would outlive the bars."""
