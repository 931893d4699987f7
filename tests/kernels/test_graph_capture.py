"""On a GPU, one captured graph serves any length and any mix of chunks of its shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_cases import AttentionCase, PagedCache, paged_cache

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import attention_prefill, reference_attention, sampling
from pipeserve.kernels.attention_decode import paged_attention_decode
from pipeserve.kernels.attention_prefill import paged_attention_prefill
from pipeserve.kernels.quant_mma import has_mma

pytestmark = pytest.mark.gpu
CASES = [AttentionCase(num_heads=8, head_dim=128, kv=kv) for kv in (torch.bfloat16, torch.int8)]
STEP_CASES = [
    AttentionCase(num_heads=8, head_dim=128, kv=torch.float16, index=torch.int64),
    AttentionCase(num_heads=8, head_dim=128, kv=torch.bfloat16, index=torch.int64),
    AttentionCase(num_heads=9, num_kv_heads=3, kv=torch.float16, index=torch.int64),
]
"""As stages call the kernels; the last one as the demo model does."""
SCALE = 0.1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedStep:
    """The inputs of a graph for 3 decode rows and 4 chunks in one tensor, as StepInputs has them,
    and attention as models.layers calls it."""

    q_TNH: Tensor
    cache: PagedCache
    inputs: Tensor

    def enter(self, lengths: Sequence[int], chunks: Sequence[tuple[int, int]]) -> None:
        """chunks: first positions and tokens, right behind the decode rows; zeros for the rest."""
        counts = [num_tokens for _, num_tokens in chunks]
        starts = [len(lengths) + sum(counts[:index]) for index in range(len(chunks))]
        decode_rows, chunk_rows = range(len(lengths)), range(6, 6 - len(chunks), -1)
        firsts = [first for first, _ in chunks]
        self.inputs.zero_()
        places = (decode_rows, lengths, chunk_rows, starts, firsts, counts)
        for place, values in zip(self.inputs.split((3, 3, 4, 4, 4, 4)), places, strict=True):
            place[: len(values)] = torch.tensor(list(values), dtype=torch.int64)

    def attend(self, decode: Callable[..., Tensor], prefill: Callable[..., Tensor]) -> Tensor:
        rows_R, lengths_R, rows_C, starts_C, firsts_C, counts_C = self.inputs.split(
            (3, 3, 4, 4, 4, 4)
        )
        q_TNH, caches = self.q_TNH, (self.cache.k_BPKH, self.cache.v_BPKH)
        table_SB = self.cache.block_table_SB
        out_TNH = torch.empty_like(q_TNH)
        out_TNH[:3] = decode(q_TNH[:3], *caches, table_SB[rows_R], lengths_R, SCALE)
        places = (table_SB[rows_C], firsts_C, counts_C)
        return prefill(q_TNH, *caches, *places, SCALE, starts_S=starts_C, out_TNH=out_TNH)


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_mixed_steps_may_change(
    case: AttentionCase, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured without a row, as a stage does it. Hopper's own kernel computes the chunks there."""
    if has_mma(device):
        monkeypatch.setattr(attention_prefill, "prefill_kernel", None)
    q_TNH = torch.randn(300, case.num_heads, case.head_dim, device=device, dtype=case.kv)
    step = MixedStep(
        q_TNH=q_TNH,
        cache=paged_cache(case, num_seqs=7, length=900, device=device),
        inputs=torch.zeros(22, dtype=torch.int64, device=device),
    )
    graph, out_TNH = capture(lambda: step.attend(paged_attention_decode, paged_attention_prefill))
    steps: tuple[tuple[list[int], list[tuple[int, int]]], ...] = (
        ([900, 17, 333], [(0, 100), (333, 37), (600, 150), (899, 1)]),
        ([64], [(0, 201), (127, 2)]),
        ([], [(601, 299)]),
        ([1, 128], []),
    )
    for lengths, chunks in steps:
        step.enter(lengths, chunks)
        graph.replay()
        expected_TNH = step.attend(
            reference_attention.paged_attention_decode,
            reference_attention.paged_attention_prefill,
        )
        used = len(lengths) + sum(num_tokens for _, num_tokens in chunks)
        torch.testing.assert_close(out_TNH[:used], expected_TNH[:used], **case.tolerance)


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
