"""Gate and up as pairs of rows: their order, and the Hopper kernel that applies SwiGLU to them, the
end of whose blocks is run on the CPU as well."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pipeserve.kernels import quant_reference, reference
from pipeserve.kernels.paired_rows import pair_rows, unpair_columns
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from pipeserve.kernels.quant_reference import PreparedRows, QuantisedRows, values_of
from tests.kernels.quant_cases import random_weight, relative_error

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels import fused, quant_mma, quant_products
from pipeserve.kernels.backend import Activations
from pipeserve.kernels.nvrtc import compile_with_log, nvrtc_library
from pipeserve.kernels.quant_mma import ARCH, has_mma, mma, mma_source, mma_swiglu, takes_swiglu
from pipeserve.kernels.quant_mma_tiling import MmaTiling, MmaVariant
from pipeserve.kernels.quant_products import QuantProducts
from pipeserve.kernels.quant_tuned import TunedTable, tuned_table
from pipeserve.kernels.quant_ways import Mma, parse_batch_way
from pipeserve.kernels.triton_backend import gpu_backend

GATE_UP = ("Q4_K", 28_672, 4096)
SHIPPED = {
    most: way.tiling
    for most, way in tuned_table("NVIDIA H200").products[GATE_UP].batch.items()
    if isinstance(way, Mma)
}
"""The tilings of an 8B model's gate and up."""
OTHERS = {
    16: "mma t16 1x2 s2 x4/2 b3 p1",
    32: "mma t32 4x1 s3 x4/3 b1 p1",
    40: "mma t40 2x2 s2 x2/2 b1 p1",
    128: "mma t128 1x2 s2 x1/3 b2 p1",
}
"""Four warpgroups, two tiles, tokens that are no power of 2."""


def tilings() -> list[MmaTiling]:
    others = [parse_batch_way(text, "Q4_K") for text in OTHERS.values()]
    return [*SHIPPED.values(), *(way.tiling for way in others if isinstance(way, Mma))]


def random_rows(num_tokens: int, weight: PlanarWeight, device: torch.device) -> torch.Tensor:
    """f16 [T, K], whose products with the matrix have a standard deviation of 2."""
    scale = 2 / quant_reference.dequantise(weight).std() / weight.num_columns**0.5
    return (torch.randn(num_tokens, weight.num_columns, device=device) * scale).half()


def paired(weight: PlanarWeight) -> PlanarWeight:
    return dataclasses.replace(weight, is_paired=True)


def test_every_tiling_of_the_shipped_table_has_pairs() -> None:
    weight = paired(random_weight("Q4_K", 512, 256, torch.device("cpu")))
    assert set(SHIPPED) >= {8, 16, 32, 64, 128, 256}
    assert all(takes_swiglu(weight, tiling) for tiling in tilings())
    tiling = SHIPPED[64]
    assert not takes_swiglu(weight, dataclasses.replace(tiling, num_parts=2))
    assert not takes_swiglu(dataclasses.replace(weight, is_paired=False), tiling)
    narrow = dataclasses.replace(tiling.variant, warpgroups=1)
    assert not takes_swiglu(weight, dataclasses.replace(tiling, variant=narrow))


def test_order_is_that_of_the_description() -> None:
    """Feature 64 q + 16 s + 8 e + i has its gate in row 128 s + 32 q + 16 e + i, up 8 below."""
    gate, up = torch.arange(512), 1000 + torch.arange(512)
    rows = pair_rows(gate, up)
    for block, q, s, e, i in [(0, 0, 0, 0, 0), (1, 3, 1, 1, 7), (0, 1, 2, 0, 5), (1, 0, 3, 1, 0)]:
        feature = 256 * block + 64 * q + 16 * s + 8 * e + i
        row = 512 * block + 128 * s + 32 * q + 16 * e + i
        assert rows[row] == feature and rows[row + 8] == 1000 + feature
    matrix = pair_rows(gate[:, None].repeat(1, 3), up[:, None].repeat(1, 3))
    assert torch.equal(matrix, rows[:, None].repeat(1, 3))
    for found, wanted in zip(unpair_columns(rows[None]), (gate, up), strict=True):
        assert torch.equal(found[0], wanted)


