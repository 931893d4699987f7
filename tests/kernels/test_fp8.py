"""8-bit floats and int8 activations: kernels against their twins, the scaled product on the GPU."""

from __future__ import annotations

import pytest
import torch

from pipeserve.kernels import fp8_reference, quant_reference
from pipeserve.kernels.backend import REFERENCE, Backend
from pipeserve.kernels.fp8_reference import FP8_GROUP, Fp8Rows, Fp8Weight
from pipeserve.kernels.quant_reference import PreparedRows, values_of
from tests.kernels.attention_cases import AttentionCase, paged_cache
from tests.kernels.quant_cases import relative_error

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels import attention_decode, fused
from pipeserve.kernels.fp8 import FEW_ROWS, fp8_linear, multiply_many
from pipeserve.kernels.fp8_rows import RowsTiling, choose_tiling, multiply_rows, shared_bytes
from pipeserve.kernels.fp8_tokens import quantise_tokens
from pipeserve.kernels.quant_round import round_rows
from pipeserve.kernels.quant_split import CardLimits
from pipeserve.kernels.triton_backend import gpu_backend


def every_e4m3(device: torch.device) -> torch.Tensor:
    """All values from 0 to 448, in order."""
    codes = torch.arange(127, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn).float()


def fp8_rows(num_tokens: int, num_columns: int, device: torch.device, *, grouped: bool) -> Fp8Rows:
    torch.manual_seed(2)
    values = torch.randn(num_tokens, num_columns, device=device)
    values *= torch.logspace(-1, 1, num_columns, device=device)  # groups differ
    return fp8_reference.quantise_tokens(values, FP8_GROUP if grouped else None)


def fp8_weight(num_rows: int, num_columns: int, device: torch.device) -> Fp8Weight:
    torch.manual_seed(1)
    values = torch.randn(num_rows, num_columns, device=device) * 0.05
    codes, scales = fp8_reference.quantise_rows(values)
    return Fp8Weight(codes_NK=codes, scales_1N=scales.t().contiguous())


def assert_rounded(rows: Fp8Rows, x: torch.Tensor, group: int | None = None) -> None:
    wanted = fp8_reference.quantise_tokens(x, group)
    torch.testing.assert_close(rows.scales_TG, wanted.scales_TG)
    # The quotient may differ in its last bit, and a code on the edge, as many of bf16 are, with it.
    steps = rows.codes_TK.view(torch.uint8).int() - wanted.codes_TK.view(torch.uint8).int()
    assert steps.abs().max() <= 1 and steps.count_nonzero() < 1e-2 * steps.numel()


def test_every_value_and_every_midpoint_is_rounded_as_torch_rounds(device: torch.device) -> None:
    values = every_e4m3(device)
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([middles * (1 - 2**-20), middles * (1 + 2**-20)])
    row = torch.cat([values, middles, near])
    row = torch.cat([row, -row]).unsqueeze(0)  # its peak is 448: a scale of exactly 1
    rows = quantise_tokens(row)
    assert rows.scales_TG.item() == 1.0
    wanted = row.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(rows.codes_TK.view(torch.uint8), wanted)


@pytest.mark.parametrize("num_columns", [16, 100, 1536])
def test_quantise_tokens(num_columns: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, num_columns + 8, device=device)[:, :num_columns] * 30
    x[1] = 0.0
    x[2] = 1e-30
    x[3, 0] = -1e4
    rows = quantise_tokens(x)
    assert_rounded(rows, x)
    got = rows.codes_TK
    assert not got[1].float().any() and not got[2].float().any()
    assert got[3, 0].float().item() == -448.0


def test_a_rows_scale_is_the_one_of_least_error(device: torch.device) -> None:
    torch.manual_seed(0)
    values = torch.randn(50, 512, device=device) * 0.05
    values[1] = 0.0
    values[2] = 1.75 * 2.0 ** -torch.arange(512, device=device).remainder(7)  # exact as it is
    codes, scales = fp8_reference.quantise_rows(values)
    plain = fp8_reference.quantise_tokens(values)
    errors = (codes.float() * scales - values).norm(dim=1)
    plain_errors = (plain.codes_TK.float() * plain.scales_TG - values).norm(dim=1)
    assert (errors <= plain_errors * (1 + 1e-5)).all()
    assert errors[3:].mean() < 0.98 * plain_errors[3:].mean()
    assert not codes[1].float().any()
    assert errors[2] < 1e-5 and scales[2].item() == pytest.approx(1.75 / 448)
    assert (codes.float().abs().amax(1)[2:] > 448 / 2.1).all()  # an octave, and nothing clipped


