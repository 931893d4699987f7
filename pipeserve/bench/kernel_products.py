"""Times products with planar matrices as a stage makes them, from one row to a chunk of prefill.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pipeserve.bench.ceilings import Ceilings
from pipeserve.bench.kernel_shapes import KernelShape, Matrix
from pipeserve.bench.kernel_times import KernelTime, Work, num_sets, time_us
from pipeserve.kernels.quant_layout import LAYOUTS, PLANE_BYTES, UNIT, PlanarWeight
from pipeserve.kernels.quant_products import QuantProducts
from pipeserve.kernels.rounded_rows import quantise_rows

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
STEP_ROWS = tuple(rows for rows in ROWS if rows <= 256)


def random_weight(
    type_name: str, num_rows: int, num_columns: int, device: torch.device
) -> PlanarWeight:
    """Random codes under small scales, straight in the planar layout."""
    layout = LAYOUTS[type_name]
    num_units = -(-num_columns // UNIT)

    def plane(bits: int) -> Tensor:
        weights = max(UNIT, PLANE_BYTES * 8 // bits)
        num_bytes = -(-num_columns // weights) * weights * bits // 8
        return torch.randint(0, 256, (num_rows, num_bytes), dtype=torch.uint8, device=device)

    def halves(count: int, dtype: torch.dtype) -> Tensor:
        return (torch.rand(num_rows, count, device=device) * 1e-3 + 1e-4).half().view(dtype)

    if layout.scale_kind.startswith("half"):
        scales = halves(num_units * 2, torch.int32)
    else:
        limit = 124 if layout.scale_kind == "power" else 256
        shape = (num_rows, num_units * layout.word_bytes)
        random_bytes = torch.randint(limit - 8, limit, shape, dtype=torch.uint8, device=device)
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

    return [weight] + [
        dataclasses.replace(
            weight,
            low=weight.low.clone(),
            high=clone(weight.high),
            scales=weight.scales.clone(),
            mins=clone(weight.mins),
            supers=clone(weight.supers),
        )
        for _ in range(num_sets(weight.num_bytes) - 1)
    ]


def product_work(weight: PlanarWeight, num_tokens: int) -> Work:
    """Weight, activations and outputs in f16 once; a multiplication and an addition per weight and
    token."""
    num_values = num_tokens * (weight.num_rows + weight.num_columns)
    return Work(
        num_bytes=weight.num_bytes + 2 * num_values,
        flops=2 * num_tokens * weight.num_rows * weight.num_columns,
    )


def time_products(
    shape: KernelShape, ceilings: Ceilings, products: QuantProducts, device: torch.device
) -> Iterator[KernelTime]:
    """Every matrix, and their sums over a decode step where its matrices are known."""
    sums = dict.fromkeys(STEP_ROWS, (0.0, 0.0))
    for matrix in shape.matrices:
        weights = copies_beyond_cache(
            random_weight(matrix.type_name, matrix.num_rows, matrix.num_columns, device)
        )
        products.prepare(weights[:1])
        for num_tokens in ROWS:
            time = _time_product(shape, matrix, weights, num_tokens, ceilings, products)
            yield time
            if num_tokens in sums and matrix.per_step is not None:
                us, limit_us = sums[num_tokens]
                count = matrix.per_step
                sums[num_tokens] = (us + count * time.us, limit_us + count * time.limit_us)
        del weights
        torch.cuda.empty_cache()
    is_whole = all(matrix.per_step is not None for matrix in shape.matrices)
    for num_tokens, (us, limit_us) in sums.items():
        yield KernelTime(
            group="products", model=shape.name, size=f"{num_tokens} rows", us=us,
            kernel="all of a step" if is_whole else "all but experts", limit_us=limit_us,
        )  # fmt: skip


def _time_product(
    shape: KernelShape, matrix: Matrix, weights: Sequence[PlanarWeight], num_tokens: int,
    ceilings: Ceilings, products: QuantProducts,
) -> KernelTime:  # fmt: skip
    weight = weights[0]
    x_TK = torch.randn(
        num_tokens, weight.num_columns, device=weight.low.device, dtype=torch.float16
    )
    if products.takes_bytes(weight, num_tokens):
        rows = quantise_rows(x_TK)
        calls = [partial(products.few_rows, rows, copy, None) for copy in weights]
        note = str(products.few_rows_way(weight, num_tokens))
    else:
        calls = [partial(products.batch, x_TK, copy, None) for copy in weights]
        note = str(products.batch_way(weight, num_tokens))
    return KernelTime(
        group="products",
        model=shape.name,
        kernel=f"{matrix.name} {matrix.num_rows}x{matrix.num_columns} {matrix.type_name}",
        size=f"{num_tokens} rows",
        us=time_us(calls),
        limit_us=product_work(weight, num_tokens).limit_us(ceilings),
        note=note,
    )
