"""Times the kernels on quantised weights with the matrices of an 8B Llama, on the GPU at hand.

`python -m pipeserve.bench.quant_kernels` prints one line per matrix, type and number of rows:
microseconds of the kernel for few rows (activations quantised beforehand), of the one for batches,
and of torch's bf16 product, with the weight's bytes as a share of the measured copy speed. Each
number is the median of replays of a CUDA graph that goes through copies of the weight until it has
left the cache; each result is first compared with its twin.
"""

# torch.cuda has no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.bench.ceilings import measure_ceilings
from pipeserve.kernels import quant_reference
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_gemv import MAX_ROWS, gemv
from pipeserve.kernels.quant_layout import LAYOUTS, PLANE_BYTES, UNIT, PlanarWeight
from pipeserve.kernels.rounded_rows import quantise_rows

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MATRICES = (
    ("output", 4096, 4096, "Q4_K"),
    ("qkv", 6144, 4096, "Q4_K"),
    ("gate_up", 28672, 4096, "Q4_K"),
    ("down", 4096, 14336, "Q4_K"),
    ("down", 4096, 14336, "Q6_K"),
    ("head", 128256, 4096, "Q6_K"),
)
_BYTES_BEYOND_CACHE = 300_000_000
_REPLAYS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One line of the table; times in microseconds."""

    matrix: str
    num_rows: int
    num_columns: int
    type_name: str
    num_tokens: int
    copy_us: float
    """What reading the weight takes at the measured copy speed."""
    few_rows_us: float | None
    batch_us: float
    bf16_us: float
    error: float
    """The largest relative error of the kernels against the twin in float32."""


def random_weight(type_name: str, num_rows: int, num_columns: int) -> PlanarWeight:
    """Random codes under small scales, straight in the planar layout."""
    layout = LAYOUTS[type_name]
    num_units = -(-num_columns // UNIT)

    def plane(bits: int) -> Tensor:
        weights = max(UNIT, PLANE_BYTES * 8 // bits)
        num_bytes = -(-num_columns // weights) * weights * bits // 8
        return torch.randint(0, 256, (num_rows, num_bytes), dtype=torch.uint8, device="cuda")

    def halves(count: int, dtype: torch.dtype) -> Tensor:
        return (torch.rand(num_rows, count, device="cuda") * 1e-3 + 1e-4).half().view(dtype)

    if layout.scale_kind.startswith("half"):
        scales = halves(num_units * 2, torch.int32)
    else:
        limit = 124 if layout.scale_kind == "power" else 256
        shape = (num_rows, num_units * layout.word_bytes)
        random_bytes = torch.randint(limit - 8, limit, shape, dtype=torch.uint8, device="cuda")
        scales = random_bytes.view(torch.int16 if layout.word_bytes == 2 else torch.int32)
    supers = None
    if layout.block_size == 256:
        count = num_columns // 256
        has_min = layout.has_min
        supers = halves(count * (1 + has_min), torch.int32 if has_min else torch.int16)
    return PlanarWeight(
        type_name=type_name,
        num_rows=num_rows,
        num_columns=num_columns,
        low=plane(layout.low_bits),
        high=plane(layout.high_bits) if layout.high_bits else None,
        scales=scales,
        mins=halves(num_units * 2, torch.int32) if layout.scale_kind == "half_min" else None,
        supers=supers,
    )


def copies_beyond_cache(weight: PlanarWeight) -> list[PlanarWeight]:
    """The weight and as many copies as keep any of them from staying in the cache."""

    def clone(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    num_copies = _BYTES_BEYOND_CACHE // weight.num_bytes
    return [weight] + [
        dataclasses.replace(
            weight,
            low=weight.low.clone(),
            high=clone(weight.high),
            scales=weight.scales.clone(),
            mins=clone(weight.mins),
            supers=clone(weight.supers),
        )
        for _ in range(num_copies)
    ]


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time per call of a CUDA graph that makes all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(calls)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def measure(
    matrix: str, weights: Sequence[PlanarWeight], values_NK: Tensor, dense: Sequence[Tensor],
    num_tokens: int, copy_speed: float,
) -> Measurement:  # fmt: skip
    """values_NK: the first weight in float32. dense: matrices of its shape in bf16."""
    weight = weights[0]
    x = torch.randn(num_tokens, weight.num_columns, device="cuda", dtype=torch.float16)
    wanted = x.float() @ values_NK.T
    errors = [relative_error(gemm(x, weight), wanted)]
    few_rows_us = None
    if num_tokens <= MAX_ROWS:
        rows = quantise_rows(x)
        errors.append(relative_error(gemv(rows, weight), wanted))
        calls = [partial(gemv, rows, copy, out_dtype=torch.float16) for copy in weights]
        few_rows_us = time_us(calls)
    x_bf16 = x.bfloat16()
    return Measurement(
        matrix=matrix,
        num_rows=weight.num_rows,
        num_columns=weight.num_columns,
        type_name=weight.type_name,
        num_tokens=num_tokens,
        copy_us=weight.num_bytes / copy_speed,
        few_rows_us=few_rows_us,
        batch_us=time_us([partial(gemm, x, copy) for copy in weights]),
        bf16_us=time_us([partial(functional.linear, x_bf16, copy) for copy in dense]),
        error=max(errors),
    )


def print_row(row: Measurement, matrix_rate: float) -> None:
    best_us = min(row.batch_us, row.few_rows_us or row.batch_us)
    flop = 2 * row.num_tokens * row.num_rows * row.num_columns
    few_rows = "" if row.few_rows_us is None else f"{row.few_rows_us:.1f}"
    print(
        f"{row.matrix:8} {row.num_rows:6}x{row.num_columns:5} {row.type_name:6} "
        f"{row.num_tokens:5} {row.copy_us:8.1f} {few_rows:>8} {row.batch_us:8.1f} "
        f"{row.bf16_us:8.1f} {row.copy_us / best_us:8.0%} {flop / best_us / matrix_rate:8.0%} "
        f"{row.error:8.1e}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeserve.bench.quant_kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    ceilings = measure_ceilings(torch.device("cuda", torch.cuda.current_device()))
    copy_speed, matrix_rate = ceilings.copy_bytes_per_s / 1e6, ceilings.matmul_flops_per_s / 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"copy {copy_speed / 1e6:.2f} TB/s, bf16 product {matrix_rate / 1e6:.0f} TFLOP/s")
    titles = ("us: copy", "few rows", "batch", "bf16", "of copy", "of prod.", "error")
    print(f"{'matrix':8} {'rows x cols':12} type    toks " + " ".join(f"{t:>8}" for t in titles))
    table = []
    for matrix, num_rows, num_columns, type_name in MATRICES:
        weights = copies_beyond_cache(random_weight(type_name, num_rows, num_columns))
        values_NK = quant_reference.dequantise(weights[0])
        dense = [dequantise(weight) for weight in weights[:4]]
        for num_tokens in ROWS:
            table.append(measure(matrix, weights, values_NK, dense, num_tokens, copy_speed))
            print_row(table[-1], matrix_rate)
        scratch = torch.empty_like(dense[0])
        us = time_us([partial(dequantise, weight, out=scratch) for weight in weights])
        moved = weights[0].num_bytes + scratch.nbytes
        print(f"{matrix:8} dequantise to bf16 {us:.1f} us, {moved / us / copy_speed:.0%} of copy")
    for num_tokens in (1, MAX_ROWS):
        x = torch.randn(num_tokens, 4096, device="cuda", dtype=torch.float16)
        us = time_us([partial(quantise_rows, x)] * 200)
        print(f"quantise {num_tokens} x 4096: {us:.1f} us")
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in table], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
