"""How long a stage works on a step: by the host's clock on a CPU, by events on a GPU's stream.

Started and stopped on the stage's thread; read once the step has left the pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

BusySeconds = Callable[[], float]
"""Seconds that a stage worked on a step. To be asked only when the step's results are there."""


def start_clock(device: torch.device) -> Callable[[], BusySeconds]:
    """Start; the returned function stops."""
    return _start_events() if device.type == "cuda" else _start_host()


def _start_host() -> Callable[[], BusySeconds]:
    started_s = time.monotonic()

    def stop() -> BusySeconds:
        busy_s = time.monotonic() - started_s
        return lambda: busy_s

    return stop


def _start_events() -> Callable[[], BusySeconds]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def stop() -> BusySeconds:
        last.record()
        return read

    def read() -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return stop
