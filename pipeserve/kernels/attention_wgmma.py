"""Paged causal attention of prefill chunks on Hopper: the host side of attention_wgmma.cu.

Launched by the stage thread, capturable in a CUDA graph; takes_wgmma says what it is made for.
Results do not change from run to run. Twin: reference.paged_attention_prefill.

Shapes: T tokens, S sequences, N query heads, K kv heads, H head dim, B blocks, P position in block.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pipeserve.kernels import dependent_launch
from pipeserve.kernels.hopper_source import hopper_source
from pipeserve.kernels.nvrtc import (
    CudaDriverError,
    CudaKernel,
    cached_cubin,
    load_kernel,
    tiled_map,
)
from pipeserve.kernels.quant_mma import is_hopper
from pipeserve.kernels.quant_split import card_limits

ARCH = "sm_90a"
MOST_SEQS = 512
"""Chunks of a launch: their places are kept in shared memory."""
MAX_SHARED_BYTES = 227 * 1024
_HALF = 64
"""Of a head's dims: rows of 128 bytes."""
_SPAN = 16
"""Positions that are copied at once: pages are multiples of it."""
_CONSUMERS = 2
"""Groups of 128 threads that multiply 64 rows each; one more group copies."""
_ROWS = 64 * _CONSUMERS
"""Of a tile: queries times the heads of a group."""
_TILE = 128
"""Cache positions taken at once."""
_STAGES = 2
"""Tiles of keys, and as many of values, in flight or in use."""
_QUERY_SLOTS = 2
"""Tiles of queries, likewise."""
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 56, 224
"""Of a thread that copies and of one that multiplies: multiples of 8; a block has 65,536."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What the attention is of."""

    group: int
    """Query heads that share a kv head."""
    head_dim: int
    page: int
    dtype: torch.dtype