@pytest.mark.parametrize("dim", [256, 1280])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_swiglu_of_pairs(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit what it makes of the halves."""
    halves_TF = torch.randn(3, 2 * dim, device=device).to(dtype) * 4
    gate_TF, up_TF = halves_TF.chunk(2, dim=1)
    paired_TF = pair_rows(gate_TF.t(), up_TF.t()).t().contiguous()
    assert torch.equal(reference.swiglu(paired_TF, order="paired"), reference.swiglu(halves_TF))
    interleaved_TF = torch.empty(3, dim, device=device).half()
    found_TF = fused.swiglu(paired_TF, order="paired", interleaved_TF=interleaved_TF)
    assert torch.equal(found_TF, fused.swiglu(halves_TF))
    assert torch.equal(interleaved_TF, quant_reference.interleave_rows(found_TF.half()))


def build_host(variant: MmaVariant, folder: Path) -> ctypes.CDLL:
    kernels = Path(quant_mma.__file__).parent
    text = Path(__file__).with_name("quant_mma_swiglu_host.cpp").read_text()
    text = text.replace("// SWIGLU", (kernels / "quant_mma_swiglu.cu").read_text())
    constants = {
        "BLOCK_T": variant.block_t, "WARPGROUPS": variant.warpgroups, "TILES": variant.tiles,
    }  # fmt: skip
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    (folder / "host.cpp").write_text(defines + text)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", "host.so", "host.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tiling", tilings(), ids=lambda tiling: str(Mma(tiling=tiling)))
def test_the_end_of_a_block(tiling: MmaTiling, has_bias: bool, tmp_path: Path) -> None:
    """Every thread's part of it, from the sums that it has on, in tiles that are not full."""
    torch.manual_seed(0)
    variant, num_features = tiling.variant, 512
    host, num_tokens = build_host(variant, tmp_path), variant.block_t + 3
    products = torch.randn(num_tokens, 2 * num_features) * 4
    bias = torch.randn(2 * num_features).half() if has_bias else None
    guard = 7.0
    out, interleaved = torch.full((2, num_tokens + 1, num_features), guard).half()
    for first_row in range(0, 2 * num_features, variant.block_n):
        for first_token in range(0, num_tokens, variant.block_t):
            host.run_block(
                pointer(products), pointer(bias), first_row, first_token, num_tokens,
                num_features, pointer(out), pointer(interleaved),
            )  # fmt: skip
    rounded = products.half() if bias is None else (products + bias).half()
    wanted = reference.swiglu(rounded.float(), order="paired")
    torch.testing.assert_close(out[:-1].float(), wanted, atol=1e-5, rtol=1e-3)
    assert torch.equal(interleaved[:-1], quant_reference.interleave_rows(out[:-1]))
    assert out[-1].eq(guard).all() and interleaved[-1].eq(guard).all()


@pytest.mark.skipif(nvrtc_library() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K"])
def test_compiles_without_a_card(type_name: str) -> None:
    source = mma_source(type_name, SHIPPED[128].variant, "swiglu")
    assert "store_activated(const Work" in source and "#define SWIGLU 1" in source
    cubin, log = compile_with_log(source, ARCH)
    assert len(cubin) > 1000 and "C75" not in log, log


@pytest.mark.parametrize("num_tokens", [3, 6, 300])
@pytest.mark.parametrize("activations", ["auto", "int8", "f16"])
def test_backends_gate_pairs_where_there_is_no_such_kernel(
    activations: Activations, num_tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product, then SwiGLU in the order of the pairs. The kernel for few rows, which the
    interpreter takes minutes for, is replaced by its twin."""
    torch.manual_seed(0)

    def twin(
        x: QuantisedRows, weight: PlanarWeight, bias_N: torch.Tensor, **options: object
    ) -> torch.Tensor:
        return (quant_reference.matmul_int8(x, weight) + bias_N).half()

    monkeypatch.setattr(quant_products, "gemv", twin)
    backend = gpu_backend("quantised", activations)
    weight, bias = random_weight("Q4_K", 512, 256, device), torch.randn(512, device=device).half()
    x = random_rows(num_tokens, weight, device)
    gate_up = backend.quant_linear(x, weight, bias)
    found = backend.gated_linear(x, paired(weight), bias)
    has_bytes = isinstance(found, PreparedRows) and found.rounded is not None
    assert has_bytes == (num_tokens == 3 and activations != "f16")
    wanted = reference.swiglu(gate_up.float(), order="paired")
    assert relative_error(values_of(found), wanted) < 1e-3


def test_a_kernel_that_cannot_be_had_is_done_without(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card with the kernel in place: taken where SwiGLU's own compiles, else not."""
    weight = paired(random_weight("Q4_K", 512, 256, device))
    x = torch.randn(20, 256, device=device).half()
    text = "mma t32 2x1 s3 x4/3 b2 p1"
    products = QuantProducts(TunedTable())
    monkeypatch.setattr(products, "batch_way", lambda *_: parse_batch_way(text, "Q4_K"))
    monkeypatch.setattr(quant_products, "takes_mma", lambda *_: True)
    asked: list[object] = []

    def gated(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x

    monkeypatch.setattr(quant_products, "mma_swiglu", gated)
    for reason in ("no", None):

        def why_not(*kernel: object, found: str | None = reason) -> str | None:
            asked.append(kernel[-1])
            return found

        monkeypatch.setattr(quant_products, "why_not_loaded", why_not)
        assert (products.gated_batch(x, weight, None) is None) == (reason is not None)
    assert asked == ["swiglu"] * 2
    plain = dataclasses.replace(weight, is_paired=False)
    assert products.gated_batch(x, plain, None) is None


def test_kernels_are_compiled_ahead(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(quant_products, "is_hopper", lambda device: True)
    monkeypatch.setattr(quant_products, "has_imma", lambda device: False)
    monkeypatch.setattr(quant_products, "compile_ahead", compiled.extend)
    monkeypatch.setattr(quant_products, "why_not_loaded", lambda *kernel: None)
    products = QuantProducts(tuned_table("NVIDIA H200"))
    weight = random_weight("Q4_K", 512, 256, device)
    gate_up = dataclasses.replace(weight, num_rows=28_672, num_columns=4096)  # as far as it is read
    products.prepare([gate_up])
    products.prepare([paired(gate_up)])
    variants = dict.fromkeys(tiling.variant for tiling in SHIPPED.values())
    outputs = (torch.float16, "swiglu")
    assert compiled == [("Q4_K", variant, output) for output in outputs for variant in variants]


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if not has_mma(device):
        pytest.skip("no Hopper card with NVRTC")
    return device


def unfused(
    x: torch.Tensor, weight: PlanarWeight, bias: torch.Tensor | None, tiling: MmaTiling
) -> torch.Tensor:
    return fused.swiglu(mma(x, weight, bias, tiling=tiling), order="paired")


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tiling", tilings(), ids=lambda tiling: str(Mma(tiling=tiling)))
def test_it_is_the_product_and_swiglu_bit_for_bit(
    tiling: MmaTiling, has_bias: bool, hopper: torch.device
) -> None:
    """Outputs of several blocks of rows, tokens that do not fill the last tile; poisoned memory
    where the outputs go."""
    torch.manual_seed(0)
    weight = paired(random_weight("Q4_K", 1024, 1280, hopper))
    bias = torch.randn(1024, device=hopper).half() if has_bias else None
    for num_tokens in (1, tiling.variant.block_t, tiling.variant.block_t + 9):
        x = random_rows(num_tokens, weight, hopper)
        wanted = unfused(x, weight, bias, tiling)
        bias_32 = None if bias is None else bias.float()
        product = quant_reference.matmul(x.float(), weight, bias_32)
        twin = reference.swiglu(product, order="paired")
        assert relative_error(wanted, twin) < 3e-3
        poison = torch.full((2 * num_tokens * 512,), float("nan"), device=hopper).half()
        del poison
        out, interleaved = mma_swiglu(x, weight, bias, tiling=tiling)
        assert torch.equal(out, wanted)
        assert torch.equal(interleaved, quant_reference.interleave_rows(wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("type_name", sorted(LAYOUTS))
def test_other_types(type_name: str, hopper: torch.device) -> None:
    torch.manual_seed(0)
    weight = paired(random_weight(type_name, 512, 1024, hopper))
    x = random_rows(20, weight, hopper)
    tiling = MmaTiling(
        variant=MmaVariant(block_t=32, warpgroups=2, tiles=1, num_stages=2), num_parts=1
    )
    out, interleaved = mma_swiglu(x, weight, tiling=tiling)
    assert torch.equal(out, unfused(x, weight, None, tiling)) and out.abs().max() > 0
    assert torch.equal(interleaved, quant_reference.interleave_rows(out))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [3, 9, 40, 250, 300])
@pytest.mark.parametrize("num_features", [14_336, 512])
def test_captured_layers_are_the_eager_ones(
    num_features: int, num_tokens: int, hopper: torch.device
) -> None:
    """Norm, gate and up, down, as a step has them: other inputs at each replay, against separate
    launches, bit for bit."""
    torch.manual_seed(0)
    backend = gpu_backend("quantised", "auto", tuned_table("NVIDIA H200"))
    weight = random_weight("Q4_K", 2 * num_features, 4096, hopper)
    down = random_weight("Q6_K", 4096, num_features, hopper)
    small = torch.full((4096,), 5e-3, device=hopper)  # so that gate is about 1
    assert backend.prepare([paired(weight), down]) is None

    def run(x_TD: torch.Tensor) -> torch.Tensor:
        normed = backend.rms_norm(x_TD, small, 1e-6)
        return backend.quant_linear(backend.gated_linear(normed, paired(weight), None), down, None)

    def run_apart(x_TD: torch.Tensor) -> torch.Tensor:
        gate_up = backend.quant_linear(backend.rms_norm(x_TD, small, 1e-6), weight, None)
        hidden = fused.swiglu(gate_up, order="paired")
        return backend.quant_linear(hidden, down, None)

    static = torch.randn(num_tokens, 4096, device=hopper).half()
    run(static)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = run(static)
    for _ in range(3):
        static.normal_()
        graph.replay()
        wanted = run_apart(static)
        assert wanted.isfinite().all() and wanted.abs().max() > 0
        # cuBLAS may choose another algorithm while capturing.
        assert relative_error(captured, wanted) <= (0 if num_tokens <= 256 else 1e-3)
