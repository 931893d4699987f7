"""How attention of decode rows is cut and launched, by what is known when a graph is captured.

Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MOST_SEGMENTS = 64
_FEW_PROGRAMS = 512
"""Wanted at least, where sequences and kv heads are too few to make them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Launch shape: cache positions per tile, fewest tiles per segment, segments, warps, stages."""

    tile: int
    min_tiles: int
    num_segments: int
    num_warps: int
    num_stages: int


def decode_config(
    num_seqs: int, num_kv_heads: int, head_dim: int, *, kv: torch.dtype
) -> DecodeConfig:
    """For programs of one sequence, kv head and segment each.

    Few rows are cut into enough segments to fill a card, many into long ones: each costs its start
    and a part of the merge. Some are left even where the rows alone fill the card, so that one long
    sequence among short ones is shared.
    """
    programs = num_seqs * num_kv_heads
    if torch.version.hip is not None:
        # Larger tiles and pipelining spill registers on RDNA (seen in the compiled code).
        return _cut(programs, tile=16, num_warps=4, num_stages=1)
    if head_dim > 128:
        return _cut(programs, tile=32, num_warps=4, num_stages=3)
    if kv == torch.int8:
        # Unpacking bytes is work per warp: 18 % faster with two at 128 rows on an H100.
        return _cut(programs, tile=64, num_warps=4 if programs <= 64 else 2, num_stages=3)
    # Times on an H200, 8 kv heads of 128 (loadtest/README.md).
    if programs <= 8 or 64 < programs < 1024:
        return _cut(programs, tile=32, num_warps=4, num_stages=4)
    return _cut(programs, tile=64, num_warps=4, num_stages=3)


def _cut(programs: int, *, tile: int, num_warps: int, num_stages: int) -> DecodeConfig:
    return DecodeConfig(
        tile=tile,
        min_tiles=max(1, _least_positions(programs) // tile),
        num_segments=_num_segments(programs),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _num_segments(programs: int) -> int:
    if programs < 128:
        return min(_MOST_SEGMENTS, 1 << (_FEW_PROGRAMS // programs).bit_length() - 1)
    return 8 if 256 <= programs < 1024 else 4


def _least_positions(programs: int) -> int:
    """Of a segment."""
    if programs < 256:
        return 1
    return 256 if programs < 512 else 1024