def test_the_twin_keeps_e4m3s_precision() -> None:
    weight = fp8_weight(48, 512, torch.device("cpu"))
    torch.manual_seed(1)
    values = torch.randn(48, 512) * 0.05
    assert 0.01 < relative_error(fp8_reference.dequantise(weight), values) < 0.03
    x = torch.randn(5, 512)
    bias = torch.randn(48)
    got = fp8_reference.fp8_linear(x, weight, bias)
    wanted = torch.nn.functional.linear(x, values, bias)
    assert 0.005 < relative_error(got, wanted) < 0.05
    x[:, :128] *= 100  # of a scale of their own
    grouped, whole = (fp8_reference.quantise_tokens(x, group) for group in (FP8_GROUP, None))
    errors = [relative_error(fp8_reference.values_of_rows(rows), x) for rows in (grouped, whole)]
    assert errors[0] < errors[1] < 0.03


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "num_columns", "grouped"),
    [(1, 64, 256, False), (5, 80, 272, False), (19, 144, 640, False), (19, 144, 640, True)],
)
def test_few_rows(
    num_tokens: int,
    num_rows: int,
    num_columns: int,
    grouped: bool,
    num_parts: int,
    device: torch.device,
) -> None:
    """Tiles past every end, and parts whose last one is shorter."""
    weight = fp8_weight(num_rows, num_columns, device)
    x = fp8_rows(num_tokens, num_columns, device, grouped=grouped)
    bias = torch.randn(num_rows, device=device).bfloat16()
    tiling = RowsTiling(
        block_n=64, block_t=16, block_k=128, num_warps=4, num_stages=3, num_parts=num_parts
    )  # fmt: skip
    got = multiply_rows(x, weight, bias, tiling=tiling)
    wanted = fp8_reference.scaled_product(x, weight, bias)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, wanted) < 6e-3  # of bf16, which the interpreter cuts off
    plain = multiply_rows(x, weight, tiling=tiling)
    assert relative_error(plain, wanted - bias.float()) < 6e-3


def test_tilings_fit_the_card() -> None:
    for shared_kib, num_multiprocessors in ((227, 132), (99, 76)):
        limits = CardLimits(num_multiprocessors=num_multiprocessors, shared_bytes=shared_kib * 1024)
        for num_rows, num_columns in ((28672, 4096), (4096, 14336), (4096, 4096), (48, 64)):
            for num_tokens in (1, 2, 16, 17, 64, 128):
                tiling = choose_tiling(num_rows, num_columns, num_tokens, limits)
                assert shared_bytes(tiling) <= limits.shared_bytes
                assert tiling.block_t >= num_tokens
                assert tiling.num_parts == 1 or num_columns // tiling.num_parts >= 1024


@pytest.mark.parametrize("num_columns", [64, 100, 2048 + 32])
def test_round_rows(num_columns: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, num_columns + 8, device=device).half()[:, :num_columns]
    x[1, :32] = 0.0
    got, wanted = round_rows(x), quant_reference.round_rows(x)
    assert got.dtype == torch.float16 and got.shape == x.shape
    # On a GPU the reciprocal may differ in its last bit, and a code on the edge with it.
    assert (got != wanted).float().mean() < 2e-3
    assert 1e-3 < relative_error(got, x) < 1e-2
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize("dim", [128, 1152])
def test_activations_are_rounded_where_they_are_made(dim: int, device: torch.device) -> None:
    torch.manual_seed(0)
    backend = gpu_backend("fp8", "auto")
    x = torch.randn(3, dim, device=device).bfloat16()
    residual = torch.randn(3, dim, device=device)
    weight = torch.rand(dim, device=device)
    gate_up = torch.cat([x, residual.bfloat16()], dim=1)
    normed, total = backend.add_rms_norm(x, residual, weight, 1e-5, form="e4m3")
    plain, plain_total = fused.add_rms_norm(x, residual, weight, 1e-5)
    gated = backend.swiglu(gate_up, form="e4m3")
    assert isinstance(normed, PreparedRows) and isinstance(gated, PreparedRows)
    assert torch.equal(normed.values_TK, plain) and torch.equal(total, plain_total)
    assert torch.equal(gated.values_TK, fused.swiglu(gate_up))
    for prepared in (normed, gated):
        assert prepared.e4m3 is not None
        assert_rounded(prepared.e4m3, prepared.values_TK, FP8_GROUP)


