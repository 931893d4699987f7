"""Tries every way to multiply by each matrix on this card, checks its result and keeps the fastest.

What it finds goes to the card's own table of choices, beside the rule's choice where that is as
good.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from pipeserve.bench.imma_sweep import prepared_tilings
from pipeserve.bench.kernel_products import copies_beyond_cache, random_weight
from pipeserve.bench.kernel_shapes import KernelShape
from pipeserve.bench.kernel_times import time_us
from pipeserve.errors import ConfigError
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import GemmTiling, shared_bytes
from pipeserve.kernels.quant_gemv import gemv
from pipeserve.kernels.quant_imma import imma, takes_imma
from pipeserve.kernels.quant_layout import PlanarWeight, QuantLayout
from pipeserve.kernels.quant_mma import compile_ahead, has_mma, is_made_for, why_not_loaded
from pipeserve.kernels.quant_mma_tiling import STEP_COLUMNS, MmaTiling, MmaVariant, fitted
from pipeserve.kernels.quant_products import multiply
from pipeserve.kernels.quant_split import card_limits
from pipeserve.kernels.quant_tuned import ProductKey, TunedProduct, TunedTable, as_json, read_table
from pipeserve.kernels.quant_ways import (
    BatchWay,
    Dequantise,
    FewRowsWay,
    Gemm,
    Gemv,
    Imma,
    Mma,
    rule_way,
)
from pipeserve.kernels.rounded_rows import quantise_rows
from pipeserve.kernels.tuned_files import TunedTableError, file_stem

FEW_ROWS = (1, 2, 4)
BATCH_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024)
BYTE_ROWS = (4, 8, 16, 32, 64)
"""Of these, where bytes on tensor cores are tried as well."""
_SCRATCH_FROM = 64
"""With fewer rows, writing the matrix out is never faster."""
GAIN = 1.03
"""A way must be so much faster than the rule's to take its place."""
_ERROR_LIMIT = 1.2e-3
_BYTES_ERROR_LIMIT = 1.5e-2
"""Rounding activations to bytes alone makes half of it."""
_LAUNCH_SHAPES = ((1, 32), (2, 32), (4, 32), (2, 64), (4, 64))
"""Outputs per program of gemv, and the pieces of a row that its threads take at once."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The ways for one matrix and number of rows, microseconds; those with wrong results left
    out."""

    key: ProductKey
    num_tokens: int
    rule: BatchWay
    times_us: Mapping[BatchWay, float]
    num_wrong: int

    @property
    def best(self) -> BatchWay:
        """The rule's unless another is GAIN times as fast."""
        fastest = min(self.times_us, key=self.times_us.__getitem__)
        gains = self.rule not in self.times_us or (
            self.times_us[self.rule] > GAIN * self.times_us[fastest]
        )
        return fastest if gains else self.rule

    @property
    def rule_share(self) -> float:
        """Of the tuned speed that the rule alone reaches."""
        return self.times_us[self.best] / self.times_us.get(self.rule, float("inf"))

    def __str__(self) -> str:
        type_name, num_rows, num_columns = self.key
        fastest = sorted(self.times_us, key=self.times_us.__getitem__)[:3]
        listed = "; ".join(f"{self.times_us[way]:.1f} {way}" for way in fastest)
        wrong = f", {self.num_wrong} WRONG" if self.num_wrong else ""
        return (
            f"{num_rows}x{num_columns} {type_name} {self.num_tokens:4} rows: {self.best}, the rule "
            f"at {self.rule_share:.0%} | {listed}{wrong}"
        )


def tune(
    shapes: Sequence[KernelShape],
    device: torch.device,
    folder: Path,
    *,
    report: Callable[[str], None],
) -> Path:
    """Time all matrices of these shapes and write the card's table, after each matrix; entries of
    other matrices stay. Takes minutes.

    Raises:
        ConfigError: the folder cannot be made.
    """
    _make_folder(folder)
    card = torch.cuda.get_device_name(device)
    path = folder / f"{file_stem(card)}.json"
    products = dict(_earlier(path, card))
    keys = dict.fromkeys(
        (matrix.type_name, matrix.num_rows, matrix.num_columns)
        for shape in shapes
        for matrix in shape.matrices
    )
    trials: list[Trial] = []
    for key in keys:
        few, batch = _tune_matrix(key, device, report)
        trials += batch
        ways = {trial.num_tokens: trial.best for trial in batch}
        products[key] = TunedProduct(few_rows=few, batch=ways)
        note = f"Measured by pipeserve bench kernels --tune with torch {torch.__version__}."
        _write(path, TunedTable(card=card, note=note, products=products))
    shares = [trial.rule_share for trial in trials]
    report(
        f"without the table, by the rule alone: {sum(shares) / len(shares):.0%} of the tuned speed "
        f"on average, {min(shares):.0%} at least"
    )
    return path


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(
            f"tuned kernel choices cannot be kept in {folder}: {problem.strerror}; "
            "set cache_dir to a folder that can be written"
        ) from None


