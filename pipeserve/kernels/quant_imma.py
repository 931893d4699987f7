"""Activations as bytes times a planar matrix on integer tensor cores: the host side of
quant_imma.cu, for 5 to 64 rows.

Launched by the stage thread, capturable in a CUDA graph; takes_imma says for which matrices it is
made. Sums are added in a fixed order, so results do not change from run to run. Twin:
quant_reference.matmul_int8.

Shapes: T tokens, N outputs, K inputs. A step is 256 columns.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from pipeserve.kernels.nvrtc import (
    CudaDriverError,
    CudaKernel,
    cached_cubin,
    load_kernel,
    nvrtc_library,
)
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight, QuantLayout
from pipeserve.kernels.quant_mma import layout_constants
from pipeserve.kernels.quant_reference import QuantisedRows
from pipeserve.kernels.quant_split import CardLimits, card_limits, sum_parts

STEP_COLUMNS = 256
MAX_PARTS = 8
"""Blocks of a cluster: what every card that has clusters allows."""
FIRST_CAPABILITY = (8, 0)
_CLUSTERS_FROM = (9, 0)
_RESERVED_BYTES = 1024
"""Of a multiprocessor's shared memory, for each block."""
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ImmaVariant:
    """What a kernel is compiled for, beside the type of the weights."""

    block_t: int
    """Tokens of a block: a multiple of 8."""
    warps: int
    row_tiles: int
    """Of 16 outputs, per warp."""
    num_stages: int
    """Steps in flight or in use."""
    blocks_at_once: int = 1
    """Per multiprocessor: bounds the registers of a thread."""

    @property
    def block_n(self) -> int:
        return self.warps * self.row_tiles * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ImmaTiling:
    """How a product is cut; a result's bits depend on it."""

    variant: ImmaVariant
    num_parts: int
    """Of the columns: 1, 2, 4 or 8."""


