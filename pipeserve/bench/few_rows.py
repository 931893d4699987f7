"""Times the kernel for few rows in every launch shape, to choose the one that quant_gemv takes.

`python -m pipeserve.bench.few_rows` prints one line per matrix of an 8B Llama, number of rows and
launch shape: microseconds per product in a CUDA graph that goes through copies of the weight until
it has left the cache, and the weight's bytes as a share of the measured copy speed. Products follow
each other as in a step, so on cards with dependent launches one begins while the last one ends;
--no-overlap times them without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch

from pipeserve.bench.ceilings import measure_ceilings
from pipeserve.bench.quant_kernels import MATRICES, copies_beyond_cache, random_weight, time_us
from pipeserve.kernels import dependent_launch
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_gemv import gemv
from pipeserve.kernels.quant_layout import PlanarWeight
from pipeserve.kernels.rounded_rows import quantise_rows

ROWS = (1, 2, 4, 8)
LAUNCH_SHAPES = ((1, 32), (2, 32), (4, 32), (2, 64), (4, 64), (4, 128))
"""Outputs per program, and the pieces that its threads take of a row at once."""


def measure(weights: Sequence[PlanarWeight], num_tokens: int) -> dict[str, float]:
    """Microseconds by launch shape; chosen: as quant_gemv does; batch: the kernel for batches."""
    x = torch.randn(num_tokens, weights[0].num_columns, device="cuda", dtype=torch.float16)
    rows = quantise_rows(x)
    few = partial(gemv, rows, out_dtype=torch.float16)
    times_us = {"chosen": time_us([partial(few, weight) for weight in weights])}
    for block_n, pieces in LAUNCH_SHAPES:
        call = partial(few, block_n=block_n, pieces=pieces, num_parts=1)
        times_us[f"{block_n}x{pieces}"] = time_us([partial(call, weight) for weight in weights])
    times_us["batch"] = time_us([partial(gemm, x, weight) for weight in weights])
    return times_us


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeserve.bench.few_rows")
    parser.add_argument("--no-overlap", action="store_true", help="no dependent launches")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if options.no_overlap:
        dependent_launch.is_supported = lambda device: False
    device = torch.device("cuda", torch.cuda.current_device())
    copy_speed = measure_ceilings(device).copy_bytes_per_s / 1e6
    print(f"{torch.cuda.get_device_name()}, copy {copy_speed / 1e6:.2f} TB/s", flush=True)
    for matrix, num_rows, num_columns, type_name in MATRICES:
        weights = copies_beyond_cache(random_weight(type_name, num_rows, num_columns))
        copy_us = weights[0].num_bytes / copy_speed
        for num_tokens in options.rows:
            times_us = measure(weights, num_tokens)
            best = min(times_us, key=lambda shape: times_us[shape])
            listed = "  ".join(f"{shape} {us:.1f}" for shape, us in times_us.items())
            print(
                f"{matrix:8} {num_rows:6}x{num_columns:5} {type_name} {num_tokens} rows: {listed}; "
                f"best {best}, {copy_us / times_us[best]:.0%} of copy",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
