"""The integer tensor cores' kernel: its very source on the CPU, compiled with a C++ compiler whose
threads are fibres, and on a card."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pipeserve.kernels import quant_reference
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from pipeserve.kernels.quant_reference import QuantisedRows
from tests.kernels.quant_cases import random_weight, relative_error

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels.nvrtc import compile_cubin, nvrtc_library
from pipeserve.kernels.quant_imma import (
    MAX_PARTS,
    ImmaTiling,
    ImmaVariant,
    choose_imma_tiling,
    fitted,
    has_imma,
    imma,
    imma_constants,
    imma_source,
    imma_text,
    shared_bytes,
    takes_imma,
)
from pipeserve.kernels.quant_split import CardLimits, card_limits
from pipeserve.kernels.rounded_rows import quantise_rows

TYPES = sorted(LAYOUTS)
COLUMNS = 768
"""Three steps: parts are uneven, and super scales of 16 bits lie in both halves of their words."""


def tolerance(type_name: str) -> float:
    """Integer sums are exact, so only float32 sums differ; of two groups of 16 columns the sum is
    rounded to a unit of the codes, which are small integers in Q2_K."""
    if LAYOUTS[type_name].group_size == 32:
        return 3e-6
    return 3e-4 if type_name == "Q2_K" else 3e-5


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class Arguments(ctypes.Structure):
    """As quant_imma_host.cpp has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "codes", "scales", "x_sums", "low", "high", "words", "mins", "supers", "bias", "out",
        )),
        *((name, ctypes.c_int) for name in (
            "num_rows", "num_tokens", "num_all_steps", "num_token_tiles", "num_parts", "out_stride",
        )),
    )  # fmt: skip


