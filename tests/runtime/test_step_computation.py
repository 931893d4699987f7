"""What a mixed step hands to attention is what the kernels for prefill are made for, and its last
layer is computed for the tokens that are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeserve.kernels.backend import InputForm, backend_for
from pipeserve.kernels.quant_reference import LinearInput
from pipeserve.models.layers import LayerCache
from pipeserve.runtime.block_table import BlockTable
from pipeserve.runtime.step_computation import StepComputation
from pipeserve.runtime.step_inputs import StepInputs, StepShape

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import attention_wgmma
from tests.models import tiny
from tests.models.test_quantised import load


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


@pytest.mark.parametrize("sampled", [(6, 11), (11,), ()])
def test_the_last_layer_ends_early_for_tokens_that_nobody_reads(
    sampled: tuple[int, ...], tmp_path: Path
) -> None:
    """Logits, keys and values are those of computing every token."""
    cpu = torch.device("cpu")
    model = tiny.random_llama(tiny.llama_config(num_hidden_layers=2))
    path = tiny.write_gguf(tmp_path / "tiny.gguf", model)
    decoder = load(path, cpu, backend_for(cpu), keeps_quantised=False)
    table = BlockTable(num_rows=2, blocks_per_row=1, block_size=16, device=cpu)
    table.columns(max_length=16)[:] = torch.tensor([[0], [1]])
    shape = StepShape(num_tokens=12, num_decode_rows=0, num_chunks=2, num_samples=len(sampled))
    inputs = StepInputs.of(torch.zeros(sum(shape.sizes), dtype=torch.int64), shape)
    inputs.rows_T[7:] = 1
    inputs.positions_T[:] = torch.tensor([*range(7), *range(5)])
    inputs.token_ids_T[:] = torch.arange(12) * 3 + 5
    inputs.chunk_rows_C[:] = torch.tensor([0, 1])
    inputs.chunk_starts_C[:] = torch.tensor([0, 7])
    inputs.chunk_num_tokens_C[:] = torch.tensor([7, 5])
    inputs.sampled_tokens_N[:] = torch.tensor(sampled, dtype=torch.int64)
    config = decoder.config
    size = (2, 16, config.num_kv_heads, config.head_dim)

    def computation() -> StepComputation:
        caches = [LayerCache(k_BPKH=torch.zeros(size), v_BPKH=torch.zeros(size)) for _ in range(2)]
        pool: Any = SimpleNamespace(read=lambda rows_T: torch.zeros_like(rows_T))
        return StepComputation(decoder=decoder, caches=caches, block_table=table, token_pool=pool)

    with torch.inference_mode():
        short, whole = computation(), computation()
        fed: list[int] = []
        last = decoder.layers[-1]
        gate_up = last.gate_up

        def counted(x_TI: torch.Tensor, *, form: InputForm) -> LinearInput:
            fed.append(len(x_TI))
            return gate_up(x_TI, form=form)

        layers = (*decoder.layers[:-1], dataclasses.replace(last, gate_up=counted))
        short = dataclasses.replace(short, decoder=dataclasses.replace(decoder, layers=layers))
        logits_NV = short(inputs, None, max_length=16)
        assert sum(fed) == len(sampled), "the last layer's feed-forward"
        x_TD = whole.hidden(inputs, None, max_length=16)
        assert len(x_TD) == 12
        torch.testing.assert_close(logits_NV, whole.sampled_logits(inputs, x_TD))
    for ours, theirs in zip(short.caches, whole.caches, strict=True):
        assert theirs.k_BPKH.any()
        torch.testing.assert_close(ours.k_BPKH, theirs.k_BPKH)
        torch.testing.assert_close(ours.v_BPKH, theirs.v_BPKH)
