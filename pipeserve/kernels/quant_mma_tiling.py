"""How quant_mma.cu's products are cut: what a tiling is, what it takes of a Hopper card, and the
rule that chooses one.

Pure arithmetic. A step is 256 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pipeserve.kernels.interleaved_rows import INTERLEAVED_COLUMNS
from pipeserve.kernels.quant_layout import QuantLayout

STEP_COLUMNS = INTERLEAVED_COLUMNS
LEAST_STAGES = 2
"""A step in use, and one on its way: what was used is filled again during the next step."""
MAX_PARTS = 8
"""Blocks of a cluster: what every card allows."""
_SHARED_BYTES, _BLOCK_SHARED_BYTES, _RESERVED_BYTES = 228 * 1024, 227 * 1024, 1024
"""Of a Hopper multiprocessor, of them for one block at most, and what each block takes besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MmaVariant:
    """What a kernel is compiled for, beside the type of the weights."""

    block_t: int
    """Tokens of a block: a multiple of 8 up to 256."""
    warpgroups: int
    """Of 128 threads."""
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

    @property
    def has_pairs(self) -> bool:
        """Whether blocks hold gate and up as quant_mma_swiglu.cu takes them."""
        return self.block_n in (128, 256, 512)


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
    sums = (variant.block_n + 4) * variant.block_t * 4
    return 1024 + max(rings, sums)


def fitted(layout: QuantLayout, variant: MmaVariant) -> MmaVariant | None:
    """With as many stages, up to its own, as let blocks_at_once fit a multiprocessor, or None."""
    for num_stages in range(variant.num_stages, LEAST_STAGES - 1, -1):
        fewer = replace(variant, num_stages=num_stages)
        block_bytes = shared_bytes(layout, fewer)
        held_bytes = (block_bytes + _RESERVED_BYTES) * fewer.blocks_at_once
        if block_bytes <= _BLOCK_SHARED_BYTES and held_bytes <= _SHARED_BYTES:
            return fewer
    return None


_VARIANTS: Mapping[int, tuple[MmaVariant, ...]] = MappingProxyType(
    {
        **{
            block_t: (
                MmaVariant(
                    block_t=block_t, warpgroups=2, tiles=1, num_stages=4, blocks_at_once=2
                ),
                MmaVariant(
                    block_t=block_t, warpgroups=1, tiles=2, num_stages=4, blocks_at_once=3
                ),
            )
            for block_t in (8, 16)
        },
        32: (
            MmaVariant(block_t=32, warpgroups=2, tiles=1, num_stages=4, blocks_at_once=2),
        ),
        64: (
            MmaVariant(
                block_t=64, warpgroups=2, tiles=1, num_stages=3, x_blocks=2, x_slots=3,
                blocks_at_once=2,
            ),
        ),
        128: tuple(
            MmaVariant(
                block_t=128, warpgroups=warpgroups, tiles=1, num_stages=3, x_blocks=1, x_slots=6
            )
            for warpgroups in (4, 2)
        ),
        256: (
            MmaVariant(block_t=256, warpgroups=2, tiles=1, num_stages=3, x_blocks=1, x_slots=4),
        ),
    }
)  # fmt: skip
"""By the tokens of a block; the second where there are few tiles of outputs."""
_HALVED = 128
"""More tokens than this go in tiles of so many where all blocks then run at once: two such blocks
of 128 outputs are faster than one of 256 tokens."""
_MIN_STEPS, _FEWEST_STEPS = 4, 2
"""Of a part: parts cost their start, and that their sums meet. The second for few tokens or
tiles."""
_FEW_TOKENS = 16
_LEAST_BUSY = 0.7
"""Of all turns of blocks. Measured at 768 and 1024 tokens: at 0.55 and 0.61 writing the matrix out
takes 14 % less time at least, at 0.73 about as much."""


def choose_mma_tiling(
    layout: QuantLayout,
    num_rows: int,
    num_columns: int,
    num_tokens: int,
    num_multiprocessors: int,
) -> MmaTiling:
    """The smallest tile that holds the tokens, and parts as long as all blocks run at once.

    A rule without measured times, within 80 % of the best variant on an H200
    (tests/kernels/test_quant_tuned.py).
    """
    variant = _choose_variant(layout, num_rows, num_tokens, num_multiprocessors)
    num_tiles = _num_tiles(variant, num_rows, num_tokens)
    has_few_tiles = 12 * num_tiles < num_multiprocessors
    num_places = num_multiprocessors * variant.blocks_at_once
    # Large sums are slow to meet.
    most_parts = MAX_PARTS if variant.block_t < _HALVED or has_few_tiles else MAX_PARTS // 2
    is_small = has_few_tiles or variant.block_t <= _FEW_TOKENS
    min_steps = _FEWEST_STEPS if is_small else _MIN_STEPS
    most_parts = min(most_parts, num_columns // STEP_COLUMNS // min_steps)
    num_parts = 1
    while num_parts * 2 <= most_parts and num_tiles * num_parts * 2 <= num_places:
        num_parts *= 2
    return MmaTiling(variant=variant, num_parts=num_parts)


def _choose_variant(
    layout: QuantLayout, num_rows: int, num_tokens: int, num_multiprocessors: int
) -> MmaVariant:
    block_t = next((size for size in _VARIANTS if size >= num_tokens), max(_VARIANTS))
    if block_t > _HALVED:
        halved = _fitting(layout, _VARIANTS[_HALVED][-1:])
        if _num_tiles(halved, num_rows, num_tokens) <= num_multiprocessors:
            return halved
    first = _fitting(layout, _VARIANTS[block_t])
    few = num_multiprocessors // (3 if block_t <= _FEW_TOKENS else 12)
    if _num_tiles(first, num_rows, num_tokens) <= few:
        return _fitting(layout, _VARIANTS[block_t][-1:])
    return first


def fills_card(tiling: MmaTiling, num_rows: int, num_tokens: int, num_multiprocessors: int) -> bool:
    """Whether its tiles need not be cut to be enough, and leave little idle in their last turn."""
    num_tiles = _num_tiles(tiling.variant, num_rows, num_tokens)
    num_places = num_multiprocessors * tiling.variant.blocks_at_once
    num_turns = -(-num_tiles // num_places)
    is_busy = num_turns == 1 or num_tiles >= _LEAST_BUSY * num_turns * num_places
    return tiling.num_parts == 1 and is_busy


def _num_tiles(variant: MmaVariant, num_rows: int, num_tokens: int) -> int:
    return -(-num_rows // variant.block_n) * -(-num_tokens // variant.block_t)


def _fitting(layout: QuantLayout, variants: Sequence[MmaVariant]) -> MmaVariant:
    """The first that fits, with fewer blocks at once where it does not with its own."""
    return next(
        found
        for variant in variants
        for num_blocks in range(variant.blocks_at_once, 0, -1)
        if (found := fitted(layout, replace(variant, blocks_at_once=num_blocks))) is not None
    )