def _write(path: Path, table: TunedTable) -> None:
    """At once: a daemon may start meanwhile."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(as_json(table), encoding="utf-8")
    unfinished.replace(path)


def _earlier(path: Path, card: str) -> Mapping[ProductKey, TunedProduct]:
    """What an earlier run measured; nothing where it cannot be read, as it is written anew."""
    try:
        return read_table(path, card).products
    except TunedTableError:
        return {}


def _tune_matrix(
    key: ProductKey, device: torch.device, report: Callable[[str], None]
) -> tuple[Mapping[int, FewRowsWay], list[Trial]]:
    weights = copies_beyond_cache(random_weight(*key, device))
    values_NK = dequantise(weights[0], torch.float32)
    few: dict[int, FewRowsWay] = {}
    for num_tokens in FEW_ROWS:
        few[num_tokens], gemv_us, text = _try_few_rows(weights, num_tokens)
        report(text)
        few[num_tokens] = (
            _try_bytes(weights, values_NK, num_tokens, gemv_us, report) or few[num_tokens]
        )
    batch = []
    for num_tokens in BATCH_ROWS:
        batch.append(_try_batch(weights, values_NK, num_tokens))
        report(str(batch[-1]))
    for trial in batch:
        batch_us = trial.times_us[trial.best]
        bytes_way = _try_bytes(weights, values_NK, trial.num_tokens, batch_us, report)
        if bytes_way is None:
            break  # and not for more rows either: a table's ways follow each other
        few[trial.num_tokens] = bytes_way
    del weights, values_NK
    torch.cuda.empty_cache()
    return MappingProxyType(few), batch


def _try_few_rows(weights: Sequence[PlanarWeight], num_tokens: int) -> tuple[Gemv, float, str]:
    """The fastest launch shape, gemv's own where that is as good, its time, and how it compares."""
    weight = weights[0]
    x_TK = torch.randn(num_tokens, weight.num_columns, device=weight.low.device).half()
    multiply_rows = partial(gemv, quantise_rows(x_TK), out_dtype=torch.float16)
    expected = multiply_rows(weight).float()
    ways = [
        Gemv(block_n=block_n, pieces=pieces, num_parts=num_parts)
        for block_n, pieces in _LAUNCH_SHAPES
        for num_parts in (1, 2, 4)
    ]
    times_us: dict[Gemv, float] = {}
    for way in (Gemv(), *ways):
        call = partial(
            multiply_rows, block_n=way.block_n, pieces=way.pieces, num_parts=way.num_parts
        )
        if _error(call(weight), expected) < _ERROR_LIMIT:
            times_us[way] = time_us([partial(call, copy) for copy in weights])
    own_us = times_us[Gemv()]
    fastest = min(times_us, key=times_us.__getitem__)
    best = fastest if own_us > GAIN * times_us[fastest] else Gemv()
    text = (
        f"{weight.num_rows}x{weight.num_columns} {weight.type_name} {num_tokens:4} rows: {best}, "
        f"{times_us[best] / own_us:.0%} of gemv's own {own_us:.1f} us"
    )
    return best, times_us[best], text


def _try_bytes(
    weights: Sequence[PlanarWeight],
    values_NK: Tensor,
    num_tokens: int,
    other_us: float,
    report: Callable[[str], None],
) -> Imma | None:
    """The fastest tiling of the kernel on bytes, where it is faster than the best other way."""
    weight = weights[0]
    if num_tokens not in BYTE_ROWS or not takes_imma(weight):
        return None
    x_TK = torch.randn(num_tokens, weight.num_columns, device=weight.low.device).half()
    multiply_rows = partial(imma, quantise_rows(x_TK))
    wanted = x_TK.float() @ values_NK.T
    times_us: dict[Imma, float] = {}
    for tiling in prepared_tilings(weight, num_tokens):
        call = partial(multiply_rows, tiling=tiling)
        if _error(call(weight), wanted) < _BYTES_ERROR_LIMIT:
            times_us[Imma(tiling=tiling)] = time_us([partial(call, copy) for copy in weights])
    if not times_us:
        report(f"{weight.type_name}, {num_tokens} rows: every product on bytes is WRONG")
        return None
    best = min(times_us, key=times_us.__getitem__)
    report(
        f"{weight.num_rows}x{weight.num_columns} {weight.type_name} {num_tokens:4} rows: "
        f"{times_us[best]:.1f} us {best}, {other_us:.1f} us otherwise"
    )
    return best if other_us > GAIN * times_us[best] else None


