"""Compares ways to cut a product on integer tensor cores: checks them, times them, names the best
per matrix of an 8B model and number of rows, beside the other kernels.

`python -m pipeserve.bench.imma_sweep`; --json FILE keeps every number.

Shapes: T tokens, N outputs, K inputs.
"""

# torch.cuda and Tensor.unflatten have no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeserve.bench.ceilings import measure_ceilings
from pipeserve.bench.kernel_products import copies_beyond_cache, random_weight
from pipeserve.bench.kernel_shapes import Matrix, kernel_shape
from pipeserve.bench.kernel_times import time_us
from pipeserve.kernels import quant_imma, quant_mma
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_gemv import MAX_ROWS, gemv
from pipeserve.kernels.quant_imma import (
    STEP_COLUMNS,
    ImmaTiling,
    ImmaVariant,
    choose_imma_tiling,
    fitted,
    has_imma,
    imma,
)
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight, planar_bytes
from pipeserve.kernels.quant_products import QuantProducts, multiply
from pipeserve.kernels.quant_reference import ACTIVATION_GROUP, QuantisedRows
from pipeserve.kernels.quant_split import CardLimits, card_limits
from pipeserve.kernels.quant_tuned import tuned_table
from pipeserve.kernels.quant_ways import Imma
from pipeserve.kernels.rounded_rows import quantise_rows

ROWS = (5, 8, 12, 16, 24, 32, 48, 64)
_TRITON_ROWS = (8, 16, 32, 64)
"""Where the kernels that Triton compiles, which takes it seconds, are timed beside."""
_CHECK_SHAPE = (460, 1792)
_ERROR_LIMIT = 6e-4
_PLACES = ((4, 1, 4, 4), (4, 1, 6, 2), (8, 1, 4, 2), (4, 2, 4, 2), (2, 2, 4, 4), (8, 2, 4, 1))
"""Warps, row tiles, stages and blocks at once: for up to 16 tokens."""
_WIDE_PLACES = ((4, 1, 4, 3), (4, 2, 4, 2), (8, 1, 4, 2), (8, 2, 4, 1))


