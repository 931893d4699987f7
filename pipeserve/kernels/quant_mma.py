"""A batch of f16 rows times a planar quantised matrix on Hopper: the host side of quant_mma.cu.

Measured by bench/quant_sweep.py; no backend uses it yet. takes_mma says for which matrices it is
made. Sums are added in a fixed order, so results do not change from run to run. Twin:
quant_reference.matmul.

Shapes: T tokens, N outputs, K inputs. A step is 256 columns.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from pipeserve.kernels.nvrtc import (
    CudaKernel,
    cached_cubin,
    load_kernel,
    nvrtc_library,
    tensor_map,
)
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight, QuantLayout, ScaleKind
from pipeserve.kernels.quant_split import card_limits

ARCH = "sm_90a"
STEP_COLUMNS = 256
MAX_PARTS = 8
"""Blocks of a cluster: what every card allows."""
_ROW_ALIGNMENT = 16
_SHARED_BYTES, _BLOCK_SHARED_BYTES, _RESERVED_BYTES = 228 * 1024, 227 * 1024, 1024
"""Of a Hopper multiprocessor, of them for one block at most, and what each block takes besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MmaVariant:
    """What a kernel is compiled for, beside the type of the weights."""

    block_t: int
    """Tokens of a block: a multiple of 8 up to 256."""
    warpgroups: int
    tiles: int
    """Of 64 outputs, per warpgroup."""
    num_stages: int
    """Steps of weights in flight or in use."""
    x_blocks: int = 4
    """Blocks of 64 columns of x that arrive together: 1, 2 or 4."""
    x_slots: int = 0
    """As many arrivals of x in flight or in use; 0: as many columns as of the weights."""
    blocks_at_once: int = 1
    """Per multiprocessor: bounds the registers of a thread."""

    @property
    def block_n(self) -> int:
        return self.warpgroups * self.tiles * 64

    @property
    def num_x_slots(self) -> int:
        return self.x_slots or self.num_stages * 4 // self.x_blocks

    @property
    def num_threads(self) -> int:
        return self.warpgroups * 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MmaTiling:
    """How a product is cut; a result's bits depend on it."""

    variant: MmaVariant
    num_parts: int
    """Of the columns: blocks of a cluster."""