def shared_bytes(layout: QuantLayout, variant: ImmaVariant) -> int:
    """Dynamic shared memory of a block: the ring of steps, at the end the sums on their way out."""
    row_bytes = STEP_COLUMNS * (layout.low_bits + layout.high_bits) // 8 + 4 * layout.word_bytes
    row_bytes += 16 * (layout.scale_kind == "half_min") + 4 * (layout.block_size == 256)
    token_bytes = STEP_COLUMNS + 32 + 32 * layout.has_min
    stage = variant.block_n * row_bytes + variant.block_t * token_bytes
    ring = variant.num_stages * -(-stage // _ALIGNMENT) * _ALIGNMENT
    return _ALIGNMENT + max(ring, (variant.block_n + 4) * variant.block_t * 4)


def fitted(
    layout: QuantLayout, variant: ImmaVariant, block_bytes: int, all_bytes: int
) -> ImmaVariant | None:
    """With as many stages, up to its own, as let blocks_at_once fit a multiprocessor of all_bytes,
    of which a block may have block_bytes; or None."""
    for num_stages in range(variant.num_stages, 1, -1):
        fewer = replace(variant, num_stages=num_stages)
        needed = shared_bytes(layout, fewer)
        if needed <= block_bytes and (needed + _RESERVED_BYTES) * fewer.blocks_at_once <= all_bytes:
            return fewer
    return None


def is_made_for(weight: PlanarWeight) -> bool:
    """Whole steps of columns, and planes whose bytes 32 bits can count."""
    return weight.num_columns % STEP_COLUMNS == 0 and weight.low.nbytes < 1 << 32


def takes_imma(weight: PlanarWeight) -> bool:
    """Whether imma can multiply by this matrix, on the card where it lies."""
    return is_made_for(weight) and has_imma(weight.low.device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or torch.version.cuda is None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def has_imma(device: torch.device) -> bool:
    """Whether it is an NVIDIA card from Ampere on and NVRTC is there."""
    return _capability(device) >= FIRST_CAPABILITY and nvrtc_library() is not None


def imma(
    x: QuantisedRows, weight: PlanarWeight, bias_N: Tensor | None = None,
    *, out_dtype: torch.dtype = torch.float16, out_TN: Tensor | None = None,
    tiling: ImmaTiling | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b [T, N] in f16 or float32 for any number of tokens, or in out_TN, whose rows may
    lie anywhere. tiling overrides choose_imma_tiling."""
    num_tokens, num_rows = x.codes_TK.shape[0], weight.num_rows
    device = x.codes_TK.device
    assert is_made_for(weight), f"{weight.num_columns} columns are no multiple of {STEP_COLUMNS}"
    assert x.codes_TK.shape[1] == weight.num_columns, "activations do not fit the weight's columns"
    assert bias_N is None or bias_N.dtype == torch.float16, f"a bias in {bias_N.dtype}"
    if out_TN is None:
        out_TN = torch.empty((num_tokens, num_rows), dtype=out_dtype, device=device)
    assert out_TN.shape == (num_tokens, num_rows) and out_TN.stride(1) == 1, "outputs do not fit"
    assert out_TN.dtype in (torch.float16, torch.float32), f"outputs in {out_TN.dtype}"
    has_clusters = _capability(device) >= _CLUSTERS_FROM
    pointers = (*x.tensors, weight.low, weight.high, weight.scales, weight.mins, weight.supers)
    if tiling is None:
        tiling = choose_imma_tiling(
            weight.layout, num_rows, weight.num_columns, num_tokens, card_limits(device)
        )
    variant, num_parts = tiling.variant, tiling.num_parts
    token_tiles = -(-num_tokens // variant.block_t)
    num_steps = weight.num_columns // STEP_COLUMNS
    sums, bias = out_TN, bias_N
    if num_parts > 1 and not has_clusters:
        sums = torch.empty((num_parts, num_tokens, num_rows), dtype=torch.float32, device=device)
        bias = None
    integers = (num_rows, num_tokens, num_steps, token_tiles, num_parts, sums.stride(-2))
    _kernel(weight.type_name, variant, out_TN.dtype, device).launch(
        num_blocks=-(-num_rows // variant.block_n) * token_tiles * num_parts,
        num_threads=variant.warps * 32,
        cluster_size=num_parts if has_clusters else 0,
        stream=torch.cuda.current_stream(device).cuda_stream,
        arguments=(
            *(ctypes.c_void_p(_address(tensor)) for tensor in (*pointers, bias, sums)),
            *map(ctypes.c_int, integers),
        ),
        starts_early=has_clusters,
    )
    if sums is not out_TN:
        sum_parts(sums, bias_N, out_TN.dtype, out_TN=out_TN)
    return out_TN


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def imma_source(
    type_name: str, variant: ImmaVariant, out_dtype: torch.dtype, *, has_clusters: bool
) -> str:
    """CUDA C++ of one kernel."""
    return imma_constants(type_name, variant, out_dtype, has_clusters=has_clusters) + imma_text(
        (_FOLDER / "quant_imma_ptx.cu").read_text()
    )


_FOLDER = Path(__file__).parent


def imma_constants(
    type_name: str, variant: ImmaVariant, out_dtype: torch.dtype, *, has_clusters: bool
) -> str:
    """The macros that the source goes by."""
    constants = layout_constants(LAYOUTS[type_name]) | {
        "BLOCK_T": variant.block_t,
        "WARPS": variant.warps,
        "ROW_TILES": variant.row_tiles,
        "STAGES": variant.num_stages,
        "BLOCKS_AT_ONCE": variant.blocks_at_once,
        "CLUSTERED": int(has_clusters),
        "OUT_F32": int(out_dtype == torch.float32),
    }
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


def imma_text(instructions: str) -> str:
    """The source over these definitions of the instructions that it is written in."""
    text = (_FOLDER / "quant_imma.cu").read_text()
    unpack = (_FOLDER / "quant_imma_unpack.cu").read_text()
    return text.replace("// PTX", instructions).replace("// UNPACK", unpack)


def _cubin(
    type_name: str, variant: ImmaVariant, out_dtype: torch.dtype, capability: tuple[int, int]
) -> bytes:
    has_clusters = capability >= _CLUSTERS_FROM
    source = imma_source(type_name, variant, out_dtype, has_clusters=has_clusters)
    return cached_cubin(source, f"sm_{capability[0]}{capability[1]}")


@cache
def _kernel(
    type_name: str, variant: ImmaVariant, out_dtype: torch.dtype, device: torch.device
) -> CudaKernel:
    cubin = _cubin(type_name, variant, out_dtype, _capability(device))
    with torch.cuda.device(device):
        return load_kernel(
            cubin, "quant_imma", shared_bytes(LAYOUTS[type_name], variant), device=device
        )


@cache
def why_not_loaded(
    type_name: str,
    variant: ImmaVariant,
    device: torch.device,
    out_dtype: torch.dtype = torch.float16,
) -> str | None:
    """Loads the kernel, compiling it where need be; what is in the way, or None. Asked once and for
    all: what failed is not tried again."""
    try:
        _kernel(type_name, variant, out_dtype, device)
    except (CudaDriverError, OSError) as problem:
        return str(problem)
    return None


def compile_ahead(
    kernels: Sequence[tuple[str, ImmaVariant]],
    capability: tuple[int, int],
    out_dtype: torch.dtype = torch.float16,
) -> None:
    """Machine code of (type, variant) into the cache on all cores; failures are left to who loads
    it."""

    def compile_one(kernel: tuple[str, ImmaVariant]) -> None:
        with contextlib.suppress(CudaDriverError, OSError):
            _cubin(*kernel, out_dtype, capability)

    num_threads = max(1, min(len(kernels), os.cpu_count() or 1))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="nvrtc") as executor:
        list(executor.map(compile_one, kernels))


_SHAPES: Mapping[int, tuple[tuple[int, int, int, int], ...]] = MappingProxyType(
    {
        8: ((4, 1, 4, 4), (4, 1, 4, 2), (2, 1, 4, 2)),
        16: ((4, 2, 4, 2), (4, 1, 4, 2), (2, 1, 4, 2)),
        32: ((4, 2, 3, 2), (4, 1, 3, 2), (2, 1, 3, 2), (2, 1, 3, 1)),
        64: ((8, 2, 4, 1), (4, 2, 3, 1), (4, 1, 3, 1), (2, 1, 3, 1)),
    }
)
"""By the tokens of a block, best first: warps, row tiles, stages and blocks at once. The later ones
are for cards, or types, where an earlier one's stages do not fit.

Instructions per weight that these take, counted in machine code for compute capability 8.6 (9.0
differs by less than 5 %), and those that a card has time for while it reads 4.5 bits at the
bandwidth of its data sheet (multiprocessors * 128 lanes * clock):

    tokens  8    16   32   64          RTX 4090  23      H100  5.0
    Q4_K    2.2  2.7  4.2  7.2         RTX 3090  10.7    H200  3.5
    Q6_K    4.1  4.8  6.6  10.6        (Q6_K has 6.5625 bits, so 1.5 times as many)
"""
_FEW_TILES: tuple[int, int, int, int] = (4, 1, 6, 2)
"""Goes before those up to 16 tokens where all blocks there can be do not fill the card."""
_FEW_TOKENS = 16
_MIN_STEPS, _FEWEST_STEPS = 4, 2
"""Of a part: parts cost their start, and that their sums meet. The second for few tiles."""


def choose_imma_tiling(
    layout: QuantLayout, num_rows: int, num_columns: int, num_tokens: int, card: CardLimits
) -> ImmaTiling:
    """The smallest tile that holds the tokens, and parts as long as all blocks run at once. A rule
    without measured times, within 80 % of the best tiling on an H200 at 8 and 16 tokens
    (tests/kernels/test_quant_tuned.py)."""
    block_t = next((size for size in _SHAPES if size >= num_tokens), max(_SHAPES))
    shapes = _SHAPES[block_t]
    has_few_tiles = num_rows * MAX_PARTS <= 64 * card.num_multiprocessors
    if has_few_tiles and block_t <= _FEW_TOKENS:
        shapes = (_FEW_TILES, *shapes)
    variant = _fitting(layout, block_t, shapes, card.shared_bytes)
    num_tiles = -(-num_rows // variant.block_n) * -(-num_tokens // variant.block_t)
    num_places = card.num_multiprocessors * variant.blocks_at_once
    min_steps = _FEWEST_STEPS if has_few_tiles else _MIN_STEPS
    most_parts = min(MAX_PARTS, num_columns // STEP_COLUMNS // min_steps)
    num_parts = 1
    while num_parts * 2 <= most_parts and num_tiles * num_parts * 2 <= num_places:
        num_parts *= 2
    return ImmaTiling(variant=variant, num_parts=num_parts)


def _fitting(
    layout: QuantLayout,
    block_t: int,
    shapes: Sequence[tuple[int, int, int, int]],
    block_bytes: int,
) -> ImmaVariant:
    """A multiprocessor has what one block may have, and what is reserved for that."""
    wanted = (
        ImmaVariant(
            block_t=block_t, warps=warps, row_tiles=row_tiles, num_stages=num_stages,
            blocks_at_once=blocks,
        )
        for warps, row_tiles, num_stages, blocks in shapes
    )  # fmt: skip
    all_bytes = block_bytes + _RESERVED_BYTES
    return next(found for each in wanted if (found := fitted(layout, each, block_bytes, all_bytes)))
