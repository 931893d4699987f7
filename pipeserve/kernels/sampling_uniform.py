"""Random numbers on the device that depend on nothing but a seed and a position.

Twin: reference_sampling.uniform.

Shapes: S rows.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase

_BLOCK = 128


@triton.jit
def _mix(x):
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014; Stafford's variant 13)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["num_rows"])
def uniform_kernel(seeds_ptr, positions_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    rows_S = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seeds_S = tl.load(seeds_ptr + rows_S, rows_S < num_rows, other=0).to(tl.uint64)
    positions_S = tl.load(positions_ptr + rows_S, rows_S < num_rows, other=0).to(tl.uint64)
    hash_S = _mix(_mix(seeds_S) + positions_S * 0x9E3779B97F4A7C15)
    # 53 bits fit a signed integer, which converts everywhere.
    uniform_S = (hash_S >> 11).to(tl.int64).to(tl.float64) * (2.0**-53)
    tl.store(out_ptr + rows_S, uniform_S, rows_S < num_rows)


def uniform(seeds_S: Tensor, positions_S: Tensor) -> Tensor:
    """One float64 in [0, 1) per row, with 53 random bits: a hash of (seed, position) alone."""
    num_rows = seeds_S.shape[0]
    out_S = torch.empty(num_rows, dtype=torch.float64, device=seeds_S.device)
    if num_rows > 0:
        uniform_kernel[(triton.cdiv(num_rows, _BLOCK),)](
            seeds_S, positions_S, out_S, num_rows, BLOCK=_BLOCK
        )
    return out_S


AOT_CASES = (
    AotCase(
        name="uniform",
        kernel=uniform_kernel,
        signature={
            "seeds_ptr": "*i64",
            "positions_ptr": "*i32",
            "out_ptr": "*fp64",
            "num_rows": "i32",
        },
        constexprs={"BLOCK": _BLOCK},
    ),
)
