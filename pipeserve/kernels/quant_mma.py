"""A batch of f16 rows times a planar quantised matrix on Hopper: the host side of quant_mma.cu.

Launched by the stage thread, capturable in a CUDA graph; takes_mma says for which matrices it is
made. Sums are added in a fixed order, so results do not change from run to run. Twin:
quant_reference.matmul.

Shapes: T tokens, N outputs, K inputs. A step is 256 columns.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from pipeserve.kernels import dependent_launch
from pipeserve.kernels.hopper_source import hopper_source
from pipeserve.kernels.interleaved_rows import interleave_rows
from pipeserve.kernels.nvrtc import (
    CudaDriverError,
    CudaKernel,
    cached_cubin,
    load_kernel,
    nvrtc_library,
    tensor_map,
)
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight, QuantLayout, ScaleKind
from pipeserve.kernels.quant_mma_tiling import (
    STEP_COLUMNS,
    MmaTiling,
    MmaVariant,
    choose_mma_tiling,
    shared_bytes,
)
from pipeserve.kernels.quant_split import card_limits

ARCH = "sm_90a"

Turn = Literal["alone", "first", "second"]
"""Of products: the second one, launched right behind the first one by the same interleaved x, runs
beside it; whoever waits for the second has waited for both."""
_TURNS: tuple[Turn, ...] = get_args(Turn)

MmaOutput = torch.dtype | Literal["swiglu"]
"""What a kernel writes: the product in float16 or float32, or in float16 what SwiGLU makes of it,
in two orders of columns."""


def takes_mma(x_TK: Tensor, weight: PlanarWeight, out_TN: Tensor | None = None) -> bool:
    """Whether mma can multiply these: f16 on Hopper, whole steps of columns, rows of the output
    aligned for pairs."""
    return (
        x_TK.dtype == torch.float16
        and is_made_for(weight)
        and x_TK.stride(1) == 1
        and (out_TN is None or _holds_pairs(out_TN))
        and is_hopper(x_TK.device)
    )


def is_made_for(weight: PlanarWeight) -> bool:
    """What takes_mma asks of the matrix."""
    return weight.num_columns % STEP_COLUMNS == 0 and weight.num_rows % 2 == 0


def _holds_pairs(out_TN: Tensor) -> bool:
    pair_bytes = 2 * out_TN.element_size()
    return out_TN.stride(0) % 2 == 0 and out_TN.data_ptr() % pair_bytes == 0


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernel is made for this device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def has_mma(device: torch.device) -> bool:
    """Whether it is a Hopper card and NVRTC is there."""
    return is_hopper(device) and nvrtc_library() is not None


def mma(
    x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None = None,
    *, interleaved_TK: Tensor | None = None, out_dtype: torch.dtype | None = None,
    out_TN: Tensor | None = None, tiling: MmaTiling | None = None, turn: Turn = "alone",
) -> Tensor:  # fmt: skip
    """x W^T + b [T, N] in f16 or, as out_dtype, float32, for any number of tokens.

    Weights are rounded to f16. interleaved_TK: x as interleave_rows has it, where it is known;
    made of x otherwise. out_TN: written to instead; its rows may lie anywhere that
    takes_mma allows. tiling overrides choose_mma_tiling.
    """
    num_tokens, num_rows = x_TK.shape[0], weight.num_rows
    assert x_TK.shape[1] == weight.num_columns, f"{x_TK.shape[1]}, not {weight.num_columns} columns"
    assert bias_N is None or bias_N.dtype == torch.float16, f"a bias in {bias_N.dtype}"
    if out_TN is None:
        out_TN = x_TK.new_empty((num_tokens, num_rows), dtype=out_dtype or x_TK.dtype)
    assert out_TN.shape == (num_tokens, num_rows) and out_TN.stride(1) == 1, "outputs do not fit"
    if tiling is None:
        multiprocessors = card_limits(x_TK.device).num_multiprocessors
        tiling = choose_mma_tiling(
            weight.layout, num_rows, weight.num_columns, num_tokens, multiprocessors
        )
    assert turn == "alone" or interleaved_TK is not None, "x is not there when the second starts"
    _launch(
        x_TK, weight, bias_N, out_TN, None, interleaved_TK=interleaved_TK, tiling=tiling, turn=turn
    )  # fmt: skip
    return out_TN


def takes_swiglu(weight: PlanarWeight, tiling: MmaTiling) -> bool:
    """Whether mma_swiglu can multiply by this matrix so."""
    return weight.is_paired and tiling.num_parts == 1 and tiling.variant.has_pairs


def mma_swiglu(
    x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None = None,
    *, interleaved_TK: Tensor | None = None, tiling: MmaTiling,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """silu(gate) * up [T, N / 2] of mma's outputs, as they are and as interleave_rows has them."""
    num_tokens, num_features = x_TK.shape[0], weight.num_rows // 2
    assert takes_swiglu(weight, tiling), f"{tiling} for {weight.num_rows} rows"
    assert bias_N is None or bias_N.dtype == torch.float16, f"a bias in {bias_N.dtype}"
    out_TF, interleaved_TF = (x_TK.new_empty((num_tokens, num_features)) for _ in range(2))
    _launch(
        x_TK, weight, bias_N, out_TF, interleaved_TF, interleaved_TK=interleaved_TK, tiling=tiling
    )
    return out_TF, interleaved_TF


