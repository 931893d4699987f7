"""On a GPU, one captured graph serves any length and any mix of chunks of its shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.attention_cases import AttentionCase, paged_cache

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import reference_attention, sampling
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.attention_prefill import paged_attention_prefill

pytestmark = pytest.mark.gpu
CASES = [AttentionCase(num_heads=8, head_dim=128, kv=kv) for kv in (torch.bfloat16, torch.int8)]


def capture(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_lengths_may_change(case: AttentionCase, device: torch.device) -> None:
    cache = paged_cache(case, num_seqs=3, length=900, device=device)
    q_SNH = torch.randn(3, 8, 128, device=device, dtype=case.activation)
    lengths_S = torch.tensor([1, 1, 1], device=device, dtype=torch.int32)
    arguments = (q_SNH, cache.k_BPKH, cache.v_BPKH, cache.block_table_SB, lengths_S, 0.1)
    graph, out_SNH = capture(lambda: paged_attention_decode(*arguments, **cache.options))
    for lengths in ([900, 0, 17], [64, 65, 833]):
        lengths_S.copy_(torch.tensor(lengths))
        graph.replay()
        expected = reference_attention.paged_attention_decode(*arguments, **cache.options)
        torch.testing.assert_close(out_SNH, expected, **case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_chunks_may_change(case: AttentionCase, device: torch.device) -> None:
    cache = paged_cache(case, num_seqs=3, length=900, device=device)
    q_TNH = torch.randn(300, 8, 128, device=device, dtype=case.activation)
    first_S, num_tokens_S = torch.zeros(2, 3, device=device, dtype=torch.int32)
    arguments = (
        q_TNH,
        cache.k_BPKH,
        cache.v_BPKH,
        cache.block_table_SB,
        first_S,
        num_tokens_S,
        0.1,
    )
    graph, out_TNH = capture(lambda: paged_attention_prefill(*arguments, **cache.options))
    chunks = (([0, 0, 0], [100, 100, 100]), ([600, 0, 33], [300, 0, 0]), ([0, 9, 0], [0, 70, 0]))
    for first, num_tokens in (*chunks, ([0, 0, 0], [0, 0, 0])):
        first_S.copy_(torch.tensor(first))
        num_tokens_S.copy_(torch.tensor(num_tokens))
        graph.replay()
        expected = reference_attention.paged_attention_prefill(*arguments, **cache.options)
        used = sum(num_tokens)
        torch.testing.assert_close(out_TNH[:used], expected[:used], **case.tolerance)


def test_sampling_parameters_may_change(device: torch.device) -> None:
    logits_SV = torch.randn(4, 20_000, device=device) * 4
    temperature_S, top_p_S, min_p_S = torch.zeros(3, 4, device=device)
    top_k_S = torch.full((4,), 20_000, device=device)
    uniform_S = torch.rand(4, device=device, dtype=torch.float64)
    parameters = (temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    graph, ids_S = capture(lambda: sampling.sample_filtered(logits_SV, *parameters))
    for temperature, top_k, top_p in ((1.0, 50, 0.9), (0.5, 20_000, 0.99), (3.0, 15_000, 1.0)):
        temperature_S.fill_(temperature)
        top_k_S.fill_(top_k)
        top_p_S.fill_(top_p)
        graph.replay()
        assert torch.equal(ids_S, sampling.sample_filtered(logits_SV, *parameters))
