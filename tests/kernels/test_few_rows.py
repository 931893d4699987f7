"""The way of few rows through a layer: bytes beside floats, outputs side by side, chained launches;
and the places and angles of a decode step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeserve.kernels import quant_reference, reference, reference_attention
from pipeserve.kernels.backend import Backend
from pipeserve.kernels.quant_reference import PreparedRows, QuantisedRows, values_of
from tests.kernels.attention_cases import AttentionCase, paged_cache
from tests.kernels.quant_cases import random_weight, relative_error
from tests.kernels.test_fused import assert_close

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels import attention_decode, fused, rotary
from pipeserve.kernels.attention_decode import paged_attention_decode, rounds_output
from pipeserve.kernels.quant_gemv import gemv
from pipeserve.kernels.quant_products import GEMV_ROWS
from pipeserve.kernels.rounded_rows import empty_rows, quantise_rows
from pipeserve.kernels.step_places import decode_places
from pipeserve.kernels.triton_backend import gpu_backend

EPS = 1e-5


def assert_bytes_of(rounded: QuantisedRows, values_TK: torch.Tensor) -> None:
    """The same that rounding the values in a launch of its own gives."""
    expected = quantise_rows(values_TK)
    for found, wanted in zip(rounded.tensors, expected.tensors, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dim", [36, 100, 1536])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_norms_write_bytes(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    x_TD = torch.randn(3, dim, device=device).to(dtype)
    residual_TD = torch.randn(3, dim, device=device)
    weight_D = torch.randn(dim, device=device)
    rounded = empty_rows(3, dim, device)
    normed_TD, _ = fused.add_rms_norm(x_TD, residual_TD, weight_D, EPS, rounded=rounded)
    plain_TD, _ = fused.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert_close(normed_TD, plain_TD)
    assert_bytes_of(rounded, normed_TD)
    half_TD = fused.rms_norm(residual_TD, weight_D, EPS, dtype=torch.float16, rounded=rounded)
    assert_close(half_TD, fused.rms_norm(residual_TD, weight_D, EPS).half())
    assert_bytes_of(rounded, half_TD)


@pytest.mark.parametrize("dim", [80, 1500])
def test_swiglu_writes_bytes(dim: int, device: torch.device) -> None:
    gate_up_TF = torch.randn(3, 2 * dim, device=device).half() * 4
    rounded = empty_rows(3, dim, device)
    out_TF = fused.swiglu(gate_up_TF, rounded=rounded)
    assert_close(out_TF, fused.swiglu(gate_up_TF))
    assert_bytes_of(rounded, out_TF)


@pytest.mark.parametrize("heads", [1, 4, 16])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(4, 64), (6, 96)])
def test_attention_writes_bytes(
    num_heads: int, head_dim: int, heads: int, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention_decode, "_heads_per_merge", lambda *sizes: heads)
    case = AttentionCase(num_heads=num_heads, head_dim=head_dim, kv=torch.float16)
    cache = paged_cache(case, num_seqs=3, length=40, device=device)
    q_SNH = torch.randn(3, num_heads, head_dim, device=device).half()
    lengths_S = torch.tensor([40, 0, 17], device=device)
    arguments = (q_SNH, cache.k_BPKH, cache.v_BPKH, cache.block_table_SB, lengths_S, 0.1)
    rounded = empty_rows(3, num_heads * head_dim, device)
    out_SNH = paged_attention_decode(*arguments, **cache.options, rounded=rounded)
    expected = reference_attention.paged_attention_decode(*arguments, **cache.options)
    torch.testing.assert_close(out_SNH, expected, **case.tolerance)
    assert_bytes_of(rounded, out_SNH.flatten(1))


def test_heads_that_share_a_group_of_bytes_are_left_alone() -> None:
    assert rounds_output(32, 128) and rounds_output(9, 64) and rounds_output(2, 96)
    assert not rounds_output(32, 80)
    assert not rounds_output(3, 32)  # 96 columns, padded to 128


@pytest.mark.parametrize("num_parts", [1, 2])
def test_gemv_writes_columns_of_a_wider_output(num_parts: int, device: torch.device) -> None:
    torch.manual_seed(0)
    weight = random_weight("Q6_K", 5, 512, device)
    bias = torch.randn(5, device=device).half()
    x = quant_reference.quantise_rows(torch.randn(2, 512, device=device))
    out = torch.full((2, 9), 7.0, device=device)
    gemv(x, weight, bias, out_TN=out[:, 2:7], pieces=4, num_parts=num_parts)
    wanted = quant_reference.matmul_int8(x, weight) + bias
    assert relative_error(out[:, 2:7], wanted) < 2e-6
    assert out[:, :2].eq(7.0).all() and out[:, 7:].eq(7.0).all()


@pytest.mark.parametrize("activations", ["auto", "int8", "f16"])
@pytest.mark.parametrize("num_tokens", [GEMV_ROWS, GEMV_ROWS + 1])
def test_stacked_products_are_the_single_ones(
    activations: str, num_tokens: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    backend = gpu_backend("quantised", activations)  # type: ignore[arg-type]
    parts = [
        (random_weight("Q4_K", 9, 256, device), torch.randn(9, device=device).half()),
        (random_weight("Q6_K", 4, 256, device), None),
    ]
    x = torch.randn(num_tokens, 256, device=device).half()
    found = backend.stacked_quant_linear(x, parts)
    expected = torch.cat([backend.quant_linear(x, *part) for part in parts], dim=-1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_tokens", [GEMV_ROWS, GEMV_ROWS + 1])
@pytest.mark.parametrize("activations", ["auto", "int8", "f16"])
def test_backends_make_bytes_where_products_take_them(
    activations: str, num_tokens: int, device: torch.device
) -> None:
    backend = gpu_backend("quantised", activations)  # type: ignore[arg-type]
    x_TD = torch.randn(num_tokens, 128, device=device)
    weight_D = torch.ones(64, device=device)
    outputs = [
        backend.rms_norm(x_TD[:, :64].contiguous(), weight_D, EPS),
        backend.add_rms_norm(x_TD[:, :64].half(), x_TD[:, 64:], weight_D, EPS)[0],
        backend.swiglu(x_TD.half()),
    ]
    has_bytes = activations != "f16" and num_tokens <= GEMV_ROWS
    for output in outputs:
        assert (isinstance(output, PreparedRows) and output.rounded is not None) == has_bytes
        assert values_of(output).dtype == torch.float16


def test_decode_places(device: torch.device) -> None:
    table_RB = torch.randint(0, 99, (7, 1100), device=device)
    rows_S = torch.tensor([3, 0, 6], device=device)
    positions_S = torch.tensor([0, -1, 16 * 1090 + 5], device=device)
    found = decode_places(table_RB[:, :1095], rows_S, positions_S, 16)
    expected = reference.decode_places(table_RB[:, :1095], rows_S, positions_S, 16)
    for tensor, wanted in zip(found, expected, strict=True):
        assert torch.equal(tensor, wanted)
    assert found[0][1] == -1 and found[1].tolist() == [1, 0, 16 * 1090 + 6]


@pytest.mark.parametrize("num_pairs", [12, 64])
def test_rotary_angles(num_pairs: int, device: torch.device) -> None:
    frequencies_R = 10_000.0 ** -(torch.arange(num_pairs, device=device) / num_pairs)
    positions_T = torch.tensor([0, -1, 7, 131_071], device=device)
    found = rotary.rotary_angles(positions_T, frequencies_R, 1.25)
    expected = reference.rotary_angles(positions_T, frequencies_R, 1.25)
    # As far as two libraries' cosines of up to 131071 radians in float32 agree.
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def layers_of(backend: Backend, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Forty products with norms and SwiGLU between them, of which every kernel needs the one before
    it; matrices of 13 and 20 MB, whose loading takes longer than the small kernels do."""
    dim, weight_D = 4096, torch.full((4096,), 1e-3, device=device)
    gate_up = random_weight("Q4_K", 2 * dim, dim, device)
    down = random_weight("Q6_K", dim, dim, device)

    def run(x_TD: torch.Tensor) -> torch.Tensor:
        residual_TD = x_TD.float()
        for _ in range(20):
            normed, residual_TD = backend.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
            hidden = backend.swiglu(backend.quant_linear(normed, gate_up, None))
            x_TD = backend.quant_linear(hidden, down, None)
        return residual_TD

    return run


def waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, and then the host waits for it: no kernel starts before the last one's end."""

    def call_and_wait(*arguments: Any) -> Any:
        out = call(*arguments)
        torch.cuda.synchronize()
        return out

    return call_and_wait


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_chained_launches_see_what_the_one_before_wrote(
    num_tokens: int, device: torch.device
) -> None:
    """A captured graph, replayed with other inputs each time, against launches one by one."""
    torch.manual_seed(0)
    backend = gpu_backend("quantised", "auto")
    one_by_one = dataclasses.replace(
        backend,
        add_rms_norm=waiting(backend.add_rms_norm),
        swiglu=waiting(backend.swiglu),
        quant_linear=waiting(backend.quant_linear),
    )
    inputs = [torch.randn(num_tokens, 4096, device=device).half() for _ in range(10)]
    static = inputs[0].clone()
    run = layers_of(backend, device)
    run(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    expected_run = layers_of(one_by_one, device)
    for x_TD in inputs:
        static.copy_(x_TD)
        graph.replay()
        expected = expected_run(x_TD)
        assert expected.isfinite().all() and expected.std() > 1e-3
        assert torch.equal(out, expected)
