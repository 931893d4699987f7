"""Layer kernels against the formulas written out naively in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeserve.kernels import reference as kernels

EPS = 1e-5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def test_rms_norm() -> None:
    x, weight = torch.randn(5, 24), torch.randn(24)
    expected = x / ((x**2).mean(1, keepdim=True) + EPS).sqrt() * weight
    torch.testing.assert_close(kernels.rms_norm(x, weight, EPS), expected)


def test_add_rms_norm_returns_norm_and_sum() -> None:
    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    normed, total = kernels.add_rms_norm(x, residual, weight, EPS)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, kernels.rms_norm(x + residual, weight, EPS))


def test_swiglu() -> None:
    gate_up = torch.randn(4, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(kernels.swiglu(gate_up.clone()), expected)


def angles(positions: list[int], rotated_dim: int) -> tuple[Tensor, Tensor, np.ndarray]:
    frequencies = 100.0 ** -(np.arange(0, rotated_dim, 2) / rotated_dim)
    theta = np.outer(positions, frequencies)
    cos = torch.tensor(np.tile(np.cos(theta), 2), dtype=torch.float32)
    sin = torch.tensor(np.hstack((-np.sin(theta), np.sin(theta))), dtype=torch.float32)
    return cos, sin, theta


@pytest.mark.parametrize("rotated_dim", [8, 6])
def test_rotary_and_cache(rotated_dim: int) -> None:
    num_heads, num_kv_heads, head_dim = 4, 2, 8
    positions, slots = [0, 9, 77], [11, 2, 5]
    qkv = torch.randn(3, num_heads + 2 * num_kv_heads, head_dim)
    cos, sin, theta = angles(positions, rotated_dim)
    k_cache, v_cache = torch.zeros(2, 3, 4, num_kv_heads, head_dim)
    q = kernels.rotary_and_cache(qkv, cos, sin, k_cache, v_cache, torch.tensor(slots))

    half = rotated_dim // 2
    pairs = qkv[..., :half].double().numpy() + 1j * qkv[..., half:rotated_dim].double().numpy()
    turned = pairs * np.exp(1j * theta)[:, None]
    expected = np.concatenate((turned.real, turned.imag, qkv[..., rotated_dim:].numpy()), axis=-1)
    keys = k_cache.view(-1, num_kv_heads, head_dim)
    values = v_cache.view(-1, num_kv_heads, head_dim)
    np.testing.assert_allclose(q, expected[:, :num_heads], atol=1e-5)
    np.testing.assert_allclose(keys[slots], expected[:, num_heads:-num_kv_heads], atol=1e-5)
    np.testing.assert_array_equal(values[slots], qkv[:, -num_kv_heads:])
    others = [slot for slot in range(12) if slot not in slots]
    assert not keys[others].any() and not values[others].any()


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """One query [N, H] over all of k, v [L, K, H]."""
    group = q.shape[0] // k.shape[1]
    out = np.empty_like(q)
    for head in range(q.shape[0]):
        scores = k[:, head // group] @ q[head] * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, head // group] / weights.sum()
    return out


class PagedSequences:
    """Sequences of given lengths in shuffled blocks; the rest of the cache holds large rubbish."""

    def __init__(self, lengths: list[int], *, block_size: int, num_kv_heads: int, dim: int) -> None:
        per_row = -(-max(lengths) // block_size)
        num_blocks = per_row * len(lengths)
        self.k_cache = torch.full((num_blocks, block_size, num_kv_heads, dim), 1e4)
        self.v_cache = torch.full((num_blocks, block_size, num_kv_heads, dim), -1e4)
        self.table = torch.randperm(num_blocks).view(len(lengths), per_row)
        self.k = [torch.randn(length, num_kv_heads, dim) for length in lengths]
        self.v = [torch.randn(length, num_kv_heads, dim) for length in lengths]
        for row, length in enumerate(lengths):
            for position in range(length):
                block = self.table[row, position // block_size]
                self.k_cache[block, position % block_size] = self.k[row][position]
                self.v_cache[block, position % block_size] = self.v[row][position]


CASES = [
    pytest.param(4, 4, 1, id="one kv head per query head, block of 1"),
    pytest.param(6, 2, 4, id="groups of 3, block of 4"),
    pytest.param(8, 1, 16, id="one kv head, block of 16"),
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "block_size"), CASES)
def test_decode_attention(num_heads: int, num_kv_heads: int, block_size: int) -> None:
    lengths = [1, 4, 16, 37]
    paged = PagedSequences(lengths, block_size=block_size, num_kv_heads=num_kv_heads, dim=8)
    q = torch.randn(4, num_heads, 8)
    out = kernels.paged_attention_decode(
        q, paged.k_cache, paged.v_cache, paged.table, torch.tensor(lengths), 0.3
    )
    for row in range(4):
        k, v = paged.k[row].numpy(), paged.v[row].numpy()
        expected = dense_attention(q[row].numpy(), k, v, 0.3)
        np.testing.assert_allclose(out[row], expected, atol=1e-5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "block_size"), CASES)
def test_prefill_attention(num_heads: int, num_kv_heads: int, block_size: int) -> None:
    first_positions, num_tokens = [0, 5, 30], [9, 1, 7]
    lengths = [first + count for first, count in zip(first_positions, num_tokens, strict=True)]
    paged = PagedSequences(lengths, block_size=block_size, num_kv_heads=num_kv_heads, dim=8)
    q = torch.randn(sum(num_tokens), num_heads, 8)
    out = kernels.paged_attention_prefill(
        q,
        paged.k_cache,
        paged.v_cache,
        paged.table,
        torch.tensor(first_positions),
        torch.tensor(num_tokens),
        0.3,
    )
    token = 0
    for row, (first, count) in enumerate(zip(first_positions, num_tokens, strict=True)):
        for position in range(first, first + count):
            k, v = paged.k[row][: position + 1].numpy(), paged.v[row][: position + 1].numpy()
            expected = dense_attention(q[token].numpy(), k, v, 0.3)
            np.testing.assert_allclose(out[token], expected, atol=1e-5)
            token += 1
