"""The kernel of 8-bit floats for Hopper: tilings and source anywhere, products on such a card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeserve.kernels import fp8_reference
from pipeserve.kernels.fp8_reference import FP8_GROUP, Fp8Rows, Fp8Weight
from tests.kernels.quant_cases import relative_error

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels.fp8_mma import (
    ARCH,
    MAX_BLOCKS,
    Fp8Tiling,
    Fp8Variant,
    choose_fp8_tiling,
    fp8_mma,
    fp8_mma_source,
    why_not_loaded,
)
from pipeserve.kernels.fp8_rows import multiply_rows
from pipeserve.kernels.fp8_tokens import quantise_tokens
from pipeserve.kernels.nvrtc import compile_cubin, nvrtc_library
from pipeserve.kernels.quant_mma import has_mma

SMALL = Fp8Variant(block_t=8, warpgroups=1, tiles=1, atoms=1, num_stages=3, blocks_at_once=2)
VARIANTS = (
    SMALL,
    Fp8Variant(block_t=24, warpgroups=1, tiles=2, atoms=2, num_stages=3, blocks_at_once=2),
    Fp8Variant(block_t=64, warpgroups=2, tiles=1, atoms=1, num_stages=4, blocks_at_once=2),
    Fp8Variant(block_t=128, warpgroups=1, tiles=1, atoms=2, num_stages=4, blocks_at_once=1),
)
SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096), (48, 64), (1024, 28672))


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 64, 128])
def test_chosen_tilings_fit_a_hopper_card(num_tokens: int, is_grouped: bool) -> None:
    for num_rows, num_columns in SHAPES:
        tiling = choose_fp8_tiling(num_rows, num_columns, num_tokens, 132, is_grouped=is_grouped)
        variant = tiling.variant
        assert variant.block_t >= num_tokens and variant.is_grouped == is_grouped
        assert 1 <= tiling.num_parts <= min(MAX_BLOCKS, variant.num_steps(num_columns))
        part_groups = variant.num_groups(num_columns, tiling.num_parts)
        held = (variant.shared_bytes(part_groups) + 1024) * variant.blocks_at_once
        assert held <= 228 * 1024


@pytest.mark.parametrize("num_columns", [40960, 53248])
def test_very_wide_matrices_are_cut_until_a_block_fits(num_columns: int) -> None:
    """The scales of a block's activations grow with its columns."""
    tiling = choose_fp8_tiling(16384, num_columns, 128, 132, is_grouped=True)
    num_groups = tiling.variant.num_groups(num_columns, tiling.num_parts)
    assert tiling.num_parts > 1 and tiling.variant.shared_bytes(num_groups) <= 227 * 1024


def test_few_outputs_are_cut_into_parts() -> None:
    """As many as run at once, and no more than have some columns each."""
    assert choose_fp8_tiling(28672, 4096, 1, 132).num_parts == 1
    assert choose_fp8_tiling(4096, 14336, 1, 132).num_parts > 1
    assert choose_fp8_tiling(48, 64, 1, 132).num_parts == 1


def test_source_holds_the_constants() -> None:
    assert "#define ATOMS 2\n" in fp8_mma_source(VARIANTS[-1])
    source = fp8_mma_source(SMALL)
    assert "#define BLOCK_T 8\n" in source and "#define ATOMS 1\n" in source
    assert "// WGMMA" not in source and "m64n8k32.f32.e4m3.e4m3" in source


@pytest.mark.skipif(nvrtc_library() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"t{variant.block_t}")
def test_it_compiles(variant: Fp8Variant) -> None:
    assert len(compile_cubin(fp8_mma_source(variant), ARCH)) > 1000


def test_other_devices_do_not_have_it() -> None:
    assert why_not_loaded(SMALL, torch.device("cpu")) is not None


@pytest.fixture
def card(device: torch.device) -> torch.device:
    device = torch.device("cuda", 0) if device.type == "cuda" else device
    if not has_mma(device):
        pytest.skip("no Hopper card, or no NVRTC")
    return device


def operands(
    num_tokens: int,
    num_rows: int,
    num_columns: int,
    device: torch.device,
    *,
    grouped: bool = False,
) -> tuple[Fp8Rows, Fp8Weight]:
    torch.manual_seed(0)
    values = torch.randn(num_rows, num_columns, device=device) * 0.05
    codes, scales = fp8_reference.quantise_rows(values)
    x_TK = torch.randn(num_tokens, num_columns, device=device)
    x_TK *= torch.logspace(-1, 1, num_columns, device=device)  # groups differ
    x = fp8_reference.quantise_tokens(x_TK, FP8_GROUP if grouped else None)
    return x, Fp8Weight(codes_NK=codes, scales_1N=scales.t().contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 13, 64, 70, 128])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"t{variant.block_t}")
def test_products(variant: Fp8Variant, num_tokens: int, card: torch.device) -> None:
    """Outputs that fill no tile, columns that fill no step and are in uneven parts, a bias."""
    x, weight = operands(num_tokens, 336, 1360, card)
    bias = torch.randn(336, device=card).bfloat16()
    wanted = fp8_reference.scaled_product(x, weight, bias)
    for num_parts in (1, 2, 4):
        tiling = Fp8Tiling(variant=variant, num_parts=num_parts)
        got = fp8_mma(x, weight, bias, tiling=tiling)
        assert got.dtype == torch.bfloat16 and relative_error(got, wanted) < 4e-3
        plain = fp8_mma(x, weight, tiling=tiling)
        assert relative_error(plain, wanted - bias.float()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 13, 64, 70, 128])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"t{variant.block_t}")
def test_products_of_groups(variant: Fp8Variant, num_tokens: int, card: torch.device) -> None:
    x, weight = operands(num_tokens, 336, 1408, card, grouped=True)
    wanted = fp8_reference.scaled_product(x, weight, None)
    for num_parts in (1, 2, 4):
        tiling = Fp8Tiling(variant=replace(variant, is_grouped=True), num_parts=num_parts)
        assert relative_error(fp8_mma(x, weight, tiling=tiling), wanted) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 40, 128])
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "grouped"),
    [(4096, 4096, False), (4096, 4096, True), (4096, 14336, True), (48, 64, False)],
)
def test_both_kernels_for_few_rows_agree(
    num_tokens: int, num_rows: int, num_columns: int, grouped: bool, card: torch.device
) -> None:
    x, weight = operands(num_tokens, num_rows, num_columns, card, grouped=grouped)
    wanted = fp8_reference.scaled_product(x, weight, None)
    for got in (fp8_mma(x, weight), multiply_rows(x, weight)):
        assert relative_error(got, wanted) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 48])
def test_in_a_graph_it_repeats_its_bits(num_tokens: int, card: torch.device) -> None:
    """After the kernel that writes its inputs: what starts early must wait for them."""
    _, weight = operands(1, 4096, 2048, card)
    x = torch.randn(num_tokens, 2048, device=card).bfloat16()
    graph = torch.cuda.CUDAGraph()
    first = fp8_mma(quantise_tokens(x), weight)
    with torch.cuda.graph(graph):
        captured = fp8_mma(quantise_tokens(x), weight)
    for factor in (1, 4, 1):
        x.mul_(factor)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, fp8_mma(quantise_tokens(x), weight))
        x.div_(factor)
    graph.replay()
    assert torch.equal(captured, first)
