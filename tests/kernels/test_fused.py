"""Norms, rotary with KV write and SwiGLU agree with their twins."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import fused, reference, reference_attention, rotary

EPS = 1e-5
# One rounding of the output's type, and for bf16 another of the sum that is normed.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
TYPES = tuple(TOLERANCES)


def random_angles(num_tokens: int, rotated: int, device: torch.device) -> list[torch.Tensor]:
    """Cosines and sines as models.rotary lays them out."""
    angles_TR = (torch.rand(num_tokens, rotated // 2, device=device) * 7).repeat(1, 2)
    sign_R = torch.tensor([-1.0, 1.0], device=device).repeat_interleave(rotated // 2)
    return [angles_TR.cos(), angles_TR.sin() * sign_R]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 100, 1536])
def test_rms_norm(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    # A slice: rows of a wider tensor.
    x_TD = torch.randn(5, dim + 4, device=device, dtype=dtype)[:, :dim]
    weight_D = torch.randn(dim, device=device, dtype=dtype)
    assert_close(fused.rms_norm(x_TD, weight_D, EPS), reference.rms_norm(x_TD, weight_D, EPS))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_add_rms_norm(dtype: torch.dtype, device: torch.device) -> None:
    x_TD, residual_TD = torch.randn(2, 5, 100, device=device, dtype=dtype)
    weight_D = torch.randn(100, device=device, dtype=dtype)
    expected, expected_sum = reference.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    found, found_sum = fused.add_rms_norm(x_TD, residual_TD, weight_D, EPS, sum_TD=residual_TD)
    assert found_sum is residual_TD
    assert_close(found, expected)
    assert_close(found_sum, expected_sum)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [80, 1500])
def test_swiglu(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up_TF = torch.randn(3, 2 * dim, device=device, dtype=dtype) * 4
    assert_close(fused.swiglu(gate_up_TF), reference.swiglu(gate_up_TF))


@pytest.mark.parametrize("num_tokens", [2, 13])
@pytest.mark.parametrize(
    ("head_dim", "rotated", "num_heads", "num_kv_heads"),
    [(64, 64, 4, 2), (80, 80, 3, 1), (96, 24, 2, 2)],
)
@pytest.mark.parametrize("is_int8", [False, True])
def test_rotary_and_cache(
    head_dim: int,
    rotated: int,
    num_heads: int,
    num_kv_heads: int,
    num_tokens: int,
    is_int8: bool,
    device: torch.device,
) -> None:
    all_heads = num_heads + 2 * num_kv_heads
    qkv_TMH = torch.randn(num_tokens, all_heads + 1, head_dim, device=device)[:, :all_heads]
    angles = random_angles(num_tokens, rotated, device)
    slots_T = torch.randperm(64, device=device)[:num_tokens]
    shape = (4, 16, num_kv_heads, head_dim)
    found, expected = ([torch.zeros(shape, device=device) for _ in "kv"] for _ in range(2))
    if not is_int8:
        q_TNH = rotary.rotary_and_cache(qkv_TMH, *angles, *found, slots_T)
        expected_q_TNH = reference.rotary_and_cache(qkv_TMH, *angles, *expected, slots_T)
        torch.testing.assert_close([q_TNH, *found], [expected_q_TNH, *expected])
        return
    scale_shape = (4, num_kv_heads, 16)
    for tensors in (found, expected):
        tensors[:] = [cache.to(torch.int8) for cache in tensors]
        tensors += [torch.zeros(scale_shape, device=device, dtype=torch.float16) for _ in "kv"]
    slots_T[1] = -1
    q_TNH = rotary.rotary_and_cache(
        qkv_TMH, *angles, *found[:2], slots_T, k_scale_BKP=found[2], v_scale_BKP=found[3]
    )
    expected_q_TNH = reference_attention.rotary_and_cache_int8(qkv_TMH, *angles, *expected, slots_T)
    torch.testing.assert_close(q_TNH, expected_q_TNH)
    # Rotated keys differ in their last bit, so a code between two integers may fall either way.
    torch.testing.assert_close(found[0], expected[0], atol=1, rtol=0)
    assert int((found[0] != expected[0]).sum()) <= 2
    torch.testing.assert_close(found[2], expected[2], atol=0, rtol=2**-10)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[3], expected[3])


def test_a_filler_token_writes_nothing(device: torch.device) -> None:
    qkv_TMH = torch.randn(3, 4, 64, device=device)
    angles = random_angles(3, 64, device)
    caches = [torch.zeros(2, 16, 1, 64, device=device) for _ in "kv"]
    rotary.rotary_and_cache(qkv_TMH, *angles, *caches, torch.tensor([-1, 4, -1], device=device))
    for cache in caches:
        written = cache.view(32, 64).any(-1).nonzero().flatten()
        assert written.tolist() == [4]