def _launch(
    x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None, out: Tensor,
    interleaved_TF: Tensor | None, *, interleaved_TK: Tensor | None, tiling: MmaTiling,
    turn: Turn = "alone",
) -> None:  # fmt: skip
    """interleaved_TF: where SwiGLU's outputs go in that order; None: out takes the product's."""
    num_tokens, num_steps = x_TK.shape[0], weight.num_columns // STEP_COLUMNS
    variant = tiling.variant
    assert num_steps >= tiling.num_parts, f"{num_steps} steps for {tiling}"
    if interleaved_TK is None:
        interleaved_TK = interleave_rows(x_TK)
    token_tiles = -(-num_tokens // variant.block_t)
    row_tiles = -(-weight.num_rows // variant.block_n)
    x_map = tensor_map(interleaved_TK, box_rows=variant.block_t, box_columns=64, swizzle=128)
    maps = _weight_maps(weight, variant.block_n) + x_map
    pointers = (weight.supers, weight.scales, bias_N, out, interleaved_TF)
    integers = (
        weight.num_rows, num_tokens, num_steps, token_tiles, out.stride(0), _TURNS.index(turn)
    )  # fmt: skip
    output: MmaOutput = out.dtype if interleaved_TF is None else "swiglu"
    _kernel(weight.type_name, variant, output, x_TK.device).launch(
        num_blocks=row_tiles * token_tiles * tiling.num_parts,
        num_threads=variant.num_threads,
        cluster_size=tiling.num_parts,
        stream=torch.cuda.current_stream(x_TK.device).cuda_stream,
        starts_early=dependent_launch.is_supported(x_TK.device),
        arguments=(
            ctypes.create_string_buffer(maps, len(maps)),
            *(ctypes.c_void_p(0 if p is None else p.data_ptr()) for p in pointers),
            *map(ctypes.c_int, integers),
        ),
    )


def _weight_maps(weight: PlanarWeight, block_n: int) -> bytes:
    """The tensor maps of the planes and words; blank where a type has none."""
    layout, blank = weight.layout, bytes(128)
    maps = []
    for plane, bits in ((weight.low, layout.low_bits), (weight.high, layout.high_bits)):
        row = min(128, STEP_COLUMNS * bits // 8)
        box = {"box_rows": block_n, "box_columns": row, "swizzle": row}
        maps.append(blank if plane is None else tensor_map(plane, **box))
    for words in (weight.scales, weight.mins):
        is_copied = words is not None and words.dtype == torch.int32
        box = {"box_rows": block_n, "box_columns": 4, "swizzle": 0}
        maps.append(tensor_map(words, **box) if words is not None and is_copied else blank)
    return b"".join(maps)


def mma_source(type_name: str, variant: MmaVariant, output: MmaOutput) -> str:
    """CUDA C++ of one kernel."""
    folder = Path(__file__).parent
    text = hopper_source("quant_mma.cu")
    text = text.replace("// UNPACK", (folder / "quant_mma_unpack.cu").read_text())
    text = text.replace("// WGMMA", _multiply_add(variant.block_t))
    if output == "swiglu":
        text = text.replace("// SWIGLU", (folder / "quant_mma_swiglu.cu").read_text())
    constants = layout_constants(LAYOUTS[type_name]) | {
        "BLOCK_T": variant.block_t,
        "WARPGROUPS": variant.warpgroups,
        "TILES": variant.tiles,
        "STAGES": variant.num_stages,
        "X_BLOCKS": variant.x_blocks,
        "X_SLOTS": variant.num_x_slots,
        "BLOCKS_AT_ONCE": variant.blocks_at_once,
        "OUT_F32": int(output == torch.float32),
        "SWIGLU": int(output == "swiglu"),
    }
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + text


def layout_constants(layout: QuantLayout) -> dict[str, int]:
    """The macros that quant_mma_unpack.cu goes by. Table bytes are raised by 128."""
    table = bytes(value + 128 for value in layout.table or (0,) * 16)
    return {
        "LOW_BITS": layout.low_bits,
        "HIGH_BITS": layout.high_bits,
        "GROUP": layout.group_size,
        "OFFSET": layout.offset,
        "SCALES": _SCALE_CODES.index(layout.scale_kind),
        "TABLE": int(layout.table is not None),
    } | {f"TABLE_{i}": int.from_bytes(table[4 * i : 4 * i + 4], "little") for i in range(4)}


_SCALE_CODES: tuple[ScaleKind, ...] = get_args(ScaleKind)


def _multiply_add(block_t: int) -> str:
    """The product of 64 outputs, block_t tokens and 16 columns: PTX ISA, wgmma.mma_async."""
    count = block_t // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    fragment = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    name = f"wgmma.mma_async.sync.aligned.m64n{block_t}k16.f32.f16.f16"
    return f"""DEVICE void multiply_add(float (&d)[{count}], const u32 (&a)[4], u64 b) {{
    asm volatile("{name} {{{sums}}}, {{{fragment}}}, %{count + 4}, 1, 1, 1, 0;"
                 : {outputs} : {inputs}, "l"(b));
}}"""


@cache
def _kernel(
    type_name: str, variant: MmaVariant, output: MmaOutput, device: torch.device
) -> CudaKernel:
    cubin = cached_cubin(mma_source(type_name, variant, output), ARCH)
    with torch.cuda.device(device):
        return load_kernel(
            cubin, "quant_mma", shared_bytes(LAYOUTS[type_name], variant), device=device
        )


@cache
def why_not_loaded(
    type_name: str, variant: MmaVariant, device: torch.device, output: MmaOutput = torch.float16
) -> str | None:
    """Loads the kernel, compiling it where need be; what is in the way, or None. Asked once and for
    all: what failed is not tried again."""
    try:
        _kernel(type_name, variant, output, device)
    except (CudaDriverError, OSError) as problem:
        return str(problem)
    return None


def compile_ahead(kernels: Sequence[tuple[str, MmaVariant, MmaOutput]]) -> None:
    """Machine code into the cache on all cores, about 0.3 s of one core each; failures are left to
    who loads it."""

    def compile_one(kernel: tuple[str, MmaVariant, MmaOutput]) -> None:
        with contextlib.suppress(CudaDriverError, OSError):
            cached_cubin(mma_source(*kernel), ARCH)

    num_threads = max(1, min(len(kernels), os.cpu_count() or 1))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="nvrtc") as executor:
        list(executor.map(compile_one, kernels))
