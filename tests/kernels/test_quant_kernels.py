"""The quant family's kernels against their twins: in the interpreter, or on the GPU if there."""

from __future__ import annotations

import pytest
import torch

from pipeserve.kernels import quant_reference
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from tests.kernels.quant_cases import random_weight, relative_error, whole_columns

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import GemmTiling, choose_tiling, gemm
from pipeserve.kernels.quant_gemv import gemv
from pipeserve.kernels.quant_split import CardLimits
from pipeserve.kernels.rounded_rows import quantise_rows

TYPES = sorted(LAYOUTS)
FEW_TYPES = ("Q4_K", "Q6_K", "Q5_0", "IQ4_NL")
"""One of each kind of plane, table and group size, for what does not differ by type."""


def weight_of(type_name: str, device: torch.device, num_rows: int = 9) -> PlanarWeight:
    return random_weight(type_name, num_rows, whole_columns(type_name), device)


@pytest.mark.parametrize("type_name", TYPES)
def test_dequantise(type_name: str, device: torch.device) -> None:
    """The interpreter gives the twin's bits; a GPU may fuse the multiplication and the minimum."""
    weight = weight_of(type_name, device)
    for dtype in (torch.float16, torch.float32):
        wanted = quant_reference.dequantise(weight, dtype)
        assert relative_error(dequantise(weight, dtype), wanted) < 2e-6


def test_dequantise_into_a_larger_scratch(device: torch.device) -> None:
    weight = weight_of("Q4_0", device)
    scratch = torch.full((9 * 576 + 5,), 7.0, dtype=torch.float16, device=device)
    values = dequantise(weight, torch.float16, out=scratch)
    assert values.data_ptr() == scratch.data_ptr()
    assert scratch[9 * 576 :].eq(7.0).all()
    assert torch.equal(values, quant_reference.dequantise(weight, torch.float16))


@pytest.mark.parametrize("num_columns", [64, 100, 2048 + 32])
def test_quantise_rows(num_columns: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, num_columns + 8, device=device)[:, :num_columns]
    x[1, :32] = 0.0
    x[2, :32] = 1e-38
    got, wanted = quantise_rows(x), quant_reference.quantise_rows(x)
    torch.testing.assert_close(got.scales_TG, wanted.scales_TG)
    # On a GPU the reciprocal may differ in its last bit, and a code on the edge with it.
    assert (got.codes_TK != wanted.codes_TK).float().mean() < 1e-3
    sums = got.codes_TK.reshape(3, -1, 16).int().sum(-1)
    assert torch.equal(got.sums_TG.int(), sums)


