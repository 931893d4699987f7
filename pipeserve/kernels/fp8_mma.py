"""Few rows times a matrix in e4m3 on Hopper: the host side of fp8_mma.cu.

Launched by the stage thread, capturable in a CUDA graph. Sums are added in a fixed order, so
results do not change from run to run. Twin: fp8_reference.scaled_product.

Shapes: T tokens, N outputs, K inputs. An atom is 128 columns.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pipeserve.kernels import dependent_launch
from pipeserve.kernels.fp8_reference import Fp8Rows, Fp8Weight
from pipeserve.kernels.hopper_source import hopper_source
from pipeserve.kernels.nvrtc import (
    CudaDriverError,
    CudaKernel,
    cached_cubin,
    load_kernel,
    tensor_map,
)
from pipeserve.kernels.quant_mma import has_mma
from pipeserve.kernels.quant_split import card_limits

ARCH = "sm_90a"
_ATOM = 128
_SHARED_BYTES, _BLOCK_SHARED_BYTES, _RESERVED_BYTES = 228 * 1024, 227 * 1024, 1024
"""Of a Hopper multiprocessor, of them for one block at most, and what each block takes besides."""
MAX_BLOCKS = 8
"""Of a cluster: what every card allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Variant:
    """What a kernel is compiled for."""

    block_t: int
    """Tokens of a block: a multiple of 8 up to 256."""
    warpgroups: int
    """Of 128 threads, for outputs; a warp more starts the copies."""
    tiles: int
    """Of 64 outputs, per warpgroup."""
    atoms: int
    """Of 128 columns, in a step."""
    num_stages: int
    """Steps in flight or in use."""
    blocks_at_once: int
    """Per multiprocessor: bounds the registers of a thread."""
    is_grouped: bool = False
    """Activations have a scale per atom rather than per token."""

    @property
    def block_n(self) -> int:
        return self.warpgroups * self.tiles * 64

    @property
    def step_bytes(self) -> int:
        return self.atoms * _ATOM * (self.block_n + self.block_t)

    @property
    def sums_bytes(self) -> int:
        return (self.block_n + 4) * self.block_t * 4

    def num_steps(self, num_columns: int) -> int:
        return -(-num_columns // (self.atoms * _ATOM))

    def num_groups(self, num_columns: int, num_parts: int) -> int:
        """Groups of columns with a scale of their own that a part has at most."""
        return -(-self.num_steps(num_columns) // num_parts) * self.atoms if self.is_grouped else 0

    def shared_bytes(self, num_groups: int = 0) -> int:
        """Dynamic shared memory of a block: the steps and scales of so many groups of columns, at
        the end the sums on their way out."""
        scales = num_groups * (self.block_t + 2) * 4
        return 1024 + max(self.num_stages * (self.step_bytes + 16) + scales, self.sums_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Tiling:
    """How a product is cut; a result's bits depend on it."""

    variant: Fp8Variant
    num_parts: int
    """Of the columns, a power of 2: so many blocks are a cluster."""


def fp8_mma(
    x: Fp8Rows, weight: Fp8Weight, bias_N: Tensor | None = None, *, tiling: Fp8Tiling | None = None
) -> Tensor:
    """x W^T + b [T, N] in bf16, b in bf16 too; for any number of tokens. tiling overrides
    choose_fp8_tiling."""
    num_tokens, num_columns = x.codes_TK.shape
    num_rows = weight.codes_NK.shape[0]
    device = x.codes_TK.device
    assert weight.codes_NK.shape[1] == num_columns, f"{num_columns} columns do not fit the matrix"
    assert bias_N is None or bias_N.dtype == torch.bfloat16, f"a bias in {bias_N.dtype}"
    if tiling is None:
        multiprocessors = card_limits(device).num_multiprocessors
        tiling = choose_fp8_tiling(
            num_rows, num_columns, num_tokens, multiprocessors, is_grouped=x.is_grouped
        )
    variant = tiling.variant
    num_steps = variant.num_steps(num_columns)
    _check(x, tiling, num_steps)
    out_TN = torch.empty((num_tokens, num_rows), dtype=torch.bfloat16, device=device)
    row_tiles = -(-num_rows // variant.block_n)
    token_tiles = -(-num_tokens // variant.block_t)
    maps = _map(weight.codes_NK, variant.block_n) + _map(x.codes_TK, variant.block_t)
    pointers = (x.scales_TG, weight.scales_1N, bias_N, out_TN)
    integers = (num_rows, num_tokens, row_tiles, num_steps, x.scales_TG.shape[1])
    shared_bytes = variant.shared_bytes(variant.num_groups(num_columns, tiling.num_parts))
    replace(_kernel(variant, device), shared_bytes=shared_bytes).launch(
        num_blocks=row_tiles * token_tiles * tiling.num_parts,
        num_threads=variant.warpgroups * 128 + 32,
        cluster_size=tiling.num_parts,
        stream=torch.cuda.current_stream(device).cuda_stream,
        starts_early=dependent_launch.is_supported(device),
        arguments=(
            ctypes.create_string_buffer(maps, len(maps)),
            *(ctypes.c_void_p(0 if p is None else p.data_ptr()) for p in pointers),
            *map(ctypes.c_int, integers),
        ),
    )
    return out_TN


def _check(x: Fp8Rows, tiling: Fp8Tiling, num_steps: int) -> None:
    variant = tiling.variant
    assert tiling.num_parts <= num_steps, f"{num_steps} steps for {tiling}"
    assert tiling.num_parts <= MAX_BLOCKS, f"a larger cluster: {tiling}"
    assert variant.is_grouped == x.is_grouped, f"{x.scales_TG.shape[1]} scales a token: {tiling}"


def _map(codes: Tensor, box_rows: int) -> bytes:
    return tensor_map(
        codes.view(torch.uint8), box_rows=box_rows, box_columns=_ATOM, swizzle=_ATOM
    )  # fmt: skip


def fp8_mma_source(variant: Fp8Variant) -> str:
    """CUDA C++ of one kernel."""
    text = hopper_source("fp8_mma.cu")
    constants = {
        "BLOCK_T": variant.block_t,
        "WARPGROUPS": variant.warpgroups,
        "TILES": variant.tiles,
        "ATOMS": variant.atoms,
        "STAGES": variant.num_stages,
        "BLOCKS_AT_ONCE": variant.blocks_at_once,
        "GROUPED": int(variant.is_grouped),
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return defines + text.replace("// WGMMA", _multiply(variant.block_t))


def _multiply(block_t: int) -> str:
    """The product of 64 outputs, block_t tokens and 32 columns, added to the sums or in their
    place: PTX ISA, wgmma.mma_async."""
    count = block_t // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    name = f"wgmma.mma_async.sync.aligned.m64n{block_t}k32.f32.e4m3.e4m3"
    return f"""template <int ADD>
DEVICE void multiply(float (&d)[{count}], u64 a, u64 b) {{
    asm volatile(
        "{{ .reg .pred add; setp.ne.b32 add, %{count + 2}, 0;\\n"
        "{name} {{{sums}}}, %{count}, %{count + 1}, add, 1, 1; }}"
        : {outputs} : "l"(a), "l"(b), "n"(ADD));
}}"""


@cache
def _kernel(variant: Fp8Variant, device: torch.device) -> CudaKernel:
    cubin = cached_cubin(fp8_mma_source(variant), ARCH)
    with torch.cuda.device(device):
        return load_kernel(cubin, "fp8_mma", _BLOCK_SHARED_BYTES, device=device)


@cache
def why_not_loaded(variant: Fp8Variant, device: torch.device) -> str | None:
    """Loads the kernel, compiling it where need be; what is in the way, or None. Asked once and for
    all: what failed is not tried again."""
    if not has_mma(device):
        return "no Hopper card with NVRTC"
    try:
        _kernel(variant, device)
    except (CudaDriverError, OSError) as problem:
        return str(problem)
    return None


def compile_ahead(variants: Sequence[Fp8Variant]) -> None:
    """Machine code into the cache on all cores; failures are left to who loads it."""

    def compile_one(variant: Fp8Variant) -> None:
        with contextlib.suppress(CudaDriverError, OSError):
            cached_cubin(fp8_mma_source(variant), ARCH)

    num_threads = max(1, min(len(variants), os.cpu_count() or 1))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="nvrtc") as executor:
        list(executor.map(compile_one, variants))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preference:
    """What was fastest for so many tokens."""

    variant: Fp8Variant
    most_parts: int
    """Of the columns, as far as all blocks run at once: parts cost that their sums meet."""


def _preference(
    block_t: int, warpgroups: int, num_stages: int, blocks_at_once: int, most_parts: int,
    *, atoms: int = 1,
) -> _Preference:  # fmt: skip
    variant = Fp8Variant(
        block_t=block_t, warpgroups=warpgroups, tiles=1, atoms=atoms, num_stages=num_stages,
        blocks_at_once=blocks_at_once,
    )  # fmt: skip
    return _Preference(variant=variant, most_parts=most_parts)


_MANY_OUTPUTS = (
    _preference(8, 2, 6, 2, 1),
    _preference(16, 1, 5, 3, 1),
    _preference(32, 2, 5, 2, 1),
    _preference(64, 2, 6, 1, 1),
    _preference(128, 2, 4, 1, 1),
)
_FEW_OUTPUTS = (
    _preference(8, 1, 4, 4, 8),
    _preference(16, 1, 7, 3, 4),
    _preference(32, 1, 6, 1, 2, atoms=2),
    _preference(64, 1, 8, 1, 2),
    _preference(128, 1, 4, 1, 2, atoms=2),
)
"""By the tokens of a block; measured on an H200 with the matrices of an 8B model."""
_MIN_STEPS = 4
"""Of a part."""
_LEAST_STAGES = 2


def has_few_outputs(num_rows: int, num_multiprocessors: int) -> bool:
    """Whether tiles of them leave multiprocessors idle."""
    return num_rows <= 64 * num_multiprocessors


def choose_fp8_tiling(
    num_rows: int, num_columns: int, num_tokens: int, num_multiprocessors: int,
    *, is_grouped: bool = False,
) -> Fp8Tiling:  # fmt: skip
    """The smallest tile that holds the tokens, and parts where the outputs leave the card idle."""
    is_few = has_few_outputs(num_rows, num_multiprocessors)
    preferences = _FEW_OUTPUTS if is_few else _MANY_OUTPUTS
    preferred = next(
        (some for some in preferences if some.variant.block_t >= num_tokens), preferences[-1]
    )
    variant = replace(preferred.variant, is_grouped=is_grouped)
    num_tiles = -(-num_rows // variant.block_n) * -(-num_tokens // variant.block_t)
    num_places = num_multiprocessors * variant.blocks_at_once
    most_parts = min(preferred.most_parts, variant.num_steps(num_columns) // _MIN_STEPS)
    num_parts = 1
    while num_parts * 2 <= most_parts and num_tiles * num_parts * 2 <= num_places:
        num_parts *= 2
    least = replace(variant, num_stages=_LEAST_STAGES, blocks_at_once=1)
    while num_parts < MAX_BLOCKS and not _fits(least, variant.num_groups(num_columns, num_parts)):
        num_parts *= 2  # the scales of so many columns leave no room
    variant = _fitted(variant, variant.num_groups(num_columns, num_parts))
    return Fp8Tiling(variant=variant, num_parts=num_parts)


def _fitted(variant: Fp8Variant, num_groups: int) -> Fp8Variant:
    """With as many stages, up to its own, as let blocks_at_once fit a multiprocessor."""
    while variant.num_stages > _LEAST_STAGES and not _fits(variant, num_groups):
        variant = replace(variant, num_stages=variant.num_stages - 1)
    return variant


def _fits(variant: Fp8Variant, num_groups: int) -> bool:
    held_bytes = variant.shared_bytes(num_groups) + _RESERVED_BYTES
    return held_bytes * variant.blocks_at_once <= _SHARED_BYTES