def shared_bytes(heads: Heads) -> int:
    """Dynamic shared memory of a block."""
    row_bytes = -(-heads.head_dim // _HALF) * 2 * _HALF
    rings = _QUERY_SLOTS * _ROWS + 2 * _STAGES * _TILE
    barriers = 16 * (_QUERY_SLOTS + 2 * _STAGES)
    return 1024 + rings * row_bytes + barriers + 32 * _QUERY_SLOTS + 8 * MOST_SEQS


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """How the copy engine takes a tensor apart: dimensions from the innermost one out, strides in
    elements of all but that."""

    tensor: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def encoded(self) -> bytes:
        """As nvrtc.tiled_map has it."""
        address, dtype = self.tensor.data_ptr(), self.tensor.dtype
        return tiled_map(address, dtype, self.sizes, self.strides, self.box, 2 * _HALF)


def query_boxes(q_TNH: Tensor, group: int) -> Boxes:
    """A tile's queries, half of their dims: rows are tokens' heads of a group."""
    num_tokens, num_heads, head_dim = q_TNH.shape
    return Boxes(
        tensor=q_TNH,
        sizes=(head_dim, num_heads, num_tokens),
        strides=(q_TNH.stride(1), q_TNH.stride(0)),
        box=(_HALF, group, _ROWS // group),
    )


def position_boxes(cache_BPKH: Tensor) -> Boxes:
    """Positions of one block and kv head, half of their dims."""
    num_blocks, page, num_kv_heads, head_dim = cache_BPKH.shape
    block_stride, position_stride, head_stride, _ = cache_BPKH.stride()
    return Boxes(
        tensor=cache_BPKH,
        sizes=(head_dim, num_kv_heads, page, num_blocks),
        strides=(head_stride, position_stride, block_stride),
        box=(_HALF, 1, _SPAN, 1),
    )


def wgmma_source(heads: Heads) -> str:
    """CUDA C++ of one kernel."""
    instructions = hopper_source("attention_wgmma_ptx.cu")
    return source_on(heads, instructions.replace("// WGMMA", _products(heads)))


def source_on(heads: Heads, instructions: str) -> str:
    """The kernel on these definitions of its instructions."""
    folder = Path(__file__).parent
    text = (folder / "attention_wgmma.cu").read_text().replace("// PTX", instructions)
    for part in ("tiles", "copies"):
        lines = (folder / f"attention_wgmma_{part}.cu").read_text()
        text = text.replace(f"// {part.upper()}", lines)
    return _constants(heads) + text


def _constants(heads: Heads) -> str:
    """The macros that attention_wgmma.cu goes by."""
    constants = {
        "CONSUMERS": _CONSUMERS,
        "TILE": _TILE,
        "STAGES": _STAGES,
        "Q_SLOTS": _QUERY_SLOTS,
        "GROUP": heads.group,
        "HEAD_DIM": heads.head_dim,
        "PAGE": heads.page,
        "IS_BF16": int(heads.dtype == torch.bfloat16),
        "MOST_SEQS": MOST_SEQS,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
    }
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


def _products(heads: Heads) -> str:
    """Products of 64 rows: PTX ISA, wgmma.mma_async. Queries and keys from shared memory, the
    first one without earlier sums; probabilities in registers, and values, read transposed."""
    kind = "bf16" if heads.dtype == torch.bfloat16 else "f16"
    block_h = -(-heads.head_dim // _HALF) * _HALF

    def product(name: str, columns: int, a_type: str, adds: int, a: str, tail: str) -> str:
        count = columns // 2
        sums = ", ".join(f"%{i}" for i in range(count))
        outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        operands = [f'"r"(a[{i}])' for i in range(4)] if a else ['"l"(a)']
        places = [f"%{count + i}" for i in range(len(operands))]
        first = f"{{{', '.join(places)}}}" if a else places[0]
        second = f"%{count + len(operands)}"
        shape = f"m64n{columns}k16.f32.{kind}.{kind}"
        return f"""DEVICE void {name}(float (&d)[{count}], {a_type}, u64 b) {{
    asm volatile("wgmma.mma_async.sync.aligned.{shape} {{{sums}}}, {first}, {second}, "
                 "{adds}, 1, 1, {tail};"
                 : {outputs} : {", ".join(operands)}, "l"(b));
}}
"""

    return "".join(
        (
            product("first_score_product", _TILE, "u64 a", 0, "", "0, 0"),
            product("score_product", _TILE, "u64 a", 1, "", "0, 0"),
            product("value_product", block_h, "const u32 (&a)[4]", 1, "registers", "1"),
        )
    )


@cache
def _kernel(heads: Heads, device: torch.device) -> CudaKernel:
    cubin = cached_cubin(wgmma_source(heads), ARCH)
    with torch.cuda.device(device):
        return load_kernel(cubin, "attention_wgmma", shared_bytes(heads), device=device)


@cache
def why_not_loaded(heads: Heads, device: torch.device) -> str | None:
    """Loads the kernel, compiling it where need be; what is in the way, or None. Asked once and
    for all: what failed is not tried again."""
    try:
        _kernel(heads, device)
    except (CudaDriverError, OSError) as problem:
        return str(problem)
    return None


def heads_of(q_TNH: Tensor, k_cache_BPKH: Tensor) -> Heads:
    """Of queries and a cache."""
    page, num_kv_heads, head_dim = k_cache_BPKH.shape[1:]
    return Heads(
        group=q_TNH.shape[1] // num_kv_heads, head_dim=head_dim, page=page, dtype=q_TNH.dtype
    )


def takes_wgmma(
    q_TNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    starts_S: Tensor,
    first_positions_S: Tensor,
    num_tokens_S: Tensor,
    out_TNH: Tensor,
) -> bool:
    """Whether prefill_wgmma is made for these: halves of up to 128 dims on Hopper, everything
    aligned for pieces of 16 bytes, indices of one type."""
    page, _, head_dim = k_cache_BPKH.shape[1:]
    tensors = (q_TNH, k_cache_BPKH, v_cache_BPKH, out_TNH)
    vectors = (starts_S, first_positions_S, num_tokens_S)
    return (
        is_hopper(q_TNH.device)
        and q_TNH.dtype in (torch.float16, torch.bfloat16)
        and all(tensor.dtype == q_TNH.dtype and _is_aligned(tensor) for tensor in tensors)
        and head_dim <= 2 * _HALF
        and page % _SPAN == 0
        and q_TNH.shape[1] // k_cache_BPKH.shape[2] <= 64
        and block_table_SB.dtype in (torch.int32, torch.int64)
        and all(vector.dtype == block_table_SB.dtype for vector in vectors)
        and all(vector.is_contiguous() for vector in vectors)
        and len(num_tokens_S) <= MOST_SEQS
        and why_not_loaded(heads_of(q_TNH, k_cache_BPKH), q_TNH.device) is None
    )


def _is_aligned(tensor: Tensor) -> bool:
    pieces = (*tensor.shape[-1:], *tensor.stride()[:-1])
    return (
        tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1 and all(n % 8 == 0 for n in pieces)
    )


def prefill_wgmma(
    q_TNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    starts_S: Tensor,
    first_positions_S: Tensor,
    num_tokens_S: Tensor,
    out_TNH: Tensor,
    *,
    scale_log2: float,
) -> None:
    """attention_prefill.paged_attention_prefill of what takes_wgmma, into out_TNH.

    scale_log2: of scores, times log2(e).
    """
    heads, device = heads_of(q_TNH, k_cache_BPKH), q_TNH.device
    num_kv_heads, num_seqs = k_cache_BPKH.shape[2], len(num_tokens_S)
    # Every sequence may end in a tile of its own.
    most_tiles = len(q_TNH) // (_ROWS // heads.group) + num_seqs
    boxes = (
        query_boxes(q_TNH, heads.group),
        position_boxes(k_cache_BPKH),
        position_boxes(v_cache_BPKH),
    )
    maps = b"".join(box.encoded() for box in boxes)
    pointers = (block_table_SB, starts_S, first_positions_S, num_tokens_S, out_TNH)
    integers = (
        num_seqs, num_kv_heads, len(k_cache_BPKH), block_table_SB.stride(0),
        int(block_table_SB.dtype == torch.int64), out_TNH.stride(0), out_TNH.stride(1),
    )  # fmt: skip
    _kernel(heads, device).launch(
        num_blocks=min(most_tiles * num_kv_heads, card_limits(device).num_multiprocessors),
        num_threads=(_CONSUMERS + 1) * 128,
        cluster_size=0,
        stream=torch.cuda.current_stream(device).cuda_stream,
        starts_early=dependent_launch.is_supported(device),
        arguments=(
            ctypes.create_string_buffer(maps, len(maps)),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers),
            ctypes.c_float(scale_log2),
            *map(ctypes.c_int, integers),
        ),
    )
