"""Decode attention agrees with its twins for every option, and no launch shape changes it."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.attention_cases import AttentionCase, paged_cache

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import attention_decode, reference, reference_attention
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.decode_config import DecodeConfig, decode_config

SCALE = 0.15
SMALL = DecodeConfig(tile=16, min_tiles=1, num_segments=4, num_warps=4, num_stages=2)
CASES = [
    AttentionCase(),
    AttentionCase(num_heads=3, num_kv_heads=3, head_dim=80, kv=torch.float16),
    AttentionCase(num_heads=7, num_kv_heads=1, block_size=32, index=torch.int64),
    AttentionCase(kv=torch.int8, block_size=32),
    AttentionCase(options={"window": 21}),
    AttentionCase(kv=torch.float16, options={"soft_cap": 3.0}),
    AttentionCase(has_sinks=True),
    AttentionCase(
        kv=torch.int8, head_dim=128, has_sinks=True, options={"window": 40, "soft_cap": 5.0}
    ),
]
WIDE = [
    AttentionCase(num_heads=group * 2, head_dim=head_dim, block_size=page, kv=kv, options=options)
    for group, head_dim, page, kv, options in itertools.product(
        (1, 4, 20),
        (64, 96, 256),
        (16, 32),
        (torch.float16, torch.int8),
        ({}, {"window": 33}, {"soft_cap": 4.0}),
    )
]


def check(case: AttentionCase, device: torch.device, config: DecodeConfig | None) -> None:
    cache = paged_cache(case, num_seqs=4, length=90, device=device)
    q_SNH = torch.randn(4, case.num_heads, case.head_dim).to(device, case.activation)
    lengths_S = torch.tensor([90, 0, 33, 1], dtype=case.index, device=device)
    arguments = (q_SNH, cache.k_BPKH, cache.v_BPKH, cache.block_table_SB, lengths_S, SCALE)
    out_SNH = torch.full_like(q_SNH, float("nan"))
    found = paged_attention_decode(*arguments, **cache.options, out_SNH=out_SNH, config=config)
    expected = reference_attention.paged_attention_decode(*arguments, **cache.options)
    assert found is out_SNH
    torch.testing.assert_close(found, expected, **case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_twin(case: AttentionCase, device: torch.device) -> None:
    check(case, device, SMALL)


@pytest.mark.wide
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_agrees_with_twin_widely(case: AttentionCase, device: torch.device) -> None:
    check(case, device, SMALL)


@pytest.mark.parametrize(
    "config",
    [
        None,
        DecodeConfig(tile=32, min_tiles=1, num_segments=1, num_warps=4, num_stages=2),
        DecodeConfig(tile=16, min_tiles=4, num_segments=8, num_warps=4, num_stages=2),
    ],
)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_any_launch_shape(
    has_sinks: bool, config: DecodeConfig | None, device: torch.device
) -> None:
    check(AttentionCase(options={"window": 50}, has_sinks=has_sinks), device, config)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("heads", [2, 16])
def test_several_heads_are_merged_together(
    heads: int, has_sinks: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_decode, "_heads_per_merge", lambda *sizes: heads)
    check(AttentionCase(num_heads=6, has_sinks=has_sinks), device, SMALL)


@pytest.mark.parametrize(
    ("num_seqs", "num_heads", "heads"),
    [(1, 32, 1), (32, 32, 1), (33, 32, 4), (64, 32, 4), (65, 32, 16), (1000, 3, 4)],
)
def test_more_rows_merge_more_heads_together(num_seqs: int, num_heads: int, heads: int) -> None:
    assert attention_decode._heads_per_merge(num_seqs, num_heads) == heads


@pytest.mark.parametrize(
    "num_programs", [1, 2, 7, 8, 9, 64, 65, 127, 128, 255, 256, 511, 512, 1023, 1024, 9999]
)
def test_every_number_of_rows_has_a_launch_shape(num_programs: int) -> None:
    for head_dim, kv in itertools.product((64, 128, 256), (torch.float16, torch.int8)):
        config = decode_config(num_programs, 1, head_dim, kv=kv)
        assert config.num_segments.bit_count() == 1
        assert 4 <= config.num_segments <= 64
        assert config.min_tiles * config.tile <= 1024


def test_takes_the_place_of_the_plain_twin(device: torch.device) -> None:
    case = AttentionCase()
    cache = paged_cache(case, num_seqs=3, length=48, device=device)
    table_SB = cache.block_table_SB[:, :3]
    # Queries as they come out of a fused projection: a slice, not contiguous.
    q_SNH = torch.randn(3, 8, 64, device=device)[:, :4]
    lengths_S = torch.tensor([48, 5, 17], device=device)
    arguments = (q_SNH, cache.k_BPKH, cache.v_BPKH, table_SB, lengths_S, SCALE)
    found = paged_attention_decode(*arguments, config=SMALL)
    torch.testing.assert_close(found, reference.paged_attention_decode(*arguments))


def test_what_lies_past_a_length_is_not_seen(device: torch.device) -> None:
    cache = paged_cache(AttentionCase(), num_seqs=1, length=48, device=device)
    q_SNH = torch.randn(1, 4, 64, device=device)
    lengths_S = torch.tensor([20], device=device)
    block, offset = int(cache.block_table_SB[0, 20 // 16]), 20 % 16

    def attend() -> torch.Tensor:
        return paged_attention_decode(
            q_SNH, cache.k_BPKH, cache.v_BPKH, cache.block_table_SB, lengths_S, SCALE, config=SMALL
        )

    before = attend()
    cache.k_BPKH[block, offset:] = float("nan")
    cache.v_BPKH[block, offset:] = float("nan")
    assert torch.equal(attend(), before)
