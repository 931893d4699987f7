"""Times what lies between the products: norms, rotary, SwiGLU, sampling.

Shapes: T tokens, S rows, D model dim, F ffn size, M all heads of the fused projection, N query
heads, H head dim, R rotary dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from pipeserve.bench.ceilings import Ceilings
from pipeserve.bench.kernel_attention import BLOCK_SIZE, KV_TYPES, make_cache, token_bytes
from pipeserve.bench.kernel_shapes import KernelShape
from pipeserve.bench.kernel_times import KernelTime, Work, num_sets, time_us
from pipeserve.kernels import fused, rotary, sampling
from pipeserve.kernels.sampling_logprobs import log_probs

TOKENS = (1, 32, 256)
SPREADS = (6.0, 1.0)
"""Of the logits: how many tokens top-p keeps depends on it, a few or most of them."""
LARGE_VOCABULARY = 262_144
"""Gemma 3's."""
_MOST_SETS = 32
_EPS = 1e-5

Calls = Sequence[Callable[[], object]]


def _random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """So many that they leave the cache, as far as _MOST_SETS goes."""
    first = torch.randn(shape, device=device, dtype=dtype)
    return [first] + [
        torch.randn_like(first) for _ in range(num_sets(first.nbytes, least=8, most=_MOST_SETS) - 1)
    ]


def time_norms(
    shape: KernelShape, ceilings: Ceilings, device: torch.device
) -> Iterator[KernelTime]:
    """From and to the float32 residual stream."""
    dim = shape.hidden_size
    weight_D = torch.ones(dim, device=device)
    for num_tokens in TOKENS:
        x, wide = (
            _random(device, num_tokens, dim, dtype=dtype)
            for dtype in (torch.float16, torch.float32)
        )
        norm = partial(fused.rms_norm, dtype=torch.float16)
        timed: Mapping[str, tuple[Calls, int]] = {
            "rms_norm": ([partial(norm, each, weight_D, _EPS) for each in wide], 6),
            "add_rms_norm": (
                [
                    partial(fused.add_rms_norm, each, residual, weight_D, _EPS)
                    for each, residual in zip(x, wide, strict=False)
                ],
                12,
            ),
        }
        for kernel, (calls, value_bytes) in timed.items():
            work = Work(num_bytes=value_bytes * num_tokens * dim)
            yield _timed("norms", shape, kernel, num_tokens, calls, work, ceilings)


def time_rotary(
    shape: KernelShape, ceilings: Ceilings, device: torch.device
) -> Iterator[KernelTime]:
    """Queries and keys turned, keys and values written to the cache."""
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    for kv in KV_TYPES:
        for num_tokens in TOKENS:
            qkv = _random(device, num_tokens, num_heads, shape.head_dim)
            cos_TR, sin_TR = torch.randn(2, num_tokens, shape.head_dim, device=device)
            cache = make_cache(64, shape, kv, device)
            slots_T = torch.randperm(64 * BLOCK_SIZE, device=device)[:num_tokens]
            calls = [
                partial(
                    rotary.rotary_and_cache,
                    each,
                    cos_TR,
                    sin_TR,
                    cache.k_BPKH,
                    cache.v_BPKH,
                    slots_T,
                    k_scale_BKP=cache.k_scale_BKP,
                    v_scale_BKP=cache.v_scale_BKP,
                )
                for each in qkv
            ]
            q_bytes = 2 * shape.num_heads * shape.head_dim
            row_bytes = 2 * num_heads * shape.head_dim + q_bytes + token_bytes(shape, kv)
            work = Work(num_bytes=num_tokens * (row_bytes + 8 * shape.head_dim))
            kernel = f"rotary, {str(kv).removeprefix('torch.')} cache"
            yield _timed("rotary", shape, kernel, num_tokens, calls, work, ceilings)


def time_swiglu(
    shape: KernelShape, ceilings: Ceilings, device: torch.device
) -> Iterator[KernelTime]:
    """Gate and up side by side."""
    for num_tokens in TOKENS:
        gate_up = _random(device, num_tokens, 2 * shape.ffn_size)
        calls = [partial(fused.swiglu, each) for each in gate_up]
        work = Work(num_bytes=6 * num_tokens * shape.ffn_size)
        yield _timed("swiglu", shape, "swiglu", num_tokens, calls, work, ceilings)


def time_sampling(
    shape: KernelShape, ceilings: Ceilings, device: torch.device
) -> Iterator[KernelTime]:
    """Of the model's vocabulary and of a large one. The limit reads the logits once."""
    for vocab_size, num_rows in product((shape.vocab_size, LARGE_VOCABULARY), TOKENS):
        num_bytes = 4 * num_rows * vocab_size
        work = Work(num_bytes=num_bytes)
        for spread in SPREADS:
            logits = [
                torch.randn(num_rows, vocab_size, device=device) * spread
                for _ in range(num_sets(num_bytes, least=4, most=8))
            ]
            for kernel, calls in _sampling_calls(logits, has_all=spread == SPREADS[0]).items():
                kernel = f"{kernel}, {vocab_size} tokens, spread {spread:.0f}"
                yield _timed("sampling", shape, kernel, num_rows, calls, work, ceilings)


def _sampling_calls(logits: Sequence[Tensor], *, has_all: bool) -> Mapping[str, Calls]:
    """By name; without has_all those that depend on the logits' spread."""
    num_rows, vocab_size = logits[0].shape
    temperature_S = torch.full((num_rows,), 0.8, device=logits[0].device)
    top_p_S, min_p_S = torch.full_like(temperature_S, 0.9), torch.zeros_like(temperature_S)
    uniform_S = torch.rand(num_rows, dtype=torch.float64, device=logits[0].device)
    rows_S = torch.arange(num_rows, dtype=torch.int32, device=logits[0].device)
    ids_S = torch.zeros(num_rows, dtype=torch.int64, device=logits[0].device)

    def filtered(top_k: int) -> Calls:
        top_k_S = torch.full_like(rows_S, top_k)
        return [
            partial(
                sampling.sample_filtered, each, temperature_S, top_k_S, top_p_S, min_p_S, uniform_S
            )
            for each in logits
        ]

    calls: dict[str, Calls] = {
        "top-k 50, top-p 0.9": filtered(50),
        "top-p 0.9": filtered(vocab_size),
    }
    if has_all:
        calls["greedy"] = [partial(sampling.greedy, each) for each in logits]
        calls["from all"] = [
            partial(sampling.sample, each, temperature_S, min_p_S, uniform_S) for each in logits
        ]
        calls["20 log-probabilities"] = [
            partial(log_probs, each, ids_S, rows_S, 20) for each in logits
        ]
    return calls


def _timed(
    group: str, shape: KernelShape, kernel: str, num_tokens: int, calls: Calls, work: Work,
    ceilings: Ceilings,
) -> KernelTime:  # fmt: skip
    return KernelTime(
        group=group,
        model=shape.name,
        kernel=kernel,
        size=f"{num_tokens} rows",
        us=time_us(calls),
        limit_us=work.limit_us(ceilings),
    )
