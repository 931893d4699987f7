"""Compares ways to cut a batch's quantised product on Hopper: checks them, times them, names the
best per matrix and number of rows beside the Triton kernel.

`python -m pipeserve.bench.quant_sweep` on an H100 or H200; --json FILE keeps every number.
"""

# torch.cuda has no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from pipeserve.bench.quant_kernels import (
    MATRICES,
    copies_beyond_cache,
    random_weight,
    relative_error,
    time_us,
)
from pipeserve.kernels import nvrtc, quant_reference
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from pipeserve.kernels.quant_mma import (
    ARCH,
    MmaTiling,
    MmaVariant,
    fitted,
    has_mma,
    mma,
    mma_source,
)

ROWS = (8, 16, 32, 64, 128, 256)
_ERROR_LIMIT = 1e-3
_NUM_LAYERS = 32
_STEP_WEIGHTS = {"output": 1.0, "qkv": 1.0, "gate_up": 1.0, "down": 0.5}
"""Products per layer of an 8B model at Q4_K_M, whose down matrices are of two types by halves."""


def _variants(block_t: int) -> Iterator[MmaVariant]:
    make = partial(MmaVariant, block_t=block_t)
    if block_t <= 32:
        yield make(warpgroups=2, tiles=1, num_stages=4, blocks_at_once=2)
        yield make(warpgroups=1, tiles=1, num_stages=4, blocks_at_once=4)
        yield make(warpgroups=1, tiles=1, num_stages=6, blocks_at_once=3)
        yield make(warpgroups=4, tiles=1, num_stages=5)
        yield make(warpgroups=2, tiles=2, num_stages=5)
    elif block_t == 64:
        yield make(warpgroups=2, tiles=1, num_stages=3, x_blocks=2, x_slots=3, blocks_at_once=2)
        yield make(warpgroups=1, tiles=1, num_stages=4, x_blocks=1, x_slots=5, blocks_at_once=3)
        yield make(warpgroups=4, tiles=1, num_stages=3, x_blocks=2)
        yield make(warpgroups=2, tiles=2, num_stages=3, x_blocks=2)
    elif block_t == 128:
        yield make(warpgroups=2, tiles=2, num_stages=3, x_blocks=1, x_slots=6)
        yield make(warpgroups=2, tiles=1, num_stages=3, x_blocks=1, x_slots=6)
        yield make(warpgroups=4, tiles=1, num_stages=3, x_blocks=1, x_slots=6)
        yield make(warpgroups=1, tiles=2, num_stages=2, x_blocks=1, x_slots=3, blocks_at_once=2)
    else:
        yield make(warpgroups=2, tiles=1, num_stages=3, x_blocks=1, x_slots=4)


def variants_for(num_tokens: int) -> list[MmaVariant]:
    """Candidates for so many tokens; 256 also as two tiles of 128."""
    sizes = (128, 256) if num_tokens > 128 else (num_tokens,)
    return [variant for size in sizes for variant in _variants(size)]


