"""Planar layouts against the gguf package: the same values from the same blocks, in their size."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from pipeserve.kernels import quant_reference, quant_repack
from pipeserve.kernels.quant_layout import LAYOUTS, planar_bytes
from pipeserve.kernels.quant_repack import repack, repack_parts
from tests.kernels.quant_cases import gguf_values, random_blocks, whole_columns

TYPES = sorted(LAYOUTS)


def columns_of(type_name: str) -> tuple[int, ...]:
    """Whole planes, a part of one, an odd number of blocks."""
    return (512, 576, 96, 32) if LAYOUTS[type_name].block_size == 32 else (256, 768, 1792)


@pytest.mark.parametrize("type_name", TYPES)
def test_values_are_the_gguf_packages_bit_for_bit(type_name: str) -> None:
    for num_columns in columns_of(type_name):
        raw = random_blocks(type_name, 5, num_columns)
        got = quant_reference.dequantise(repack(torch.from_numpy(raw), type_name))
        np.testing.assert_array_equal(got.numpy(), gguf_values(type_name, raw))


@pytest.mark.parametrize("type_name", TYPES)
def test_any_bytes_at_all(type_name: str) -> None:
    """Infinite and NaN scales, subnormal ones, every exponent of MXFP4."""
    layout = LAYOUTS[type_name]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (16, 4 * layout.block_bytes), dtype=np.uint8)
    got = quant_reference.dequantise(repack(torch.from_numpy(raw), type_name))
    np.testing.assert_array_equal(got.numpy(), gguf_values(type_name, raw))


@pytest.mark.parametrize("type_name", TYPES)
def test_the_size_of_the_file(type_name: str) -> None:
    raw = random_blocks(type_name, 3, 1024)
    weight = repack(torch.from_numpy(raw), type_name)
    assert weight.num_columns == 1024
    assert 1.0 <= weight.num_bytes / raw.nbytes <= 1.05


@pytest.mark.parametrize("type_name", TYPES)
def test_block_sizes_are_ggufs(type_name: str) -> None:
    layout = LAYOUTS[type_name]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert (layout.block_size, layout.block_bytes) == sizes


@pytest.mark.parametrize("type_name", ["Q4_K", "Q5_1"])
def test_passes_of_few_rows_make_the_same_matrix(
    type_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = torch.from_numpy(random_blocks(type_name, 7, 768))
    whole = repack(raw, type_name)
    monkeypatch.setattr(quant_repack, "_WEIGHTS_AT_ONCE", 2 * 768)
    parts = repack(raw, type_name)
    for name in ("low", "high", "scales", "mins", "supers"):
        first, second = getattr(whole, name), getattr(parts, name)
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second), name


def test_rows_of_several_tensors_stack() -> None:
    first, second = random_blocks("Q6_K", 3, 256, seed=1), random_blocks("Q6_K", 2, 256, seed=2)
    weight = repack(torch.from_numpy(np.concatenate([first, second])), "Q6_K")
    wanted = np.concatenate([gguf_values("Q6_K", first), gguf_values("Q6_K", second)])
    np.testing.assert_array_equal(quant_reference.dequantise(weight).numpy(), wanted)


def test_quantised_rows_stand_for_their_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 100)
    x[1, 32:64] = 0.0
    rows = quant_reference.quantise_rows(x)
    assert rows.codes_TK.shape == (3, 128) and rows.codes_TK[:, 100:].eq(0).all()
    back = rows.codes_TK.float() * rows.scales_TG.repeat_interleave(32, dim=1)
    half_step = rows.scales_TG.repeat_interleave(32, dim=1)[:, :100] * 0.5001
    assert ((back[:, :100] - x).abs() <= half_step).all()
    sums = rows.codes_TK.reshape(3, -1, 16).int().sum(-1)
    assert torch.equal(rows.sums_TG.int(), sums)


@pytest.mark.parametrize("type_name", TYPES)
def test_the_integer_product_is_that_of_the_values(type_name: str) -> None:
    """matmul_int8 against float64 on what codes and scales stand for."""
    torch.manual_seed(0)
    weight = repack(torch.from_numpy(random_blocks(type_name, 6, 512)), type_name)
    rows = quant_reference.quantise_rows(torch.randn(2, 512))
    x = rows.codes_TK.double() * rows.scales_TG.double().repeat_interleave(32, dim=1)
    wanted = x @ quant_reference.dequantise(weight).double().T
    got = quant_reference.matmul_int8(rows, weight).double()
    assert (got - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize("type_name", TYPES)
def test_planar_weights_take_at_most_5_percent_more_than_the_file(type_name: str) -> None:
    raw = torch.from_numpy(random_blocks(type_name, 8, 4096))
    weight = repack(raw, type_name)
    assert weight.num_bytes <= raw.nbytes * 1.05
    assert weight.num_bytes == planar_bytes(type_name, 8, 4096)
    uneven = whole_columns(type_name)
    weight = repack(torch.from_numpy(random_blocks(type_name, 3, uneven)), type_name)
    assert weight.num_bytes == planar_bytes(type_name, 3, uneven)


def test_parts_of_one_type_become_one_matrix() -> None:
    parts = [torch.from_numpy(random_blocks("Q5_K", rows, 512, seed=rows)) for rows in (3, 1, 4)]
    ours, wanted = repack_parts(parts, "Q5_K"), repack(torch.cat(parts), "Q5_K")
    assert torch.equal(quant_reference.dequantise(ours), quant_reference.dequantise(wanted))
