"""How long a computation takes on a device, by repeating it.

Runs before the stages' threads exist; waits for the device.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

MIN_REPEATS, MAX_REPEATS = 3, 20
ENOUGH_S = 0.02
"""A CPU repeats until so much time was measured, within the limits above. The shortest time counts:
what else the machine does only adds."""

GPU_REPEATS, CALLS_PER_REPEAT = 5, 10
"""Calls follow each other between two events, so that a GPU does not wait for the host. The median
counts."""

Call = Callable[[], object]


def seconds_per_call(call: Call, device: torch.device) -> float:
    """Of a few calls, after one that warms up."""
    call()
    return _on_gpu(call, device) if device.type == "cuda" else _on_cpu(call)


def capture(call: Call, stream: torch.cuda.Stream | None) -> Call:
    """On a GPU the replay of the call as a CUDA graph, as decode steps run; else the call.

    stream: of the GPU; the same for several captures, as libraries keep memory for each.
    """
    if stream is None:
        return call
    call()  # compiles kernels, which must not happen while capturing
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    return graph.replay


def give_back() -> None:
    """To a GPU what torch and its libraries keep of memory that is no longer used."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def _on_cpu(call: Call) -> float:
    times_s: list[float] = []
    while len(times_s) < MIN_REPEATS or (sum(times_s) < ENOUGH_S and len(times_s) < MAX_REPEATS):
        started_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def _on_gpu(call: Call, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    times_s: list[float] = []
    for _ in range(GPU_REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(CALLS_PER_REPEAT):
            call()
        last.record()
        last.synchronize()
        times_s.append(first.elapsed_time(last) / 1e3 / CALLS_PER_REPEAT)
    return statistics.median(times_s)