class Host:
    """One kernel on the CPU."""

    def __init__(
        self, type_name: str, variant: ImmaVariant, folder: Path, *, has_clusters: bool = True,
        out_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.type_name, self.variant, self.out_dtype = type_name, variant, out_dtype
        self.has_clusters = has_clusters
        host = Path(__file__).with_name("quant_imma_host.cpp").read_text()
        definitions, runner = host.split("// SOURCE\n")
        constants = imma_constants(type_name, variant, out_dtype, has_clusters=has_clusters)
        (folder / "host.cpp").write_text(constants + imma_text(definitions) + runner)
        command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", "host.so", "host.cpp"], cwd=folder, check=True)
        self.library = ctypes.CDLL(str(folder / "host.so"))

    def multiply(
        self, x: QuantisedRows, weight: PlanarWeight, bias_N: torch.Tensor | None = None,
        *, num_parts: int = 1, are_late: bool = True, out_TN: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        num_tokens, num_rows = x.codes_TK.shape[0], weight.num_rows
        if out_TN is None:
            out_TN = torch.full((num_tokens, num_rows), 7.0, dtype=self.out_dtype)
        sums = out_TN
        if num_parts > 1 and not self.has_clusters:
            sums = torch.full((num_parts, num_tokens, num_rows), torch.nan)
        tensors = (
            *x.tensors, weight.low, weight.high, weight.scales, weight.mins, weight.supers, bias_N,
            sums,
        )  # fmt: skip
        token_tiles = -(-num_tokens // self.variant.block_t)
        row_tiles = -(-num_rows // self.variant.block_n)
        arguments = Arguments(
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            num_rows, num_tokens, weight.num_columns // 256, token_tiles, num_parts,
            sums.stride(-2),
        )  # fmt: skip
        self.library.run(
            ctypes.byref(arguments), row_tiles * token_tiles * num_parts,
            shared_bytes(weight.layout, self.variant), int(are_late),
        )  # fmt: skip
        return out_TN if sums is out_TN else sums.sum(0)


def inputs(
    type_name: str, num_tokens: int, num_rows: int, num_columns: int = COLUMNS
) -> tuple[QuantisedRows, PlanarWeight, torch.Tensor]:
    """Activations of very different sizes, a weight, and their product."""
    torch.manual_seed(num_tokens)
    weight = random_weight(type_name, num_rows, num_columns, torch.device("cpu"))
    x = torch.randn(num_tokens, num_columns) * torch.logspace(-2, 2, num_columns)
    rows = quant_reference.quantise_rows(x + 0.3)
    return rows, weight, quant_reference.matmul_int8(rows, weight)


SMALL = ImmaVariant(block_t=8, warps=2, row_tiles=1, num_stages=2)


@needs_compiler
@pytest.mark.parametrize("type_name", TYPES)
def test_every_type(type_name: str, tmp_path: Path) -> None:
    """Outputs and tokens that fill no tile; parts of one and of two steps."""
    rows, weight, wanted = inputs(type_name, 11, 37)
    host = Host(type_name, SMALL, tmp_path)
    for num_parts in (1, 2):
        got = host.multiply(rows, weight, num_parts=num_parts)
        assert relative_error(got, wanted) < tolerance(type_name)


@needs_compiler
@pytest.mark.parametrize("are_late", [False, True])
@pytest.mark.parametrize(
    ("type_name", "variant", "num_tokens", "num_parts"),
    [
        ("Q4_K", ImmaVariant(block_t=32, warps=2, row_tiles=2, num_stages=3), 32, 3),
        ("Q6_K", ImmaVariant(block_t=16, warps=1, row_tiles=2, num_stages=4), 5, 8),
        ("Q8_0", ImmaVariant(block_t=64, warps=4, row_tiles=1, num_stages=2), 64, 2),
        ("Q5_1", ImmaVariant(block_t=24, warps=2, row_tiles=1, num_stages=3), 50, 1),
    ],
)
def test_every_way_to_cut_a_product(
    type_name: str, variant: ImmaVariant, num_tokens: int, num_parts: int, are_late: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    """More stages than steps of a part, and fewer; copies that come early, or late; a bias."""
    rows, weight, product = inputs(type_name, num_tokens, 100, 1280)
    bias = torch.randn(100).half()
    got = Host(type_name, variant, tmp_path).multiply(
        rows, weight, bias, num_parts=num_parts, are_late=are_late
    )
    assert relative_error(got, product + bias.float()) < tolerance(type_name)


@needs_compiler
@pytest.mark.parametrize("num_tokens", [1, 5, 8])
def test_number_of_tokens(num_tokens: int, tmp_path: Path) -> None:
    rows, weight, wanted = inputs("Q4_K", num_tokens, 16)
    assert relative_error(Host("Q4_K", SMALL, tmp_path).multiply(rows, weight), wanted) < 3e-6


@needs_compiler
def test_cards_without_clusters_write_their_parts(tmp_path: Path) -> None:
    rows, weight, wanted = inputs("Q4_1", 3, 70)
    host = Host("Q4_1", SMALL, tmp_path, has_clusters=False)
    for num_parts in (1, 3):
        got = host.multiply(rows, weight, num_parts=num_parts)
        assert relative_error(got, wanted) < 3e-6


@needs_compiler
def test_columns_of_a_wider_output(tmp_path: Path) -> None:
    rows, weight, wanted = inputs("Q4_0", 9, 33)
    out = torch.full((9, 50), 7.0, dtype=torch.float16)
    host = Host("Q4_0", SMALL, tmp_path, out_dtype=torch.float16)
    host.multiply(rows, weight, out_TN=out[:, 5:38], num_parts=2)
    assert relative_error(out[:, 5:38], wanted) < 5e-4
    assert out[:, :5].eq(7.0).all() and out[:, 38:].eq(7.0).all()


@needs_compiler
def test_large_and_tiny_activations(tmp_path: Path) -> None:
    """Sums that float16 could not hold, groups of zeros, and the largest codes of one sign."""
    _, weight, _ = inputs("Q4_K", 4, 16)
    x = torch.stack(
        [torch.full((COLUMNS,), 6e4), torch.full((COLUMNS,), -1e-7), torch.zeros(COLUMNS),
         torch.linspace(-1, 1, COLUMNS)]
    )  # fmt: skip
    rows = quant_reference.quantise_rows(x)
    got = Host("Q4_K", SMALL, tmp_path).multiply(rows, weight)
    wanted = quant_reference.matmul_int8(rows, weight)
    for token in (0, 1, 3):
        assert relative_error(got[token], wanted[token]) < 1e-5
    assert got[2].eq(0).all()


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("type_name", TYPES)
def test_blocks_fit_their_shared_memory(type_name: str, shared: int) -> None:
    """Of GeForce cards, of an A100, of Hopper."""
    layout = LAYOUTS[type_name]
    card = CardLimits(num_multiprocessors=100, shared_bytes=shared * 1024)
    for num_rows in (64, 4096, 128_256):
        for num_tokens in (1, 9, 20, 64, 100):
            tiling = choose_imma_tiling(layout, num_rows, 2048, num_tokens, card)
            block_bytes = shared_bytes(layout, tiling.variant)
            assert tiling.variant.blocks_at_once * block_bytes <= shared * 1024
            assert tiling.variant.num_stages >= 2
            assert tiling.variant.block_t >= min(num_tokens, 64)
            assert 1 <= tiling.num_parts <= 4, "eight steps make at most four parts"


def test_stages_are_as_many_as_fit() -> None:
    wide = ImmaVariant(block_t=64, warps=8, row_tiles=2, num_stages=9)
    less = fitted(LAYOUTS["Q6_K"], wide, 227 * 1024, 228 * 1024)
    assert less is not None
    more = dataclasses.replace(less, num_stages=less.num_stages + 1)
    assert less.num_stages < 9 and shared_bytes(LAYOUTS["Q6_K"], more) > 227 * 1024
    assert fitted(LAYOUTS["Q6_K"], wide, 48 * 1024, 48 * 1024) is None


def test_source_holds_the_constants() -> None:
    source = imma_source("IQ4_NL", SMALL, torch.float16, has_clusters=False)
    assert "#define CLUSTERED 0\n" in source and "#define BLOCK_T 8\n" in source
    assert "// PTX" not in source and "// UNPACK" not in source
    assert "mma.sync" in source and "group_scale" in source and "quant_imma(" in source


@pytest.mark.skipif(nvrtc_library() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_it_compiles_for_every_architecture(arch: str) -> None:
    """Types that take each branch of the source."""
    has_clusters = arch in ("sm_90", "sm_120")
    for type_name in ("Q4_K", "Q6_K", "Q5_1", "Q2_K", "MXFP4"):
        source = imma_source(type_name, SMALL, torch.float16, has_clusters=has_clusters)
        assert len(compile_cubin(source, arch)) > 1000


def test_other_devices_do_not_take_it() -> None:
    assert not takes_imma(random_weight("Q4_K", 8, 256, torch.device("cpu")))


@pytest.fixture
def card(device: torch.device) -> torch.device:
    device = torch.device("cuda", 0) if device.type == "cuda" else device
    if not has_imma(device):
        pytest.skip("no NVIDIA card from Ampere on, or no NVRTC")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 13, 32, 64, 70])
@pytest.mark.parametrize("type_name", TYPES)
def test_imma(type_name: str, num_tokens: int, card: torch.device) -> None:
    """Outputs that fill no tile, columns in uneven parts, a bias; the twin's result."""
    rows, weight, product = inputs(type_name, num_tokens, 330, 1280)
    bias = torch.randn(330).half()
    wanted = product + bias.float()
    rows = QuantisedRows(
        codes_TK=rows.codes_TK.to(card), scales_TG=rows.scales_TG.to(card),
        sums_TG=rows.sums_TG.to(card),
    )  # fmt: skip
    weight = random_weight(type_name, 330, 1280, card)
    chosen = choose_imma_tiling(weight.layout, 330, 1280, num_tokens, card_limits(card))
    for num_parts in (1, 2, 4, 8):  # of five steps
        tiling = ImmaTiling(variant=chosen.variant, num_parts=num_parts)
        got = imma(rows, weight, bias.to(card), out_dtype=torch.float32, tiling=tiling)
        assert relative_error(got.cpu(), wanted) < tolerance(type_name)
    # As large as float16 holds of every type.
    less = dataclasses.replace(rows, scales_TG=rows.scales_TG / 64)
    half = imma(less, weight, bias.to(card))
    assert half.dtype == torch.float16
    assert relative_error(half.cpu(), product / 64 + bias.float()) < 5e-4


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [8, 16, 48])
def test_imma_in_a_graph_repeats_its_bits(num_tokens: int, card: torch.device) -> None:
    """After the kernel that writes its inputs: what starts early must wait for them."""
    torch.manual_seed(0)
    weight = random_weight("Q6_K", 4096, 2048, card)
    x = torch.randn(num_tokens, 2048, device=card).half()
    first = imma(quantise_rows(x), weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = imma(quantise_rows(x), weight)
    for factor in (1, 2, 1):
        x.mul_(factor)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, imma(quantise_rows(x), weight))
        x.div_(factor)
    assert torch.equal(captured, first)


def test_parts_fit_a_cluster() -> None:
    card = CardLimits(num_multiprocessors=1000, shared_bytes=227 * 1024)
    tiling = choose_imma_tiling(LAYOUTS["Q4_K"], 64, 1 << 15, 8, card)
    assert tiling.num_parts == MAX_PARTS
