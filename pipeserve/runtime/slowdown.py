"""Slows stages down by known factors, to try on equal devices what mismatched ones would do.

For tests and measurements only. Runs on the stages' threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from pipeserve.core.batch import MicroBatch
from pipeserve.runtime.sampled import Sampled
from pipeserve.runtime.stage import Runner

_TRIAL_CYCLES = 20_000_000
_MEASURED_STEPS = 3
"""Steps of each size that are waited for, to learn how long they take."""


def slow_down(
    runners: Sequence[Runner], factors: Sequence[float], devices: Sequence[torch.device]
) -> list[Runner]:
    """Runners whose steps take `factor` times as long; those with the factor 1 as they are."""
    return [
        runner if factor == 1.0 else _slowed(runner, factor, device)
        for runner, factor, device in zip(runners, factors, devices, strict=True)
    ]


def _slowed(runner: Runner, factor: float, device: torch.device) -> Runner:
    assert factor > 1.0, "a device cannot be made faster"
    if device.type == "cuda":
        return _SlowedGpu(runner, factor, device)
    return _SlowedCpu(runner, factor)


class _SlowedCpu:
    """Sleeps after each step."""

    def __init__(self, runner: Runner, factor: float) -> None:
        self._runner = runner
        self._factor = factor

    def run(self, batch: MicroBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor | Sampled:
        started_s = time.perf_counter()
        result = self._runner.run(batch, hidden_TD)
        time.sleep((self._factor - 1.0) * (time.perf_counter() - started_s))
        return result


class _SlowedGpu:
    """Keeps the stream busy before each step for what it will take, known from earlier ones of its
    size; the host waits for those alone."""

    def __init__(self, runner: Runner, factor: float, device: torch.device) -> None:
        self._runner = runner
        self._factor = factor
        self._cycles_per_s = _cycles_per_s(device)
        self._measured_s: dict[tuple[int, int], list[float]] = {}

    def run(self, batch: MicroBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor | Sampled:
        known_s = self._measured_s.setdefault(_size(batch), [])
        if known_s:
            self._sleep(min(known_s))
        if len(known_s) >= _MEASURED_STEPS:
            return self._runner.run(batch, hidden_TD)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = self._runner.run(batch, hidden_TD)
        last.record()
        last.synchronize()
        known_s.append(first.elapsed_time(last) / 1e3)
        if len(known_s) == 1:
            self._sleep(known_s[0])
        return result

    def _sleep(self, step_s: float) -> None:
        torch.cuda._sleep(int((self._factor - 1.0) * step_s * self._cycles_per_s))


def _size(batch: MicroBatch) -> tuple[int, int]:
    """Steps of one size take about as long: decode rows by 8, prompt tokens by 64."""
    return -(-batch.num_decode_rows // 8), -(-len(batch.prefill_token_ids) // 64)


def _cycles_per_s(device: torch.device) -> float:
    """Of torch.cuda._sleep, by measuring: no property of the card says it."""
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_TRIAL_CYCLES)
        first.record()
        torch.cuda._sleep(_TRIAL_CYCLES)
        last.record()
        last.synchronize()
        return _TRIAL_CYCLES / (first.elapsed_time(last) / 1e3)
