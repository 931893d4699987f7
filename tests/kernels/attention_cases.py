"""Random paged caches for the attention tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeserve.kernels.reference_attention import quantise_kv


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """What a kernel is tried with. `kv` is the cache's type; queries are float16 beside int8."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    kv: torch.dtype = torch.float32
    index: torch.dtype = torch.int32
    has_sinks: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def activation(self) -> torch.dtype:
        return torch.float16 if self.kv == torch.int8 else self.kv

    @property
    def tolerance(self) -> dict[str, float]:
        """Of outputs of about 1: float32 sums in another order, or probabilities in half."""
        largest = 5e-6 if self.kv == torch.float32 else 1e-2 if self.kv == torch.bfloat16 else 2e-3
        return {"atol": largest, "rtol": largest}

    def __str__(self) -> str:
        kv = str(self.kv).removeprefix("torch.")
        words = [f"{self.num_heads}q{self.num_kv_heads}", f"h{self.head_dim}", kv]
        words += [f"p{self.block_size}", *(f"{k}{v}" for k, v in self.options.items())]
        return "-".join(words + ["sinks"] * self.has_sinks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCache:
    """Caches whose blocks lie in random order, and the kernels' options that go with them."""

    k_BPKH: Tensor
    v_BPKH: Tensor
    block_table_SB: Tensor
    options: Mapping[str, Any]


def paged_cache(
    case: AttentionCase, *, num_seqs: int, length: int, device: torch.device
) -> PagedCache:
    """Every sequence has blocks for `length` positions; past them stand ids of no block."""
    generator = torch.Generator().manual_seed(length)
    per_seq = -(-length // case.block_size)
    num_blocks = num_seqs * per_seq + 3
    shape = (num_blocks, case.block_size, case.num_kv_heads, case.head_dim)
    k, v = torch.randn(2, *shape, generator=generator)
    options = dict(case.options)
    if case.kv == torch.int8:
        k, options["k_scale_BKP"] = _quantised(k, device)
        v, options["v_scale_BKP"] = _quantised(v, device)
    if case.has_sinks:
        options["sinks_N"] = torch.randn(case.num_heads, generator=generator).to(device)
    blocks = torch.randperm(num_blocks, generator=generator)[: num_seqs * per_seq]
    table = torch.full((num_seqs, per_seq + 2), 2**30)
    table[:, :per_seq] = blocks.view(num_seqs, per_seq)
    return PagedCache(
        k_BPKH=k.to(device, case.kv),
        v_BPKH=v.to(device, case.kv),
        block_table_SB=table.to(device, case.index),
        options=options,
    )


def _quantised(x_BPKH: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    num_blocks, page, num_kv_heads, head_dim = x_BPKH.shape
    codes, scale = quantise_kv(x_BPKH.view(-1, num_kv_heads, head_dim))
    scale_BKP = scale.view(num_blocks, page, num_kv_heads).transpose(1, 2).contiguous()
    return codes.view(x_BPKH.shape), scale_BKP.to(device)
