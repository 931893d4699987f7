"""Adds the partial sums of products whose columns were cut into parts, in a fixed order.

Launched by the stage thread, capturable in a CUDA graph.

Shapes: P parts, T tokens, N outputs.
"""

# Triton's decorator and its functions' arguments have no types to annotate.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase
from pipeserve.kernels.dependent_launch import (
    launch_options,
    start_next_kernel,
    wait_for_inputs,
)

_SHARED_BYTES_ANYWHERE = 64 * 1024
_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CardLimits:
    """What a choice of tiles goes by."""

    num_multiprocessors: int
    shared_bytes: int
    """Shared memory that one program may have."""


@cache
def card_limits(device: torch.device) -> CardLimits:
    """Of the card, or of a small made-up one where Triton's interpreter runs."""
    if device.type != "cuda":
        return CardLimits(num_multiprocessors=4, shared_bytes=_SHARED_BYTES_ANYWHERE)
    properties = torch.cuda.get_device_properties(device)
    return CardLimits(
        num_multiprocessors=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", _SHARED_BYTES_ANYWHERE),
    )


def has_ptx(device: torch.device) -> bool:
    """Whether kernels may use inline PTX."""
    return device.type == "cuda" and torch.version.cuda is not None


@triton.jit
def sum_parts_kernel(
    parts, bias, out, num_values, num_rows, out_stride, num_parts: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next_kernel(PDL)
    wait_for_inputs(PDL)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_values
    total = tl.load(parts + index, mask=mask, other=0)
    for part in tl.static_range(1, num_parts):
        total += tl.load(parts + part * num_values.to(tl.int64) + index, mask=mask, other=0)
    if bias is not None:
        total += tl.load(bias + index % num_rows, mask=mask, other=0).to(tl.float32)
    index = index // num_rows * out_stride + index % num_rows
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)


def sum_parts(
    parts_PTN: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    *,
    out_TN: Tensor | None = None,
) -> Tensor:
    """float32 [P, T, N] -> [T, N] in out_dtype, or in out_TN, whose rows may lie anywhere."""
    num_parts, num_tokens, num_rows = parts_PTN.shape
    if out_TN is None:
        out_TN = torch.empty((num_tokens, num_rows), dtype=out_dtype, device=parts_PTN.device)
    num_values = num_tokens * num_rows
    sum_parts_kernel[(triton.cdiv(num_values, _BLOCK),)](
        parts_PTN, bias_N, out_TN, num_values, num_rows, out_TN.stride(0), num_parts,
        BLOCK=_BLOCK, **launch_options(parts_PTN.device),
    )  # fmt: skip
    return out_TN


AOT_CASES: tuple[AotCase, ...] = tuple(
    AotCase(
        name=f"sum_parts_{out}",
        kernel=sum_parts_kernel,
        signature={
            "parts": "*fp32", "bias": f"*{out}", "out": f"*{out}", "num_values": "i32",
            "num_rows": "i32", "out_stride": "i32",
        },
        constexprs={"num_parts": 4, "BLOCK": _BLOCK, "PDL": True},
    )
    for out in ("fp16", "bf16")
)  # fmt: skip
