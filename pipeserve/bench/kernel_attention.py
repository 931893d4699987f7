"""Times attention over a paged cache: of decoding rows, and of prompts.

Shapes: T tokens, S sequences, N query heads, K kv heads, H head dim, B blocks, P position in block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeserve.bench.ceilings import Ceilings
from pipeserve.bench.kernel_shapes import KernelShape
from pipeserve.bench.kernel_times import KernelTime, Work, num_sets, time_us
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.attention_prefill import paged_attention_prefill

BLOCK_SIZE = 16
KV_TYPES = (torch.float16, torch.int8)
DECODE_SIZES = tuple((rows, length) for rows in (1, 16, 128) for length in (512, 2048, 8192))
PREFILL_SIZES = ((8, 512), (1, 4096), (1, 8192))
"""Sequences and their tokens."""
_SETS = 8
"""Caches that decoding rows go through, as they go through layers, where all fit in the memory."""
_CACHE_BYTES = 3 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One layer's."""

    k_BPKH: Tensor
    v_BPKH: Tensor
    k_scale_BKP: Tensor | None = None
    v_scale_BKP: Tensor | None = None


def make_cache(num_blocks: int, shape: KernelShape, kv: torch.dtype, device: torch.device) -> Cache:
    """Random keys and values."""
    size = (num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    if kv != torch.int8:
        k, v = (torch.randn(size, device=device, dtype=kv) for _ in "kv")
        return Cache(k_BPKH=k, v_BPKH=v)
    k, v = (torch.randint(-127, 128, size, device=device, dtype=torch.int8) for _ in "kv")
    scales = torch.rand(2, num_blocks, shape.num_kv_heads, BLOCK_SIZE, device=device) * 0.01 + 0.01
    k_scale, v_scale = scales.half()
    return Cache(k_BPKH=k, v_BPKH=v, k_scale_BKP=k_scale, v_scale_BKP=v_scale)


def token_bytes(shape: KernelShape, kv: torch.dtype) -> int:
    """Of a token's key and value in one layer, with their scales."""
    scale_bytes = 2 if kv == torch.int8 else 0
    return 2 * shape.num_kv_heads * (shape.head_dim * kv.itemsize + scale_bytes)


def time_decode(
    shape: KernelShape, ceilings: Ceilings, device: torch.device
) -> Iterator[KernelTime]:
    """A token for each of several sequences of equal length."""
    for kv in KV_TYPES:
        for num_seqs, length in DECODE_SIZES:
            num_bytes = num_seqs * length * token_bytes(shape, kv)
            us = _decode_us(shape, kv, num_seqs, length, device)
            yield KernelTime(
                group="decode",
                model=shape.name,
                kernel=f"attention, {_kv_name(kv)} cache",
                size=f"{num_seqs} x {length}",
                us=us,
                limit_us=Work(num_bytes=num_bytes).limit_us(ceilings),
            )


def _decode_us(
    shape: KernelShape, kv: torch.dtype, num_seqs: int, length: int, device: torch.device
) -> float:
    num_blocks = num_seqs * length // BLOCK_SIZE
    num_bytes = num_seqs * length * token_bytes(shape, kv)
    num_caches = max(1, min(num_sets(num_bytes, most=32), _CACHE_BYTES // num_bytes))
    caches = [make_cache(num_blocks, shape, kv, device) for _ in range(num_caches)]
    table_SB = torch.randperm(num_blocks, device=device).view(num_seqs, -1).int()
    lengths_S = torch.full((num_seqs,), length, device=device, dtype=torch.int32)
    q_SNH = torch.randn(
        num_seqs, shape.num_heads, shape.head_dim, device=device, dtype=torch.float16
    )
    calls = [
        partial(
            paged_attention_decode,
            q_SNH,
            cache.k_BPKH,
            cache.v_BPKH,
            table_SB,
            lengths_S,
            shape.head_dim**-0.5,
            k_scale_BKP=cache.k_scale_BKP,
            v_scale_BKP=cache.v_scale_BKP,
        )
        for cache in caches
    ]
    return time_us(calls * -(-_SETS // len(calls)))


def time_prefill(
    shape: KernelShape, ceilings: Ceilings, device: torch.device
) -> Iterator[KernelTime]:
    """Whole prompts, with indices of 64 bits and first tokens given, as a stage has them; half of
    the products of a square are above the diagonal."""
    for kv in KV_TYPES:
        for num_seqs, length in PREFILL_SIZES:
            pairs = num_seqs * length * (length + 1) / 2
            work = Work(flops=4 * shape.num_heads * shape.head_dim * pairs)
            yield KernelTime(
                group="prefill",
                model=shape.name,
                kernel=f"attention, {_kv_name(kv)} cache",
                size=f"{num_seqs} x {length}",
                us=_prefill_us(shape, kv, num_seqs, length, device),
                limit_us=work.limit_us(ceilings),
            )


def _prefill_us(
    shape: KernelShape, kv: torch.dtype, num_seqs: int, length: int, device: torch.device
) -> float:
    num_blocks = num_seqs * length // BLOCK_SIZE
    cache = make_cache(num_blocks, shape, kv, device)
    table_SB = torch.randperm(num_blocks, device=device).view(num_seqs, -1)
    first_S = torch.zeros(num_seqs, device=device, dtype=torch.int64)
    q_TNH = torch.randn(
        num_seqs * length, shape.num_heads, shape.head_dim, device=device, dtype=torch.float16
    )
    call = partial(
        paged_attention_prefill,
        q_TNH,
        cache.k_BPKH,
        cache.v_BPKH,
        table_SB,
        first_S,
        torch.full_like(first_S, length),
        shape.head_dim**-0.5,
        starts_S=torch.arange(num_seqs, device=device) * length,
        k_scale_BKP=cache.k_scale_BKP,
        v_scale_BKP=cache.v_scale_BKP,
        out_TNH=torch.empty_like(q_TNH),
    )
    return time_us([call] * 4)


def _kv_name(kv: torch.dtype) -> str:
    return str(kv).removeprefix("torch.")
