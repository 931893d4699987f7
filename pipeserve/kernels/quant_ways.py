"""The ways to multiply by a planar matrix, as tables of tuned choices write them, and the rule that
chooses among them without a table.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeserve.kernels.quant_gemm import GemmTiling
from pipeserve.kernels.quant_imma import ImmaTiling, ImmaVariant
from pipeserve.kernels.quant_layout import LAYOUTS, UNIT
from pipeserve.kernels.quant_mma_tiling import (
    LEAST_STAGES,
    MmaTiling,
    MmaVariant,
    choose_mma_tiling,
    fills_card,
    shared_bytes,
)

GEMM_ROWS = 256
"""From more rows on, writing the matrix out once and the vendor's library are faster, as far as no
table says otherwise."""
MMA_ROWS = 2048
"""The same for the kernel for Hopper, as far as its tiles fill the card: small matrices are faster
written out from GEMM_ROWS on. At 4096 the vendor's library is as fast on a warm
card, writing out included."""
_HOPPER_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemv:
    """The kernel for few rows, with its arguments of these names; None: its own choice."""

    block_n: int | None = None
    pieces: int | None = None
    num_parts: int | None = None

    def __str__(self) -> str:
        if self.block_n is None:
            return "gemv"
        return f"gemv n{self.block_n} x{self.pieces} p{self.num_parts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imma:
    """The CUDA C++ kernel on bytes."""

    tiling: ImmaTiling

    def __str__(self) -> str:
        v = self.tiling.variant
        return (
            f"imma t{v.block_t} {v.warps}x{v.row_tiles} s{v.num_stages} b{v.blocks_at_once} "
            f"p{self.tiling.num_parts}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """Triton's kernel for batches; without a tiling as choose_tiling has it."""

    tiling: GemmTiling | None = None

    def __str__(self) -> str:
        if self.tiling is None:
            return "gemm"
        t = self.tiling
        return (
            f"gemm n{t.block_n} t{t.block_t} w{t.wide} warps{t.num_warps} s{t.num_stages} "
            f"p{t.num_parts}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mma:
    """The CUDA C++ kernel for Hopper."""

    tiling: MmaTiling

    def __str__(self) -> str:
        v = self.tiling.variant
        return (
            f"mma t{v.block_t} {v.warpgroups}x{v.tiles} s{v.num_stages} x{v.x_blocks}/"
            f"{v.num_x_slots} b{v.blocks_at_once} p{self.tiling.num_parts}"
        )


@dataclass(frozen=True, slots=True)
class Dequantise:
    """The matrix written out as f16, and the vendor's library."""

    def __str__(self) -> str:
        return "dequantise"


FewRowsWay = Gemv | Imma
"""Of activations as bytes."""
BatchWay = Gemm | Mma | Dequantise

_GEMV = re.compile(r"gemv n(\d+) x(\d+) p(\d+)")
_IMMA = re.compile(r"imma t(\d+) (\d+)x(\d+) s(\d+) b(\d+) p(\d+)")
_GEMM = re.compile(r"gemm n(\d+) t(\d+) w(\d+) warps(\d+) s(\d+) p(\d+)")
_MMA = re.compile(r"mma t(\d+) (\d+)x(\d+) s(\d+) x(\d+)/(\d+) b(\d+) p(\d+)")


def parse_few_rows_way(text: str) -> FewRowsWay:
    """The way that prints as this text. Raises ValueError."""
    if text == "gemv":
        return Gemv()
    if (found := _IMMA.fullmatch(text)) is not None:
        return _parse_imma(text, *map(int, found.groups()))
    found = _GEMV.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no way to multiply few rows, such as gemv, 'gemv n2 x32 p1' or "
            "'imma t8 4x1 s4 b4 p1'"
        )
    block_n, pieces, num_parts = map(int, found.groups())
    if not all(map(_is_power_of_2, (block_n, pieces, num_parts))):
        raise ValueError(f"{text!r} has a number that is no power of 2")
    return Gemv(block_n=block_n, pieces=pieces, num_parts=num_parts)


