"""Shows on a terminal how far each stage has loaded: a bar per stage. One caller at a time."""

from __future__ import annotations

import sys

from tqdm import tqdm

from pipeserve.core.loading import StageProgress


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