@pytest.mark.parametrize("type_name", TYPES)
def test_gemv(type_name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    weight = weight_of(type_name, device, num_rows=5)
    x = quant_reference.quantise_rows(torch.randn(1, weight.num_columns, device=device))
    wanted = quant_reference.matmul_int8(x, weight)
    assert relative_error(gemv(x, weight, pieces=32, num_parts=1), wanted) < 2e-6


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_gemv_rows_parts_and_bias(num_tokens: int, device: torch.device) -> None:
    torch.manual_seed(0)
    weight = random_weight("Q6_K", 3, 256, device)
    bias = torch.randn(3, device=device).half()
    x = quant_reference.quantise_rows(torch.randn(num_tokens, 256, device=device))
    wanted = quant_reference.matmul_int8(x, weight) + bias
    got = gemv(x, weight, bias, pieces=4, block_n=2, num_parts=2)
    assert got.shape == (num_tokens, 3)
    assert relative_error(got, wanted) < 2e-6
    assert torch.equal(got, gemv(x, weight, bias, pieces=4, block_n=2, num_parts=2))


@pytest.mark.parametrize("type_name", TYPES)
def test_gemm(type_name: str, device: torch.device) -> None:
    """Two roundings to f16 per weight, of scale and product, against none."""
    torch.manual_seed(0)
    weight = weight_of(type_name, device)
    x = torch.randn(5, weight.num_columns, device=device).half()
    wanted = quant_reference.matmul(x.float(), weight)
    got = gemm(x, weight, out_dtype=torch.float32)
    assert relative_error(got, wanted) < 1e-3


@pytest.mark.parametrize("type_name", FEW_TYPES)
@pytest.mark.parametrize("wide", [1, 2])
def test_gemm_tiles_parts_and_bias(type_name: str, wide: int, device: torch.device) -> None:
    torch.manual_seed(0)
    weight = weight_of(type_name, device, num_rows=37)
    x = torch.randn(19, weight.num_columns + 64, device=device).half()[:, : weight.num_columns]
    bias = torch.randn(37, device=device).half()
    wanted = quant_reference.matmul(x.float(), weight, bias.float())
    for num_parts in (1, 2):
        tiling = GemmTiling(
            block_n=32, block_t=16, wide=wide, num_warps=2, num_stages=2, num_parts=num_parts
        )
        got = gemm(x, weight, bias, tiling=tiling)
        assert got.dtype == torch.float16 and got.shape == (19, 37)
        assert relative_error(got, wanted) < 1e-3
        assert torch.equal(got, gemm(x, weight, bias, tiling=tiling))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_gemm_writes_columns_of_a_wider_output(num_parts: int, device: torch.device) -> None:
    torch.manual_seed(0)
    weight = random_weight("Q4_K", 5, 512, device)
    bias = torch.randn(5, device=device).half()
    x = torch.randn(6, 512, device=device).half()
    out = torch.full((6, 9), 7.0, device=device, dtype=torch.float16)
    tiling = GemmTiling(
        block_n=32, block_t=16, wide=1, num_warps=2, num_stages=2, num_parts=num_parts
    )
    gemm(x, weight, bias, out_TN=out[:, 2:7], tiling=tiling)
    assert torch.equal(out[:, 2:7], gemm(x, weight, bias, tiling=tiling))
    assert out[:, :2].eq(7.0).all() and out[:, 7:].eq(7.0).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_smaller_cards_get_smaller_tiles(type_name: str) -> None:
    """The x tiles alone, in two stages at least, are within each card's shared memory."""
    weight = random_weight(type_name, 64, 768, torch.device("cpu"))
    tiles = []
    for shared_bytes in (232_448, 101_376, 65_536):
        limits = CardLimits(num_multiprocessors=100, shared_bytes=shared_bytes)
        tilings = [choose_tiling(weight, num_tokens, limits) for num_tokens in (1, 40, 5000)]
        for tiling in tilings:
            assert 2 * tiling.wide * 128 * tiling.block_t <= shared_bytes
            assert tiling.block_n * tiling.block_t * 4 <= shared_bytes
        tiles.append(tilings[-1].block_t)
    assert tiles == sorted(tiles, reverse=True)
    assert tiles[0] >= 128 and tiles[2] < tiles[0]


@pytest.mark.gpu
@pytest.mark.parametrize("type_name", TYPES)
def test_bf16_on_the_tensor_cores(type_name: str, device: torch.device) -> None:
    """Not in the interpreter, whose products of bf16 are wrong."""
    torch.manual_seed(0)
    weight = weight_of(type_name, device, num_rows=200)
    x = torch.randn(40, weight.num_columns, device=device).bfloat16()
    wanted = quant_reference.matmul(x.float(), weight)
    assert relative_error(gemm(x, weight, out_dtype=torch.float32), wanted) < 6e-3
    values = dequantise(weight, torch.bfloat16)
    assert relative_error(values, quant_reference.dequantise(weight, torch.bfloat16)) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4, 8, 16, 64, 200])
@pytest.mark.parametrize("type_name", FEW_TYPES)
def test_the_chosen_tilings_on_a_large_matrix(
    type_name: str, num_tokens: int, device: torch.device
) -> None:
    """Inside a CUDA graph, replayed: the same bits, and those of the twin within rounding."""
    torch.manual_seed(0)
    weight = random_weight(type_name, 4096, 2048, device)
    x = torch.randn(num_tokens, 2048, device=device).half()
    wanted = quant_reference.matmul(x.float(), weight)

    def run() -> torch.Tensor:
        if num_tokens <= 8:
            return gemv(quantise_rows(x), weight)
        return gemm(x, weight, out_dtype=torch.float32)

    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(captured, first)
    assert relative_error(first, wanted) < (1.5e-2 if num_tokens <= 8 else 1e-3)
