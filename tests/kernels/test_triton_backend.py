"""GPU backends: which arithmetic each precision uses at which number of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeserve.kernels import quant_reference
from pipeserve.kernels.backend import Activations
from tests.kernels.quant_cases import random_weight, relative_error

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.kernels.quant_products import DENSE_ROWS, GEMV_ROWS
from pipeserve.kernels.quant_ways import GEMM_ROWS
from pipeserve.kernels.triton_backend import gpu_backend

FEW, BATCH, MANY = GEMV_ROWS - 1, GEMV_ROWS + 2, GEMM_ROWS + 1


@pytest.mark.parametrize("num_tokens", [FEW, BATCH, MANY])
@pytest.mark.parametrize(
    ("activations", "rounded_at"),
    [("auto", {FEW}), ("f16", set()), ("int8", {FEW, BATCH, MANY})],
)
def test_activations_are_rounded_where_the_option_says(
    activations: Activations, rounded_at: set[int], num_tokens: int, device: torch.device
) -> None:
    """The other arithmetic is three times as far away as rounding to f16 goes."""
    torch.manual_seed(0)
    weight = random_weight("Q4_K", 9, 256, device)
    x = torch.randn(num_tokens, 256, device=device).half()
    plain = quant_reference.matmul(x.float(), weight)
    rounded = quant_reference.matmul_int8(quant_reference.quantise_rows(x), weight)
    assert relative_error(rounded, plain) > 3e-3
    got = gpu_backend("quantised", activations).quant_linear(x, weight, None)
    assert got.dtype == torch.float16
    wanted = rounded if num_tokens in rounded_at else plain
    assert relative_error(got, wanted) < 1.2e-3


def test_dense_weights_go_with_bf16(device: torch.device) -> None:
    weight = random_weight("Q4_K", 9, 256, device)
    for weights, form in (("bf16", "dense"), ("fp8", "fp8")):
        backend = gpu_backend(weights, "auto")  # type: ignore[arg-type]
        assert (backend.dtype, backend.weight_form) == (torch.bfloat16, form)
        assert backend.dequantise(weight).dtype == torch.bfloat16


def test_large_batches_take_the_matrix_that_is_kept_dequantised(device: torch.device) -> None:
    weight = random_weight("Q4_K", 9, 256, device)
    dense_NK = torch.ones((9, 256), dtype=torch.float16, device=device)  # told apart by its values
    weight = dataclasses.replace(weight, dense_NK=dense_NK)
    backend = gpu_backend("both", "auto")
    assert (backend.dtype, backend.weight_form) == (torch.float16, "both")
    x = torch.randn(DENSE_ROWS + 1, 256, device=device).half()
    plain = quant_reference.matmul(x.float(), dataclasses.replace(weight, dense_NK=None))
    assert relative_error(backend.quant_linear(x[:40], weight, None), plain[:40]) < 1.2e-3
    summed = x.float().sum(1, keepdim=True).expand(-1, 9)
    assert relative_error(backend.quant_linear(x, weight, None), summed) < 1.2e-3
    stacked = backend.stacked_quant_linear(x, [(weight, None), (weight, None)])
    assert relative_error(stacked, summed.repeat(1, 2)) < 1.2e-3
