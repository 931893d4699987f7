"""Prefill attention agrees with its twins for every option, chunking and mix of sequences."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.attention_cases import AttentionCase, paged_cache

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import reference, reference_attention
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.attention_prefill import PrefillConfig, paged_attention_prefill

SCALE = 0.15
SMALL = PrefillConfig(rows=32, tile=16, num_warps=4, num_stages=2)
CASES = [
    AttentionCase(),
    AttentionCase(num_heads=3, num_kv_heads=1, head_dim=80, kv=torch.float16),
    AttentionCase(num_heads=3, num_kv_heads=3, block_size=32, index=torch.int64),
    AttentionCase(kv=torch.int8, block_size=32),
    AttentionCase(options={"window": 9}),
    AttentionCase(kv=torch.float16, options={"soft_cap": 3.0}),
    AttentionCase(has_sinks=True),
    AttentionCase(
        kv=torch.int8, head_dim=128, has_sinks=True, options={"window": 40, "soft_cap": 5.0}
    ),
]
WIDE = [
    AttentionCase(num_heads=group * 2, head_dim=head_dim, block_size=page, kv=kv, options=options)
    for group, head_dim, page, kv, options in itertools.product(
        (1, 4, 6),
        (64, 96, 256),
        (16, 32),
        (torch.float16, torch.int8),
        ({}, {"window": 33}, {"soft_cap": 4.0}),
    )
]


def check(case: AttentionCase, device: torch.device, config: PrefillConfig | None) -> None:
    cache = paged_cache(case, num_seqs=4, length=90, device=device)
    num_tokens_S = torch.tensor([9, 0, 21, 1], dtype=case.index, device=device)
    first_positions_S = torch.tensor([70, 3, 0, 16], dtype=case.index, device=device)
    q_TNH = torch.randn(31 + 2, case.num_heads, case.head_dim).to(device, case.activation)
    arguments = (
        q_TNH,
        cache.k_BPKH,
        cache.v_BPKH,
        cache.block_table_SB,
        first_positions_S,
        num_tokens_S,
        SCALE,
    )
    out_TNH = torch.full_like(q_TNH, 7.0)
    paged_attention_prefill(*arguments, **cache.options, out_TNH=out_TNH, config=config)
    expected = reference_attention.paged_attention_prefill(*arguments, **cache.options)
    torch.testing.assert_close(out_TNH[:31], expected[:31], **case.tolerance)
    assert bool((out_TNH[31:] == 7.0).all()), "rows of no chunk stay unwritten"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_twin(case: AttentionCase, device: torch.device) -> None:
    check(case, device, SMALL)


@pytest.mark.wide
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_agrees_with_twin_widely(case: AttentionCase, device: torch.device) -> None:
    check(case, device, SMALL)


def test_default_launch_shape(device: torch.device) -> None:
    check(AttentionCase(options={"window": 30}), device, None)


def test_takes_the_place_of_the_plain_twin(device: torch.device) -> None:
    cache = paged_cache(AttentionCase(), num_seqs=2, length=48, device=device)
    q_TNH = torch.randn(30, 8, 64, device=device)[:, :4]
    arguments = (
        q_TNH,
        cache.k_BPKH,
        cache.v_BPKH,
        cache.block_table_SB,
        torch.tensor([28, 0], device=device),
        torch.tensor([20, 10], device=device),
        SCALE,
    )
    found = paged_attention_prefill(*arguments, config=SMALL)
    torch.testing.assert_close(found, reference.paged_attention_prefill(*arguments))


def test_a_chunk_of_one_token_is_a_decode(device: torch.device) -> None:
    cache = paged_cache(AttentionCase(), num_seqs=2, length=48, device=device)
    q_SNH = torch.randn(2, 4, 64, device=device)
    lengths_S = torch.tensor([48, 9], device=device)
    caches = (cache.k_BPKH, cache.v_BPKH, cache.block_table_SB)
    decoded = paged_attention_decode(q_SNH, *caches, lengths_S, SCALE)
    chunked = paged_attention_prefill(
        q_SNH, *caches, lengths_S - 1, torch.ones_like(lengths_S), SCALE, config=SMALL
    )
    torch.testing.assert_close(chunked, decoded)


@pytest.mark.parametrize("num_tokens", [[9, 21, 0, 0], [0, 0, 0, 30], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_fillers_are_harmless(
    case: AttentionCase, num_tokens: list[int], device: torch.device
) -> None:
    """As in a captured graph: sequences without tokens, and rows that belong to none."""
    cache = paged_cache(case, num_seqs=4, length=90, device=device)
    num_tokens_S = torch.tensor(num_tokens, dtype=case.index, device=device)
    first_positions_S = torch.where(num_tokens_S > 0, 40, 0).to(case.index)
    cache.block_table_SB[num_tokens_S == 0] = 2**30  # no block: whoever reads it, crashes
    used = sum(num_tokens)
    q_TNH = torch.randn(70, case.num_heads, case.head_dim).to(device, case.activation)
    q_TNH[used:] = float("nan")
    arguments = (cache.k_BPKH, cache.v_BPKH, cache.block_table_SB, first_positions_S, num_tokens_S)
    out_TNH = torch.full_like(q_TNH, 7.0)
    paged_attention_prefill(
        q_TNH, *arguments, SCALE, **cache.options, out_TNH=out_TNH, config=SMALL
    )
    expected = reference_attention.paged_attention_prefill(
        q_TNH, *arguments, SCALE, **cache.options
    )
    torch.testing.assert_close(out_TNH[:used], expected[:used], **case.tolerance)
    assert bool((out_TNH[used:] == 7.0).all()), "rows of no chunk stay unwritten"