def shared_bytes(layout: QuantLayout, variant: MmaVariant) -> int:
    """Dynamic shared memory of a block: the rings, at the end the sums on their way out."""
    row_bytes = STEP_COLUMNS * (layout.low_bits + layout.high_bits) // 8
    row_bytes += 16 * (layout.word_bytes == 4) + 16 * (layout.scale_kind == "half_min")
    stage = -(-variant.block_n * row_bytes // 1024) * 1024
    x_slot = variant.x_blocks * 128 * variant.block_t
    rings = variant.num_stages * (stage + 16) + variant.num_x_slots * (x_slot + 16)
    return 1024 + max(rings, (variant.block_n + 4) * variant.block_t * 4)


def fitted(layout: QuantLayout, variant: MmaVariant) -> MmaVariant | None:
    """With as many stages, up to its own, as let blocks_at_once fit a multiprocessor, or None."""
    for num_stages in range(variant.num_stages, 1, -1):
        fewer = replace(variant, num_stages=num_stages)
        block_bytes = shared_bytes(layout, fewer)
        held_bytes = (block_bytes + _RESERVED_BYTES) * fewer.blocks_at_once
        if block_bytes <= _BLOCK_SHARED_BYTES and held_bytes <= _SHARED_BYTES:
            return fewer
    return None


def takes_mma(x_TK: Tensor, weight: PlanarWeight) -> bool:
    """Whether mma can multiply these: f16 on Hopper, whole steps of columns, aligned rows."""
    return (
        x_TK.dtype == torch.float16
        and weight.num_columns % STEP_COLUMNS == 0
        and weight.num_rows % 2 == 0
        and x_TK.stride(1) == 1
        and x_TK.stride(0) * 2 % _ROW_ALIGNMENT == 0
        and x_TK.data_ptr() % _ROW_ALIGNMENT == 0
        and has_mma(x_TK.device)
    )


@cache
def has_mma(device: torch.device) -> bool:
    """Whether it is a Hopper card and NVRTC is there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and nvrtc_library() is not None


def mma(
    x_TK: Tensor, weight: PlanarWeight, bias_N: Tensor | None = None,
    *, out_dtype: torch.dtype | None = None, tiling: MmaTiling | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b [T, N] in f16 or, as out_dtype, float32, for any number of tokens.

    Weights are rounded to f16. tiling overrides the measured choice.
    """
    num_tokens, num_rows = x_TK.shape[0], weight.num_rows
    num_steps = weight.num_columns // STEP_COLUMNS
    assert x_TK.shape[1] == weight.num_columns, f"{x_TK.shape[1]}, not {weight.num_columns} columns"
    assert bias_N is None or bias_N.dtype == torch.float16, f"a bias in {bias_N.dtype}"
    if tiling is None:
        tiling = choose_mma_tiling(weight, num_tokens, x_TK.device)
    variant, out_dtype = tiling.variant, out_dtype or x_TK.dtype
    out_TN = torch.empty((num_tokens, num_rows), dtype=out_dtype, device=x_TK.device)
    token_tiles = -(-num_tokens // variant.block_t)
    row_tiles = -(-num_rows // variant.block_n)
    x_map = tensor_map(x_TK, box_rows=variant.block_t, box_columns=64, swizzle=128)
    maps = _weight_maps(weight, variant.block_n) + x_map
    pointers = (weight.supers, weight.scales, bias_N, out_TN)
    integers = (num_rows, num_tokens, num_steps, token_tiles)
    _kernel(weight.type_name, variant, out_dtype, x_TK.device).launch(
        num_blocks=row_tiles * token_tiles * tiling.num_parts,
        num_threads=variant.num_threads,
        cluster_size=tiling.num_parts,
        stream=torch.cuda.current_stream(x_TK.device).cuda_stream,
        arguments=(
            ctypes.create_string_buffer(maps, len(maps)),
            *(ctypes.c_void_p(0 if p is None else p.data_ptr()) for p in pointers),
            *map(ctypes.c_int, integers),
        ),
    )
    return out_TN


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


def mma_source(type_name: str, variant: MmaVariant, out_dtype: torch.dtype) -> str:
    """CUDA C++ of one kernel."""
    folder = Path(__file__).parent
    text = (folder / "quant_mma.cu").read_text()
    text = text.replace("// UNPACK", (folder / "quant_mma_unpack.cu").read_text())
    text = text.replace("// WGMMA", _multiply_add(variant.block_t))
    constants = layout_constants(LAYOUTS[type_name]) | {
        "BLOCK_T": variant.block_t,
        "WARPGROUPS": variant.warpgroups,
        "TILES": variant.tiles,
        "STAGES": variant.num_stages,
        "X_BLOCKS": variant.x_blocks,
        "X_SLOTS": variant.num_x_slots,
        "BLOCKS_AT_ONCE": variant.blocks_at_once,
        "OUT_F32": int(out_dtype == torch.float32),
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
    type_name: str, variant: MmaVariant, out_dtype: torch.dtype, device: torch.device
) -> CudaKernel:
    cubin = cached_cubin(mma_source(type_name, variant, out_dtype), ARCH)
    with torch.cuda.device(device):
        return load_kernel(cubin, "quant_mma", shared_bytes(LAYOUTS[type_name], variant))


_VARIANTS = (
    MmaVariant(block_t=8, warpgroups=2, tiles=1, num_stages=4, blocks_at_once=2),
    MmaVariant(block_t=16, warpgroups=2, tiles=1, num_stages=4, blocks_at_once=2),
    MmaVariant(block_t=32, warpgroups=2, tiles=1, num_stages=3, blocks_at_once=2),
    MmaVariant(block_t=64, warpgroups=2, tiles=2, num_stages=3, x_blocks=2),
    MmaVariant(block_t=128, warpgroups=2, tiles=2, num_stages=2, x_blocks=1, x_slots=6),
    MmaVariant(block_t=128, warpgroups=2, tiles=1, num_stages=3, x_blocks=1, x_slots=6),
)
"""By tokens; the last for types whose stages of twice the outputs do not fit. Not yet measured."""


def choose_mma_tiling(weight: PlanarWeight, num_tokens: int, device: torch.device) -> MmaTiling:
    """The smallest variant that holds the tokens, and parts until all multiprocessors have work."""
    most = _VARIANTS[-1].block_t
    wanted = [variant for variant in _VARIANTS if variant.block_t >= min(num_tokens, most)]
    fitting = (fitted(weight.layout, variant) for variant in wanted)
    variant = next(variant for variant in fitting if variant is not None)
    num_tiles = -(-weight.num_rows // variant.block_n) * -(-num_tokens // variant.block_t)
    places = card_limits(device).num_multiprocessors * variant.blocks_at_once
    most_parts = min(MAX_PARTS, weight.num_columns // STEP_COLUMNS)
    num_parts = 1
    while num_parts * 2 <= most_parts and num_tiles * num_parts * 2 <= places * 1.1:
        num_parts *= 2
    return MmaTiling(variant=variant, num_parts=num_parts)
