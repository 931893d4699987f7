"""What a mixed step hands to attention is what the kernels for prefill are made for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeserve.runtime.block_table import BlockTable
from pipeserve.runtime.step_computation import StepComputation
from pipeserve.runtime.step_inputs import StepInputs, StepShape

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import attention_wgmma


@pytest.mark.parametrize("max_length", [None, 40], ids=["graph", "eager"])
def test_hopper_attention_takes_mixed_steps(
    max_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the slower kernel would be taken, and nothing would say so."""
    monkeypatch.setattr(attention_wgmma, "is_hopper", lambda device: True)
    monkeypatch.setattr(attention_wgmma, "why_not_loaded", lambda heads, device: None)
    decoder: Any = SimpleNamespace(config=SimpleNamespace(num_kv_heads=2))
    pool: Any = None
    device = torch.device("cpu")
    table = BlockTable(num_rows=5, blocks_per_row=7, block_size=16, device=device)
    computation = StepComputation(decoder=decoder, caches=(), block_table=table, token_pool=pool)
    shape = StepShape(num_tokens=33, num_decode_rows=3, num_chunks=3, num_samples=4)
    inputs = StepInputs.of(torch.zeros(sum(shape.sizes), dtype=torch.int64), shape)
    prefill = computation._metadata(inputs, max_length).prefill
    assert prefill is not None
    q_TNH, cache_BPKH = torch.zeros(33, 8, 128).half(), torch.zeros(9, 16, 2, 128).half()
    places = (prefill.starts_S, prefill.first_positions_S, prefill.num_tokens_S)
    assert attention_wgmma.takes_wgmma(
        q_TNH, cache_BPKH, cache_BPKH, prefill.block_table_SB, *places, torch.empty_like(q_TNH)
    )
