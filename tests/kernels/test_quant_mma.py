"""The Hopper kernel for batches: its unpacking on the CPU, all of it on such a card."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeserve.kernels import quant_reference
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from tests.kernels.quant_cases import random_weight, relative_error

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels import quant_mma
from pipeserve.kernels.quant_mma import has_mma, layout_constants, mma, mma_source, takes_mma
from pipeserve.kernels.quant_mma_tiling import (
    MmaTiling,
    MmaVariant,
    choose_mma_tiling,
    fitted,
    shared_bytes,
)

TYPES = sorted(LAYOUTS)
ROWS = 64
"""Of the tile that the CPU unpacks."""


def swizzled(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Bytes of rows of 128, 64 or 32 as the copy engine lays them out: 16-byte pieces permuted."""
    at = np.arange(tile.size)
    to = at ^ ((at >> 7 & tile.shape[1] // 16 - 1) << 4)
    laid_out = np.empty(tile.size, np.uint8)
    laid_out[to] = tile.reshape(-1)
    return laid_out


def build_host(type_name: str, folder: Path) -> ctypes.CDLL:
    kernels = Path(quant_mma.__file__).parent
    text = Path(__file__).with_name("quant_mma_host.cpp").read_text()
    text = text.replace("// UNPACK", (kernels / "quant_mma_unpack.cu").read_text())
    constants = layout_constants(LAYOUTS[type_name])
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    (folder / "host.cpp").write_text(defines + text)
    command = ["g++", "-std=c++17", "-w", "-shared", "-fPIC", "-o", "host.so", "host.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def words_of(tensor: torch.Tensor | None, step: int) -> npt.NDArray[np.uint32]:
    """[ROWS, 4] words of one step, short ones widened; zeros where there are none."""
    if tensor is None:
        return np.zeros((ROWS, 4), np.uint32)
    words = tensor[:, 4 * step : 4 * step + 4].numpy()
    return words.view(np.uint16 if words.dtype == np.int16 else np.uint32).astype(np.uint32)


def supers_of(weight: PlanarWeight, step: int) -> npt.NDArray[np.uint32]:
    if weight.supers is None:
        return np.zeros(ROWS, np.uint32)
    supers = np.ascontiguousarray(weight.supers[:, step].numpy())
    return supers.view(np.uint16 if supers.dtype == np.int16 else np.uint32).astype(np.uint32)


def unpacked(type_name: str, weight: PlanarWeight, step: int, host: ctypes.CDLL) -> torch.Tensor:
    """f16 [ROWS, 256]: every thread's fragments put where the tensor cores read them, which is in
    the order of interleaved columns."""
    layout = LAYOUTS[type_name]
    low_bytes, high_bytes = 32 * layout.low_bits, 32 * layout.high_bits
    low_row = min(128, low_bytes)
    first = step * low_bytes
    tiles = [
        swizzled(weight.low[:, at : at + low_row].numpy())
        for at in range(first, first + low_bytes, low_row)
    ]
    if weight.high is not None:
        tiles.append(swizzled(weight.high[:, step * high_bytes : (step + 1) * high_bytes].numpy()))
    memory = np.concatenate(tiles)
    words, min_words = words_of(weight.scales, step), words_of(weight.mins, step)
    supers = supers_of(weight, step)
    values = np.empty((ROWS, 256), np.float16)
    for warp_row, group, quad in np.ndindex(ROWS // 16, 8, 4):
        row = 16 * warp_row + group
        fragments = np.empty((4, 4, 4), np.uint32)
        rows = [row, row + 8]
        arrays = (words[rows], min_words[rows], supers[rows], fragments)
        host.unpack_step(
            memory.ctypes.data_as(ctypes.c_void_p), ROWS * low_bytes, ROWS * low_row, row, quad,
            *(array.ctypes.data_as(ctypes.c_void_p) for array in arrays),
        )  # fmt: skip
        pairs = fragments.view(np.float16).reshape(4, 4, 4, 2)
        for block, part, eight, down in np.ndindex(4, 4, 2, 2):
            column = 64 * block + 16 * part + 8 * eight + 2 * quad
            values[row + 8 * down, column : column + 2] = pairs[block, part, down + 2 * eight]
    return torch.from_numpy(values)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("type_name", TYPES)
def test_unpacking(type_name: str, tmp_path: Path) -> None:
    """Two roundings to f16 per weight against none: the fragments of the second step's columns."""
    weight = random_weight(type_name, ROWS, 512, torch.device("cpu"))
    wanted = quant_reference.interleave_rows(quant_reference.dequantise(weight)[:, 256:])
    got = unpacked(type_name, weight, 1, build_host(type_name, tmp_path))
    assert relative_error(got, wanted) < 5e-4


@pytest.mark.parametrize("type_name", TYPES)
def test_blocks_fit_their_shared_memory(type_name: str) -> None:
    layout = LAYOUTS[type_name]
    for num_rows in (64, 4096, 128_256):
        for num_tokens in (1, 9, 20, 64, 100, 300):
            tiling = choose_mma_tiling(layout, num_rows, 2048, num_tokens, 132)
            assert shared_bytes(layout, tiling.variant) <= 227 * 1024
            assert tiling.variant.block_t >= min(num_tokens, 128)
            assert 1 <= tiling.num_parts <= 4, "eight steps make at most four parts"
    wide = MmaVariant(block_t=64, warpgroups=4, tiles=2, num_stages=9)
    less = fitted(layout, wide)
    if less is not None:
        more = dataclasses.replace(less, num_stages=less.num_stages + 1)
        assert less.num_stages < 9 and shared_bytes(layout, more) > 226 * 1024


def test_source_holds_the_constants() -> None:
    variant = MmaVariant(block_t=24, warpgroups=2, tiles=1, num_stages=3)
    source = mma_source("IQ4_NL", variant, torch.float16)
    assert "m64n24k16" in source and "#define X_SLOTS 3" in source
    assert f"#define TABLE_0 {0x3F2D1801}" in source, "-127, -104, -83, -65, raised by 128"
    assert "// UNPACK" not in source and "// WGMMA" not in source


def test_other_devices_do_not_take_it() -> None:
    weight = random_weight("Q4_K", 8, 256, torch.device("cpu"))
    assert not takes_mma(torch.zeros(4, 256, dtype=torch.float16), weight)


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if not has_mma(device):
        pytest.skip("no Hopper card with NVRTC")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 40, 250])
@pytest.mark.parametrize("type_name", TYPES)
def test_mma(type_name: str, num_tokens: int, hopper: torch.device) -> None:
    """Rows of x apart from each other, outputs that fill no tile, columns in uneven parts, bias."""
    torch.manual_seed(0)
    weight = random_weight(type_name, 330, 1280, hopper)
    x = torch.randn(num_tokens, 1280 + 64, device=hopper).half()[:, :1280]
    bias = torch.randn(330, device=hopper).half()
    wanted = quant_reference.matmul(x.float(), weight, bias.float())
    chosen = choose_mma_tiling(LAYOUTS[type_name], 330, 1280, num_tokens, 132)
    for num_parts in (1, 2, 4):
        tiling = MmaTiling(variant=chosen.variant, num_parts=num_parts)
        got = mma(x, weight, bias, out_dtype=torch.float32, tiling=tiling)
        assert relative_error(got, wanted) < 1e-3
    half = mma(x, weight, bias)
    assert half.dtype == torch.float16 and half.shape == (num_tokens, 330)
    assert relative_error(half, wanted) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_parts", [1, 4])
def test_mma_writes_columns_of_a_wider_output(num_parts: int, hopper: torch.device) -> None:
    torch.manual_seed(0)
    weight = random_weight("Q4_K", 330, 2048, hopper)
    bias = torch.randn(330, device=hopper).half()
    x = torch.randn(21, 2048, device=hopper).half()
    chosen = choose_mma_tiling(LAYOUTS["Q4_K"], 330, 2048, 21, 132)
    tiling = MmaTiling(variant=chosen.variant, num_parts=num_parts)
    out = torch.full((21, 400), 7.0, device=hopper, dtype=torch.float16)
    part = out[:, 10:340]
    assert takes_mma(x, weight, part) and not takes_mma(x, weight, out[:, 11:341])
    mma(x, weight, bias, out_TN=part, tiling=tiling)
    assert torch.equal(part, mma(x, weight, bias, tiling=tiling))
    assert out[:, :10].eq(7.0).all() and out[:, 340:].eq(7.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [8, 32, 128])
def test_mma_in_a_graph_repeats_its_bits(num_tokens: int, hopper: torch.device) -> None:
    torch.manual_seed(0)
    weight = random_weight("Q6_K", 4096, 2048, hopper)
    x = torch.randn(num_tokens, 2048, device=hopper).half()
    first = mma(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mma(x, weight)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, first)
