"""The measured limits of a card; runs where there is one."""

from __future__ import annotations

import pytest


@pytest.mark.gpu
def test_ceilings_are_measured_and_the_memory_is_given_back() -> None:
    import torch

    from pipeserve.bench.ceilings import measure_ceilings

    card = torch.device("cuda", 0)
    before = torch.cuda.memory_reserved(card)
    ceilings = measure_ceilings(card)
    assert ceilings.device == "cuda:0"
    assert ceilings.copy_bytes_per_s > 10e9, "slower than main memory"
    assert ceilings.matmul_flops_per_s > 1e12
    assert torch.cuda.memory_reserved(card) - before < 2**28, "only a library's workspace stays"