def _try_batch(weights: Sequence[PlanarWeight], values_NK: Tensor, num_tokens: int) -> Trial:
    weight = weights[0]
    key = (weight.type_name, weight.num_rows, weight.num_columns)
    device = weight.low.device
    x_TK = torch.randn(num_tokens, weight.num_columns, device=device).half()
    wanted = x_TK.float() @ values_NK.T
    rule = rule_way(
        *key, num_tokens, has_mma=has_mma(device) and is_made_for(weight),
        num_multiprocessors=card_limits(device).num_multiprocessors,
    )  # fmt: skip
    times_us: dict[BatchWay, float] = {}
    num_wrong = 0
    for way in dict.fromkeys((rule, *_candidates(weight, num_tokens))):
        if _error(multiply(way, x_TK, weight), wanted) < _ERROR_LIMIT:
            calls = [partial(multiply, way, x_TK, copy) for copy in weights]
            times_us[way] = time_us(calls)
        else:
            num_wrong += 1
    assert times_us, f"every way to multiply {key} by {num_tokens} rows gives wrong results"
    return Trial(key=key, num_tokens=num_tokens, rule=rule, times_us=times_us, num_wrong=num_wrong)


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def _candidates(weight: PlanarWeight, num_tokens: int) -> Iterator[BatchWay]:
    if num_tokens <= 256:
        yield Gemm()
    if num_tokens >= _SCRATCH_FROM:
        yield Dequantise()
    device = weight.low.device
    if has_mma(device) and is_made_for(weight):
        tilings = list(
            mma_tilings(
                weight.layout, weight.num_rows, weight.num_columns, num_tokens,
                card_limits(device).num_multiprocessors,
            )
        )  # fmt: skip
        variants = dict.fromkeys(tiling.variant for tiling in tilings)
        compile_ahead([(weight.type_name, variant, torch.float16) for variant in variants])
        usable = {v for v in variants if why_not_loaded(weight.type_name, v, device) is None}
        yield from (Mma(tiling=tiling) for tiling in tilings if tiling.variant in usable)
    elif num_tokens <= 256:
        yield from gemm_ways(weight.layout, num_tokens, card_limits(device).shared_bytes)


def gemm_ways(layout: QuantLayout, num_tokens: int, most_shared_bytes: int) -> Iterator[Gemm]:
    """Tilings for cards without the kernel for Hopper, as far as they fit the shared memory."""
    block_t, wide, num_stages = min(128, num_tokens), 1, 2
    for block_n, num_warps in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8)):
        if shared_bytes(layout, block_n, block_t, wide, num_stages) > most_shared_bytes:
            continue
        for num_parts in (1, 2, 4):
            yield Gemm(
                tiling=GemmTiling(
                    block_n=block_n, block_t=block_t, wide=wide, num_warps=num_warps,
                    num_stages=num_stages, num_parts=num_parts,
                )
            )  # fmt: skip


def mma_tilings(
    layout: QuantLayout,
    num_rows: int,
    num_columns: int,
    num_tokens: int,
    num_multiprocessors: int,
) -> Iterator[MmaTiling]:
    """Variants that fit, each with parts that neither leave most of the card idle nor make much
    more blocks than run at once."""
    for variant in _variants(num_tokens):
        tight = fitted(layout, variant)
        if tight is None:
            continue
        num_tiles = -(-num_rows // tight.block_n) * -(-num_tokens // tight.block_t)
        places = num_multiprocessors * tight.blocks_at_once
        for num_parts in (1, 2, 4, 8):
            num_steps = num_columns // STEP_COLUMNS // num_parts
            is_useful = num_parts == 1 or num_tiles * num_parts <= 2.2 * places
            if num_parts == 1 or (is_useful and num_steps >= 2):
                yield MmaTiling(variant=tight, num_parts=num_parts)


def _variants(num_tokens: int) -> Iterator[MmaVariant]:
    for block_t in (128, 256) if num_tokens > 128 else (num_tokens,):
        make = partial(MmaVariant, block_t=block_t)
        if block_t <= 32:
            yield make(warpgroups=1, tiles=1, num_stages=4, blocks_at_once=4)
            yield make(warpgroups=1, tiles=1, num_stages=6, blocks_at_once=3)
            yield make(warpgroups=2, tiles=1, num_stages=4, blocks_at_once=2)
            yield make(warpgroups=4, tiles=1, num_stages=5)
            yield make(warpgroups=2, tiles=2, num_stages=5)
        elif block_t == 64:
            yield make(warpgroups=1, tiles=1, num_stages=4, x_blocks=1, x_slots=5, blocks_at_once=3)
            yield make(warpgroups=2, tiles=1, num_stages=3, x_blocks=2, x_slots=3, blocks_at_once=2)
            yield make(warpgroups=4, tiles=1, num_stages=3, x_blocks=2)
            yield make(warpgroups=2, tiles=2, num_stages=3, x_blocks=2)
        elif block_t == 128:
            yield make(warpgroups=4, tiles=1, num_stages=3, x_blocks=1, x_slots=6)
            yield make(warpgroups=2, tiles=1, num_stages=3, x_blocks=1, x_slots=6)
            yield make(warpgroups=2, tiles=2, num_stages=3, x_blocks=1, x_slots=6)
            yield make(warpgroups=1, tiles=2, num_stages=2, x_blocks=1, x_slots=3, blocks_at_once=2)
        else:
            yield make(warpgroups=2, tiles=1, num_stages=3, x_blocks=1, x_slots=4)