def variants(num_tokens: int) -> Iterator[ImmaVariant]:
    """Candidates for so many tokens."""
    whole = -(-num_tokens // 8) * 8
    block_sizes = (whole,) if whole <= 32 else (whole, whole // 2)
    for block_t in block_sizes:
        for warps, row_tiles, num_stages, blocks in _PLACES if block_t <= 16 else _WIDE_PLACES:
            yield ImmaVariant(
                block_t=block_t, warps=warps, row_tiles=row_tiles, num_stages=num_stages,
                blocks_at_once=blocks,
            )  # fmt: skip


def _fitted(type_name: str, variant: ImmaVariant, card: CardLimits) -> ImmaVariant | None:
    return fitted(LAYOUTS[type_name], variant, card.shared_bytes, card.shared_bytes + 1024)


def tilings(
    type_name: str, num_rows: int, num_columns: int, num_tokens: int, card: CardLimits
) -> Iterator[ImmaTiling]:
    """Variants that fit, each with parts that neither leave most of the card idle nor make many
    more blocks than run at once."""
    for variant in variants(num_tokens):
        tight = _fitted(type_name, variant, card)
        if tight is None:
            continue
        num_tiles = -(-num_rows // tight.block_n) * -(-num_tokens // tight.block_t)
        places = card.num_multiprocessors * tight.blocks_at_once
        for num_parts in (1, 2, 4, 8):
            num_blocks = num_tiles * num_parts
            is_idle = num_blocks < 0.4 * places and num_parts < 8
            is_crowd = num_parts > 1 and num_blocks > 2.2 * places
            if not is_idle and not is_crowd and num_columns // STEP_COLUMNS // num_parts >= 2:
                yield ImmaTiling(variant=tight, num_parts=num_parts)


def prepared_tilings(weight: PlanarWeight, num_tokens: int) -> list[ImmaTiling]:
    """The candidates of this product, the rule's first, that could be compiled and loaded."""
    device, type_name = weight.low.device, weight.type_name
    found = _all_tilings(
        type_name, weight.num_rows, weight.num_columns, num_tokens, card_limits(device)
    )
    wanted = dict.fromkeys((type_name, tiling.variant) for tiling in found)
    quant_imma.compile_ahead(list(wanted), torch.cuda.get_device_capability(device))
    usable = {kernel for kernel in wanted if quant_imma.why_not_loaded(*kernel, device) is None}
    return [tiling for tiling in found if (type_name, tiling.variant) in usable]


def _check_variants() -> list[ImmaVariant]:
    make = partial(ImmaVariant, num_stages=3)
    return [
        make(block_t=8, warps=4, row_tiles=1, blocks_at_once=4),
        make(block_t=24, warps=2, row_tiles=2, blocks_at_once=2),
        make(block_t=64, warps=4, row_tiles=1),
    ]


Job = Callable[[], object]


def _compile(
    type_name: str, variant: ImmaVariant, out_dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    quant_imma.compile_ahead([(type_name, variant)], capability, out_dtype)


def _compile_others(matrix: Matrix, num_tokens: int, device: torch.device) -> None:
    """The other kernels of this product, by running them once."""
    weight = random_weight(matrix.type_name, matrix.num_rows, matrix.num_columns, device)
    x_TK = torch.zeros(num_tokens, matrix.num_columns, device=device, dtype=torch.float16)
    for call in _others(x_TK, weight).values():
        call(weight)


def _others(x_TK: Tensor, weight: PlanarWeight) -> dict[str, Callable[[PlanarWeight], Tensor]]:
    """The kernels beside, of matrices like this one; f16: what is used without this kernel."""
    calls: dict[str, Callable[[PlanarWeight], Tensor]] = {}
    num_tokens, device = x_TK.shape[0], x_TK.device
    if quant_mma.has_mma(device):
        calls["mma"] = partial(quant_mma.mma, x_TK)
    if num_tokens not in _TRITON_ROWS:
        return calls
    calls["gemm"] = partial(gemm, x_TK)
    products = QuantProducts(tuned_table(torch.cuda.get_device_name(device)))
    calls["f16"] = partial(multiply, products.batch_way(weight, num_tokens), x_TK)
    if num_tokens <= MAX_ROWS:
        calls["gemv"] = partial(gemv, quantise_rows(x_TK), out_dtype=x_TK.dtype)
    return calls


def compile_all(matrices: Sequence[Matrix], rows: Sequence[int], device: torch.device) -> None:
    """Into the caches, in processes of their own."""
    start = time.monotonic()
    card, capability = card_limits(device), torch.cuda.get_device_capability(device)
    half, single = torch.float16, torch.float32
    wanted = {
        (name, tight, dtype)
        for name in LAYOUTS
        for variant in _check_variants()
        for dtype in (half, single)
        if (tight := _fitted(name, variant, card)) is not None
    }
    for matrix in matrices:
        shape = (matrix.type_name, matrix.num_rows, matrix.num_columns)
        wanted |= {
            (matrix.type_name, tiling.variant, half)
            for num_tokens in rows
            for tiling in _all_tilings(*shape, num_tokens, card)
        }
    others: list[Job] = [
        partial(_compile_others, matrix, num_tokens, device)
        for matrix in matrices
        for num_tokens in rows
        if num_tokens in _TRITON_ROWS
    ]
    jobs = others + [partial(_compile, *kernel, capability) for kernel in wanted]
    num_processes = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(job) for job in jobs]:
            if (problem := future.exception()) is not None:
                print(f"not compiled: {problem}")
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - start:.1f} s", flush=True)


def _all_tilings(
    type_name: str, num_rows: int, num_columns: int, num_tokens: int, card: CardLimits
) -> list[ImmaTiling]:
    """The rule's first."""
    layout = LAYOUTS[type_name]
    rule = choose_imma_tiling(layout, num_rows, num_columns, num_tokens, card)
    return list(dict.fromkeys((rule, *tilings(type_name, num_rows, num_columns, num_tokens, card))))


def _values_of(rows: QuantisedRows) -> Tensor:
    """float32 [T, K]: what the bytes stand for."""
    groups_TGI: Tensor = rows.codes_TK.unflatten(1, (-1, ACTIVATION_GROUP)).float()
    return (groups_TGI * rows.scales_TG.unsqueeze(-1)).flatten(1)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def check(device: torch.device) -> int:
    """Every type, odd sizes, parts, a bias: errors against a float32 product of the same values.
    The number of failures."""
    card = card_limits(device)
    num_rows, num_columns = _CHECK_SHAPE
    num_failed = num_done = 0
    for type_name in LAYOUTS:
        weight = random_weight(type_name, num_rows, num_columns, device)
        values_NK = dequantise(weight, torch.float32)
        bias = torch.randn(num_rows, device=device).half()
        for variant in _check_variants():
            tight = _fitted(type_name, variant, card)
            if tight is None:
                continue
            for num_tokens, num_parts in ((1, 1), (7, 4), (tight.block_t + 3, 2), (64, 8)):
                rows = quantise_rows(torch.randn(num_tokens, num_columns, device=device).half())
                wanted = _values_of(rows) @ values_NK.T + bias.float()
                tiling = ImmaTiling(variant=tight, num_parts=num_parts)
                run = partial(imma, rows, weight, bias, tiling=tiling)
                got = run(out_dtype=torch.float32)
                error = max(_error(got, wanted), _error(run(), wanted) - 3e-4)
                is_same = all(torch.equal(got, run(out_dtype=torch.float32)) for _ in range(3))
                num_done += 1
                # Q2_K's sums of two groups are rounded to a unit of its small codes.
                limit = 4e-4 if type_name == "Q2_K" else 1e-4
                if not error < limit or not is_same:
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
    per_step: int
    num_tokens: int
    name: str
    us: float
    error: float


def time_matrix(
    matrix: Matrix, rows: Sequence[int], device: torch.device, copy_bytes_per_s: float
) -> Iterator[Timing]:
    """Every candidate and the other kernels; prints the best."""
    card = card_limits(device)
    shape = (matrix.type_name, matrix.num_rows, matrix.num_columns)
    weights = copies_beyond_cache(random_weight(*shape, device))
    values_NK = dequantise(weights[0], torch.float32)
    copy_us = weights[0].num_bytes / copy_bytes_per_s * 1e6
    for num_tokens in rows:
        x_TK = torch.randn(num_tokens, matrix.num_columns, device=device).half()
        quantised = quantise_rows(x_TK)
        wanted = _values_of(quantised) @ values_NK.T
        make = partial(
            Timing, matrix=f"{matrix.num_rows}x{matrix.num_columns}", type_name=matrix.type_name,
            per_step=matrix.per_step or 0, num_tokens=num_tokens,
        )  # fmt: skip
        found = []
        for tiling in _all_tilings(*shape, num_tokens, card):
            run = partial(imma, quantised, tiling=tiling)
            error = _error(run(weights[0]), wanted)
            us = time_us([partial(run, weight) for weight in weights])
            found.append(make(name=str(Imma(tiling=tiling)), us=us, error=error))
        rule_us = found[0].us
        others = [
            make(
                name=name, us=time_us([partial(call, weight) for weight in weights]),
                error=_error(call(weights[0]), wanted),
            )
            for name, call in _others(x_TK, weights[0]).items()
        ]  # fmt: skip
        best = sorted(found, key=lambda timing: timing.us)[:3]
        wrong = sum(not timing.error < _ERROR_LIMIT for timing in found)
        print(
            f"{found[0].matrix} {matrix.type_name} {num_tokens:3}: copy {copy_us:.1f} "
            + " ".join(f"{t.name} {t.us:.1f}" for t in others)
            + f" | rule {rule_us:.1f} best "
            + "; ".join(f"{t.us:.1f} ({t.name})" for t in best)
            + (f" {wrong} WRONG" if wrong else ""),
            flush=True,
        )
        yield from (*others, *found)
    del weights, values_NK
    torch.cuda.empty_cache()


def print_step(timings: Sequence[Timing], rows: Sequence[int], copy_ms: float) -> None:
    """All matrices of a decode step, by each kernel and by the best variant of this one."""
    others = ("gemv", "gemm", "mma", "f16")
    print(f"milliseconds of all matrices of an 8B's step; copy {copy_ms:.2f}")
    for num_tokens in rows:
        totals: dict[str, float] = {}
        for key in dict.fromkeys((t.matrix, t.type_name) for t in timings):
            times: dict[str, float] = {}
            for t in timings:
                if (t.matrix, t.type_name) == key and t.num_tokens == num_tokens:
                    name = t.name if t.name in others else "imma"
                    times[name] = min(times.get(name, float("inf")), t.us * t.per_step / 1e3)
            for name, ms in times.items():
                totals[name] = totals.get(name, 0.0) + ms
        print(f"{num_tokens:3} rows: " + ", ".join(f"{n} {ms:.2f}" for n, ms in totals.items()))


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where a product is wrong."""
    parser = argparse.ArgumentParser(prog="python -m pipeserve.bench.imma_sweep")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--only", metavar="TEXT", default="", help="matrices whose name has TEXT")
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings there too")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available() or not has_imma(device):
        parser.error("torch sees no NVIDIA card from Ampere on, or there is no NVRTC")
    matrices = [m for m in kernel_shape("llama-8b").matrices if options.only in m.name]
    compile_all([] if options.check else matrices, options.rows, device)
    num_failed = check(device)
    if options.check:
        return 1 if num_failed else 0
    copy_speed = measure_ceilings(device).copy_bytes_per_s
    print(f"{torch.cuda.get_device_name()}, copy {copy_speed / 1e12:.2f} TB/s; microseconds")
    timings: list[Timing] = []
    for matrix in matrices:
        timings += time_matrix(matrix, options.rows, device, copy_speed)
    print_step(timings, options.rows, _copy_ms(matrices, copy_speed))
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(t) for t in timings], indent=1))
    return 1 if num_failed else 0


def _copy_ms(matrices: Sequence[Matrix], copy_bytes_per_s: float) -> float:
    num_bytes = sum(
        planar_bytes(m.type_name, m.num_rows, m.num_columns) * (m.per_step or 0) for m in matrices
    )
    return num_bytes / copy_bytes_per_s * 1e3


if __name__ == "__main__":
    sys.exit(main())
