"""What a CUDA card can do at most, measured: its copy speed and its bf16 matrix rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPY_BYTES = (2**28, 2**30, 2**32)
MATRIX_SIZE = 8192
NUM_REPEATS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Of one card."""

    device: str
    name: str
    copy_bytes_per_s: float
    """Bytes read plus bytes written by a copy within the card; the best of a few sizes."""
    matmul_flops_per_s: float
    """Of a square bf16 product with float32 sums, by the vendor's library."""


def measure_ceilings(device: torch.device) -> Ceilings:
    """Takes about a second and 9 GB, which are given back."""
    with torch.cuda.device(device):
        ceilings = Ceilings(
            device=str(device),
            name=torch.cuda.get_device_name(device),
            copy_bytes_per_s=max(_copy_bytes_per_s(device, size) for size in COPY_BYTES),
            matmul_flops_per_s=_matmul_flops_per_s(device),
        )
        torch.cuda.empty_cache()
    return ceilings


def _copy_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_s(lambda: target.copy_(source))


def _matmul_flops_per_s(device: torch.device) -> float:
    shape = (MATRIX_SIZE, MATRIX_SIZE)
    # Random, not zeros: a card that multiplies zeros takes less power and clocks higher.
    left, right = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * MATRIX_SIZE**3 / _median_s(lambda: torch.mm(left, right, out=product))


def _median_s(call: Callable[[], object]) -> float:
    """Of one call on the current device, after a few that warm up."""
    for _ in range(3):
        call()
    times_s: list[float] = []
    for _ in range(NUM_REPEATS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times_s.append(start.elapsed_time(end) / 1000.0)
    return statistics.median(times_s)
