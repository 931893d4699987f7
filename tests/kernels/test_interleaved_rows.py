"""Interleaved rows: every kernel that writes them against the twin."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels import attention_decode, fused, quant_products
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.decode_config import DecodeConfig
from pipeserve.kernels.interleaved_rows import interleave_rows
from pipeserve.kernels.quant_products import GEMV_ROWS
from pipeserve.kernels.quant_reference import PreparedRows
from pipeserve.kernels.quant_reference import interleave_rows as twin
from pipeserve.kernels.quant_ways import MMA_ROWS
from pipeserve.kernels.triton_backend import gpu_backend
from tests.kernels.attention_cases import AttentionCase, paged_cache

EPS = 1e-5


def test_order_is_that_of_the_description() -> None:
    """Column 64 q + 32 n + 4 w + 2 e + h lies at 32 w + 16 n + 8 h + 2 q + e."""
    found = twin(torch.arange(512).reshape(1, 512))[0]
    for q, n, w, e, h in [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (3, 1, 7, 1, 1), (2, 0, 5, 1, 0)]:
        at, column = 32 * w + 16 * n + 8 * h + 2 * q + e, 64 * q + 32 * n + 4 * w + 2 * e + h
        assert found[at] == column and found[256 + at] == 256 + column


@pytest.mark.parametrize("num_columns", [256, 1280])
def test_interleave_rows(num_columns: int, device: torch.device) -> None:
    wide_TK = torch.randn(3, num_columns + 8, device=device).half()
    x_TK = wide_TK[:, :num_columns]
    assert torch.equal(interleave_rows(x_TK), twin(x_TK))


@pytest.mark.parametrize("dim", [256, 1280])
def test_norms_and_swiglu_write_them(dim: int, device: torch.device) -> None:
    x_TD, residual_TD = (
        torch.randn(3, dim, device=device).half(),
        torch.randn(3, dim, device=device),
    )
    weight_D = torch.randn(dim, device=device)
    found_TD = torch.empty(3, dim, dtype=torch.float16, device=device)
    normed_TD, _ = fused.add_rms_norm(x_TD, residual_TD, weight_D, EPS, interleaved_TD=found_TD)
    assert torch.equal(found_TD, twin(normed_TD))
    half_TD = fused.rms_norm(
        residual_TD, weight_D, EPS, dtype=torch.float16, interleaved_TD=found_TD
    )
    assert torch.equal(found_TD, twin(half_TD))
    gate_up_TF = torch.randn(3, 2 * dim, device=device).half()
    out_TF = fused.swiglu(gate_up_TF, interleaved_TF=found_TD)
    assert torch.equal(found_TD, twin(out_TF))


@pytest.mark.parametrize("heads", [1, 4, 16])
@pytest.mark.parametrize("num_segments", [1, 4])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(6, 128), (8, 96)])
def test_attention_writes_them(
    num_heads: int, head_dim: int, num_segments: int, heads: int, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention_decode, "_heads_per_merge", lambda *sizes: heads)
    case = AttentionCase(num_heads=num_heads, head_dim=head_dim, kv=torch.float16)
    cache = paged_cache(case, num_seqs=2, length=20, device=device)
    q_SNH = torch.randn(2, num_heads, head_dim, device=device).half()
    lengths_S = torch.tensor([20, 7], device=device)
    found_SK = torch.empty(2, num_heads * head_dim, dtype=torch.float16, device=device)
    out_SNH = paged_attention_decode(
        q_SNH, cache.k_BPKH, cache.v_BPKH, cache.block_table_SB, lengths_S, 0.1,
        **cache.options, interleaved_SK=found_SK,
        config=DecodeConfig(
            tile=16, min_tiles=1, num_segments=num_segments, num_warps=4, num_stages=1
        ),
    )  # fmt: skip
    assert torch.equal(found_SK, twin(out_SNH.flatten(1)))


@pytest.mark.parametrize("num_tokens", [GEMV_ROWS, GEMV_ROWS + 1, MMA_ROWS + 1])
@pytest.mark.parametrize("activations", ["auto", "int8", "f16"])
def test_backends_make_them_where_the_kernel_for_hopper_is(
    activations: str, num_tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_products, "has_mma", lambda device: True)
    backend = gpu_backend("quantised", activations)  # type: ignore[arg-type]
    x_TD = torch.randn(num_tokens, 512, device=device)
    weight_D = torch.ones(512, device=device)
    outputs = [
        backend.rms_norm(x_TD, weight_D, EPS),
        backend.add_rms_norm(x_TD.half(), x_TD, weight_D, EPS)[0],
        backend.swiglu(x_TD.half()),
    ]
    for output in outputs:
        interleaved_TK = output.interleaved_TK if isinstance(output, PreparedRows) else None
        assert (interleaved_TK is not None) == (GEMV_ROWS < num_tokens <= MMA_ROWS)
        if interleaved_TK is not None:
            assert torch.equal(interleaved_TK, twin(output.values_TK))
    odd = backend.rms_norm(x_TD[:, :192].contiguous(), weight_D[:192], EPS)
    assert not isinstance(odd, PreparedRows) or odd.interleaved_TK is None