def parse_batch_way(text: str, type_name: str) -> BatchWay:
    """The way that prints as this text, which must be possible for the type. Raises ValueError."""
    if text == "gemm":
        return Gemm()
    if text == "dequantise":
        return Dequantise()
    if (found := _GEMM.fullmatch(text)) is not None:
        return _parse_gemm(text, *map(int, found.groups()))
    if (found := _MMA.fullmatch(text)) is not None:
        return _parse_mma(text, type_name, *map(int, found.groups()))
    raise ValueError(
        f"{text!r} is no way to multiply a batch; those are gemm, dequantise, "
        "'gemm n64 t32 w2 warps2 s3 p1' and 'mma t32 1x1 s3 x4/3 b4 p2'"
    )


def _parse_imma(text: str, *numbers: int) -> Imma:
    block_t, warps, row_tiles, num_stages, blocks_at_once, num_parts = numbers
    variant = ImmaVariant(
        block_t=block_t, warps=warps, row_tiles=row_tiles, num_stages=num_stages,
        blocks_at_once=blocks_at_once,
    )  # fmt: skip
    if block_t % 8 or not 8 <= block_t <= 64:
        raise ValueError(f"{text!r} has {block_t} tokens; they are a multiple of 8 up to 64")
    if not _is_power_of_2(warps) or num_parts not in (1, 2, 4, 8):
        raise ValueError(f"{text!r}: warps are a power of 2, and p is 1, 2, 4 or 8")
    if min(row_tiles, blocks_at_once) < 1 or num_stages < 2:
        raise ValueError(f"{text!r} has a number that is too small")
    return Imma(tiling=ImmaTiling(variant=variant, num_parts=num_parts))


def _parse_gemm(text: str, *numbers: int) -> Gemm:
    block_n, block_t, wide, num_warps, num_stages, num_parts = numbers
    if not all(map(_is_power_of_2, (block_n, block_t, wide, num_warps, num_parts))):
        raise ValueError(f"{text!r} has a number that must be a power of 2 and is none")
    return Gemm(
        tiling=GemmTiling(
            block_n=block_n, block_t=block_t, wide=wide, num_warps=num_warps,
            num_stages=num_stages, num_parts=num_parts,
        )
    )  # fmt: skip


def _parse_mma(text: str, type_name: str, *numbers: int) -> Mma:
    block_t, warpgroups, tiles, num_stages, x_blocks, x_slots, blocks_at_once, num_parts = numbers
    variant = MmaVariant(
        block_t=block_t, warpgroups=warpgroups, tiles=tiles, num_stages=num_stages,
        x_blocks=x_blocks, x_slots=x_slots, blocks_at_once=blocks_at_once,
    )  # fmt: skip
    if block_t % 8 or not 8 <= block_t <= 256:
        raise ValueError(f"{text!r} has {block_t} tokens; they are a multiple of 8 up to 256")
    if x_blocks not in (1, 2, 4) or num_parts not in (1, 2, 4, 8):
        raise ValueError(f"{text!r}: x is 1, 2 or 4, and p is 1, 2, 4 or 8")
    if min(warpgroups, tiles, x_slots, blocks_at_once) < 1 or num_stages < LEAST_STAGES:
        raise ValueError(f"{text!r} has a number that is too small")
    num_bytes = shared_bytes(LAYOUTS[type_name], variant) * blocks_at_once
    if num_bytes > _HOPPER_SHARED_BYTES:
        raise ValueError(f"{text!r} takes {num_bytes} bytes of shared memory for {type_name}")
    return Mma(tiling=MmaTiling(variant=variant, num_parts=num_parts))


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def rule_way(
    type_name: str, num_rows: int, num_columns: int, num_tokens: int, *,
    num_multiprocessors: int, has_mma: bool,
) -> BatchWay:  # fmt: skip
    """What is fast without a measured table; has_mma: the card has the kernel for Hopper.

    Drawn from the times of Q4_K and Q6_K on an H200 (loadtest/README.md).
    """
    if num_tokens > (MMA_ROWS if has_mma else GEMM_ROWS) or num_columns % UNIT:
        return Dequantise()
    if not has_mma:
        return Gemm()
    layout = LAYOUTS[type_name]
    tiling = choose_mma_tiling(layout, num_rows, num_columns, num_tokens, num_multiprocessors)
    is_many = num_tokens > GEMM_ROWS
    if is_many and not fills_card(tiling, num_rows, num_tokens, num_multiprocessors):
        return Dequantise()
    return Mma(tiling=tiling)