@pytest.mark.parametrize("dim", [256, 1152])
def test_many_tokens_leave_8_bit_floats_alone(dim: int, device: torch.device) -> None:
    """By a scale per token, from views of wider rows, as rounding the floats would have it."""
    torch.manual_seed(0)
    num_tokens = FEW_ROWS + 2
    backend = gpu_backend("fp8", "auto")
    x = torch.randn(num_tokens, dim + 16, device=device).bfloat16()[:, :dim]
    residual = torch.randn(num_tokens, dim + 32, device=device)[:, :dim]
    weight = torch.rand(dim, device=device)
    gate_up = torch.randn(num_tokens, 2 * dim, device=device).bfloat16()
    gate_up[1] = 0
    normed, total = backend.add_rms_norm(x, residual, weight, 1e-5, form="e4m3")
    plain, plain_total = fused.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, plain_total)
    gated = backend.swiglu(gate_up, form="e4m3")
    for rows, floats in ((normed, plain), (gated, fused.swiglu(gate_up))):
        assert isinstance(rows, Fp8Rows)
        assert_rounded(rows, floats)
        assert relative_error(values_of(rows), floats) < 4e-2
    assert isinstance(backend.swiglu(gate_up, form="values"), torch.Tensor)


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_attention_rounds_its_output(
    heads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_decode, "_heads_per_merge", lambda *sizes: heads)
    case = AttentionCase(num_heads=6, head_dim=128, kv=torch.bfloat16)
    cache = paged_cache(case, num_seqs=2, length=40, device=device)
    q_SNH = torch.randn(2, 6, 128, device=device).bfloat16()
    lengths_S = torch.tensor([40, 7], device=device, dtype=torch.int32)
    attended = gpu_backend("fp8", "auto").paged_attention_decode(
        q_SNH, cache.k_BPKH, cache.v_BPKH, cache.block_table_SB, lengths_S, 0.1, **cache.options
    )
    assert isinstance(attended, PreparedRows) and attended.e4m3 is not None
    assert_rounded(attended.e4m3, attended.values_TK, FP8_GROUP)


def test_what_is_not_rounded_where_it_is_made(device: torch.device) -> None:
    """What a dense matrix takes, rows of no whole groups, heads shorter than a group."""
    backend = gpu_backend("fp8", "auto")
    few, odd = (torch.ones(*size, device=device).bfloat16() for size in ((2, 256), (1, 288)))
    assert isinstance(backend.swiglu(few, form="values"), torch.Tensor)
    assert isinstance(backend.swiglu(odd, form="e4m3"), torch.Tensor)
    case = AttentionCase(num_heads=4, head_dim=64, kv=torch.bfloat16)
    cache = paged_cache(case, num_seqs=1, length=16, device=device)
    attended = backend.paged_attention_decode(
        torch.randn(1, 4, 64, device=device).bfloat16(), cache.k_BPKH, cache.v_BPKH,
        cache.block_table_SB, torch.tensor([16], device=device, dtype=torch.int32), 0.1,
        **cache.options,
    )  # fmt: skip
    assert isinstance(attended, torch.Tensor)


@pytest.fixture
def fp8_card(device: torch.device) -> torch.device:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit floats need compute capability 8.9")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 64, 128, 300])
@pytest.mark.parametrize(
    ("num_rows", "num_columns"), [(48, 64), (960, 576), (9600, 64), (4096, 14336)]
)
def test_scaled_products(
    num_tokens: int, num_rows: int, num_columns: int, fp8_card: torch.device
) -> None:
    """Inside a CUDA graph too. The bound: a rounding to bf16, and the tensor cores' own sums."""
    weight = fp8_weight(num_rows, num_columns, fp8_card)
    x = torch.randn(num_tokens, num_columns, device=fp8_card).bfloat16()
    bias = torch.randn(num_rows, device=fp8_card).bfloat16()
    wanted = fp8_reference.fp8_linear(x.float(), weight, bias)
    got = fp8_linear(x, weight, bias)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, wanted) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8_linear(x, weight, bias)
    graph.replay()
    assert torch.equal(captured, got)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 16, 33, 64, 128])
def test_few_rows_are_as_exact_as_many(num_tokens: int, fp8_card: torch.device) -> None:
    """Of every shape of tile, parts and all."""
    weight = fp8_weight(1024, 4096, fp8_card)
    x = fp8_rows(num_tokens, 4096, fp8_card, grouped=False)
    wanted = fp8_reference.scaled_product(x, weight, None)
    few, many = (multiply(x, weight, None) for multiply in (multiply_rows, multiply_many))
    assert relative_error(few, wanted) < 3e-3
    assert relative_error(few, wanted) < 1.1 * relative_error(many, wanted)
    grouped = fp8_rows(num_tokens, 4096, fp8_card, grouped=True)
    wanted = fp8_reference.scaled_product(grouped, weight, None)
    assert relative_error(multiply_rows(grouped, weight), wanted) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24, 100])
def test_kernels_that_start_early_wait_for_each_other(
    num_tokens: int, fp8_card: torch.device
) -> None:
    """Feed-forward layers of which each kernel takes what the last one made: the same bits each
    time, and the twins' values as far as roundings that part ways allow."""
    gate_up, down = fp8_weight(4096, 1024, fp8_card), fp8_weight(1024, 2048, fp8_card)
    start = torch.randn(num_tokens, 1024, device=fp8_card)
    norm = torch.ones(1024, device=fp8_card)

    def layers(backend: Backend) -> torch.Tensor:
        x, residual = start.to(backend.dtype), start
        for _ in range(10):
            normed, residual = backend.add_rms_norm(x, residual, norm, 1e-5, form="e4m3")
            gated = backend.swiglu(backend.fp8_linear(normed, gate_up, None), form="e4m3")
            x = backend.fp8_linear(gated, down, None)
        return x

    backend = gpu_backend("fp8", "auto")
    wanted = layers(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers(backend)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, wanted)
    assert relative_error(wanted, layers(REFERENCE)) < 0.4