def _parts(weight: PlanarWeight, variant: MmaVariant, num_tokens: int) -> Iterator[int]:
    num_tiles = -(-weight.num_rows // variant.block_n) * -(-num_tokens // variant.block_t)
    places = 132 * variant.blocks_at_once
    for num_parts in (1, 2, 4, 8):
        num_steps = weight.num_columns // 256 // num_parts
        is_useful = num_parts == 1 or num_tiles * num_parts <= 2.2 * places
        if is_useful and num_tiles * num_parts >= 0.2 * places and num_steps >= 2:
            yield num_parts


def _compile(job: tuple[str, MmaVariant, torch.dtype]) -> str | None:
    try:
        nvrtc.cached_cubin(mma_source(*job), ARCH)
    except nvrtc.CudaDriverError as failure:
        return f"{job}: {failure}"
    return None


def compile_all(jobs: Iterable[tuple[str, MmaVariant, torch.dtype]]) -> None:
    """Into the cache, in processes that use no GPU."""
    wanted = sorted(set(jobs), key=repr)
    start = time.monotonic()
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        failures = [failure for failure in pool.map(_compile, wanted) if failure]
    print(
        f"{len(wanted)} kernels compiled in {time.monotonic() - start:.1f} s", *failures, sep="\n"
    )


def _check_variants() -> list[MmaVariant]:
    few = [next(_variants(block_t)) for block_t in (8, 16, 32, 64, 128, 256)]
    return [*few, *list(_variants(64))[1:], *list(_variants(128))[1:]]


def check() -> int:
    """Every type, odd sizes, parts, bias: errors against the twin. The number of failures."""
    num_failed = num_done = 0
    for type_name in LAYOUTS:
        weight = random_weight(type_name, 460, 1792)
        values_NK = quant_reference.dequantise(weight)
        for variant in _check_variants():
            tight = fitted(weight.layout, variant)
            if tight is None:
                continue
            for num_tokens, num_parts in ((1, 1), (7, 4), (variant.block_t + 3, 2), (250, 8)):
                x = torch.randn(num_tokens, 1792 + 64, device="cuda").half()[:, :1792]
                bias = torch.randn(460, device="cuda").half()
                wanted = x.float() @ values_NK.T + bias.float()
                run = partial(
                    mma, x, weight, bias, tiling=MmaTiling(variant=tight, num_parts=num_parts)
                )
                got = run(out_dtype=torch.float32)
                error = max(relative_error(got, wanted), relative_error(run(), wanted) - 5e-4)
                is_same = all(torch.equal(got, run(out_dtype=torch.float32)) for _ in range(3))
                num_done += 1
                if not error < _ERROR_LIMIT or not is_same:
                    num_failed += 1
                    if num_failed <= 20:
                        print(f"FAILED {type_name} {tight} {num_tokens} tokens, {num_parts} parts:"
                              f" error {error:.2e}, repeats {is_same}")  # fmt: skip
    print(f"{num_done} products checked, {num_failed} wrong", flush=True)
    return num_failed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One way to multiply one matrix; microseconds."""

    matrix: str
    type_name: str
    num_tokens: int
    name: str
    us: float
    error: float


def _name(variant: MmaVariant, num_parts: int) -> str:
    v = variant
    return (
        f"t{v.block_t} {v.warpgroups}x{v.tiles} s{v.num_stages} x{v.x_blocks}/{v.num_x_slots} "
        f"b{v.blocks_at_once} p{num_parts}"
    )


def time_matrix(matrix: str, type_name: str, shape: tuple[int, int], rows: list[int],
                copy_speed: float) -> Iterator[Timing]:  # fmt: skip
    """The Triton kernel and every candidate; prints the three best."""
    weights = copies_beyond_cache(random_weight(type_name, *shape))
    weight = weights[0]
    values_NK = quant_reference.dequantise(weight)
    copy_us = weight.num_bytes / copy_speed
    for num_tokens in rows:
        x = torch.randn(num_tokens, weight.num_columns, device="cuda", dtype=torch.float16)
        wanted = x.float() @ values_NK.T
        make = partial(Timing, matrix=matrix, type_name=type_name, num_tokens=num_tokens)
        old = make(
            name="triton",
            us=time_us([partial(gemm, x, copy) for copy in weights]),
            error=relative_error(gemm(x, weight), wanted),
        )
        found = []
        for variant in variants_for(num_tokens):
            tight = fitted(weight.layout, variant)
            for num_parts in () if tight is None else _parts(weight, tight, num_tokens):
                assert tight is not None
                run = partial(mma, tiling=MmaTiling(variant=tight, num_parts=num_parts))
                error = relative_error(run(x, weight), wanted)
                us = time_us([partial(run, x, copy) for copy in weights])
                found.append(make(name=_name(tight, num_parts), us=us, error=error))
        found.sort(key=lambda timing: timing.us)
        best = "; ".join(f"{t.us:.1f} ({t.name})" for t in found[:3])
        wrong = sum(not timing.error < _ERROR_LIMIT for timing in found)
        print(
            f"{matrix:8} {type_name} {num_tokens:4} copy {copy_us:6.1f} triton {old.us:7.1f} | "
            f"{best}" + (f" {wrong} WRONG" if wrong else ""),
            flush=True,
        )
        yield from (old, *found)


def print_step(timings: list[Timing], rows: list[int]) -> None:
    """All matrices of a decode step: by the Triton kernel, and by the best of each matrix."""

    def total_ms(num_tokens: int, is_old: bool) -> float:
        total = 0.0
        for matrix, _, _, type_name in MATRICES:
            times = [t.us for t in timings if t.num_tokens == num_tokens and t.matrix == matrix
                     and t.type_name == type_name and (t.name == "triton") == is_old]  # fmt: skip
            total += min(times) * _NUM_LAYERS * _STEP_WEIGHTS.get(matrix, 1 / _NUM_LAYERS)
        return total / 1e3

    for num_tokens in rows:
        old, new = total_ms(num_tokens, True), total_ms(num_tokens, False)
        print(f"step of {num_tokens:4} rows: triton {old:.2f} ms, best {new:.2f} ms")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeserve.bench.quant_sweep")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--only", metavar="TEXT", default="", help="matrices whose name has TEXT")
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings there too")
    options = parser.parse_args(arguments)
    half, single = torch.float16, torch.float32
    checked = [(name, v, dtype) for name in LAYOUTS for v in _check_variants()
               for dtype in (half, single)]  # fmt: skip
    timed = [(name, v, half) for name in ("Q4_K", "Q6_K") for rows in options.rows
             for v in variants_for(rows)]  # fmt: skip
    fitting = [(name, fitted(LAYOUTS[name], v), dtype) for name, v, dtype in (*checked, *timed)]
    compile_all((name, variant, dtype) for name, variant, dtype in fitting if variant is not None)
    if not torch.cuda.is_available() or not has_mma(torch.device("cuda", 0)):
        parser.error("torch sees no Hopper card, or there is no NVRTC")
    num_failed = check()
    if options.check:
        return 1 if num_failed else 0
    from pipeserve.bench.ceilings import measure_ceilings

    copy_speed = measure_ceilings(torch.device("cuda", 0)).copy_bytes_per_s / 1e6
    print(f"{torch.cuda.get_device_name()}, copy {copy_speed / 1e6:.2f} TB/s; microseconds")
    timings: list[Timing] = []
    for matrix, num_rows, num_columns, type_name in MATRICES:
        if options.only in matrix:
            shape = (num_rows, num_columns)
            timings += time_matrix(matrix, type_name, shape, options.rows, copy_speed)
    if not options.only:
        print_step(timings, options.rows)
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(t) for t in timings], indent=1))
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
