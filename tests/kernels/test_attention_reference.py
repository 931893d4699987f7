"""The twins with options: equal to the plain twins without them, and each option as defined."""

from __future__ import annotations

import pytest
import torch

from pipeserve.kernels import reference, reference_attention
from tests.kernels.attention_cases import AttentionCase, PagedCache, paged_cache

SCALE = 0.15
CPU = torch.device("cpu")


@pytest.fixture
def cache() -> PagedCache:
    return paged_cache(AttentionCase(index=torch.int64), num_seqs=2, length=48, device=CPU)


def attend(cache: PagedCache, q_SNH: torch.Tensor, **options: object) -> torch.Tensor:
    return reference_attention.paged_attention_decode(
        q_SNH,
        cache.k_BPKH,
        cache.v_BPKH,
        cache.block_table_SB,
        torch.tensor([48, 20]),
        SCALE,
        **options,
    )


def newest(cache: PagedCache, lengths: tuple[int, int]) -> torch.Tensor:
    """The values of each sequence's last position, [S, K, H]."""
    blocks = [int(cache.block_table_SB[s, (n - 1) // 16]) for s, n in enumerate(lengths)]
    return cache.v_BPKH[blocks, [(n - 1) % 16 for n in lengths]]


def test_without_options_it_is_the_plain_twin(cache: PagedCache) -> None:
    q_SNH = torch.randn(2, 4, 64)
    plain = reference.paged_attention_decode(
        q_SNH,
        cache.k_BPKH,
        cache.v_BPKH,
        cache.block_table_SB[:, :3],
        torch.tensor([48, 20]),
        SCALE,
    )
    torch.testing.assert_close(attend(cache, q_SNH), plain)


def test_a_window_of_one_sees_itself(cache: PagedCache) -> None:
    found = attend(cache, torch.randn(2, 4, 64), window=1)
    expected = newest(cache, (48, 20)).repeat_interleave(2, dim=1)
    torch.testing.assert_close(found, expected)


def test_soft_cap_bounds_scores(cache: PagedCache) -> None:
    q_SNH = torch.randn(2, 4, 64)
    torch.testing.assert_close(
        attend(cache, q_SNH, soft_cap=1e4), attend(cache, q_SNH), atol=1e-4, rtol=1e-4
    )
    # Scores of at most 0.001 leave probabilities equal.
    flat = attend(cache, q_SNH, soft_cap=1e-3)
    torch.testing.assert_close(flat, attend(cache, q_SNH * 0.0), atol=1e-3, rtol=1e-3)


def test_a_sink_takes_its_share(cache: PagedCache) -> None:
    q_SNH = torch.zeros(2, 4, 64)
    # All scores are 0: a sink of log(n) has as much weight as n positions together.
    sinks_N = torch.full((4,), 20.0).log()
    half = attend(cache, q_SNH, sinks_N=sinks_N)[1]
    torch.testing.assert_close(half, attend(cache, q_SNH)[1] / 2)


def test_int8_codes_do_not_depend_on_the_chunk() -> None:
    qkv_TMH = torch.randn(12, 8, 64)
    cos_TR, sin_TR = torch.randn(2, 12, 64)
    slots_T = torch.randperm(32)[:12]

    def written(chunk: int) -> list[torch.Tensor]:
        caches = [torch.zeros(2, 16, 2, 64, dtype=torch.int8) for _ in "kv"]
        caches += [torch.zeros(2, 2, 16, dtype=torch.float16) for _ in "kv"]
        for start in range(0, 12, chunk):
            part = slice(start, start + chunk)
            reference_attention.rotary_and_cache_int8(
                qkv_TMH[part], cos_TR[part], sin_TR[part], *caches, slots_T[part]
            )
        return caches

    for whole, chunked in zip(written(12), written(5), strict=True):
        assert bool(whole.any())
        assert torch.equal(whole, chunked)


def test_int8_keeps_values_to_half_a_step() -> None:
    x_TKH = torch.randn(40, 3, 64) * torch.logspace(-2, 3, 40).view(40, 1, 1)
    x_TKH[7, 1] = 0.0
    codes_TKH, scale_TK = reference_attention.quantise_kv(x_TKH)
    step_TK1 = scale_TK.float().unsqueeze(-1)
    error_TKH = (codes_TKH.float() * step_TK1 - x_TKH).abs()
    # Half a step of rounding, and what a scale rounded down cuts off the largest.
    assert bool((error_TKH <= step_TK1 * 0.5001 + x_TKH.abs() * 2**-10).all())
    assert bool((codes_TKH[7, 1] == 0).all())
