"""Masks: banned tokens are never drawn, other rows see nothing of them, and twins agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.core.batch import StepMasks
from pipeserve.core.constraint import num_words
from pipeserve.kernels import reference_sampling as twin
from pipeserve.kernels import sampling_mask
from pipeserve.kernels.sampling_backend import REFERENCE, triton_sampling
from pipeserve.runtime.sampled import to_host
from pipeserve.runtime.sampler import Sampler
from tests.runtime.test_sampler import PARAMETERS, PROMPT, VOCAB_SIZE, logits_of_step, params, start


def words_for(allowed: list[list[int]], vocab_size: int) -> np.ndarray:
    bits = np.zeros((len(allowed), 32 * num_words(vocab_size)), dtype=np.bool_)
    for row, ids in zip(bits, allowed, strict=True):
        row[ids] = True
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 2048, 2049, 5000])
def test_kernel_and_twin_ban_the_same(vocab_size: int, device: torch.device) -> None:
    logits_SV = torch.randn(4, vocab_size, device=device)
    allowed = [[0], [vocab_size - 1], sorted({vocab_size // 2, 0})]
    words_MW = torch.from_numpy(words_for(allowed, vocab_size)).to(device)
    seqs_M = torch.tensor([3, 0, 1], dtype=torch.int32, device=device)
    found, expected = logits_SV.clone(), logits_SV.clone()
    sampling_mask.apply_masks(found, seqs_M, words_MW)
    twin.apply_masks(expected, seqs_M, words_MW)
    assert torch.equal(found, expected)
    for row, ids in zip((3, 0, 1), allowed, strict=True):
        assert found[row].isfinite().nonzero().flatten().tolist() == ids
        assert torch.equal(found[row, ids], logits_SV[row, ids])
    assert torch.equal(found[2], logits_SV[2])


def test_tokens_beyond_the_words_are_banned(device: torch.device) -> None:
    words_MW = torch.full((1, 2), -1, dtype=torch.int32, device=device)
    seqs_M = torch.zeros(1, dtype=torch.int32, device=device)
    for apply_masks in (sampling_mask.apply_masks, twin.apply_masks):
        logits_SV = torch.zeros(1, 100, device=device)
        apply_masks(logits_SV, seqs_M, words_MW)
        assert logits_SV.isfinite().nonzero()[:, 1].tolist() == list(range(64))


@pytest.mark.parametrize("backend", ["kernels", "twins"])
def test_a_sampler_draws_what_is_allowed_and_leaves_the_other_rows(
    backend: str, device: torch.device
) -> None:
    """Every second row is masked; the others draw what they draw without masks."""
    if backend == "twins":
        device = torch.device("cpu")
    functions = REFERENCE if backend == "twins" else triton_sampling()
    all_params = [
        replace(params(seed=seed, **changes), min_tokens=0)
        for seed, changes in enumerate(PARAMETERS.values())
    ]
    rows = np.arange(len(all_params), dtype=np.int32)
    seqs_M = rows[::2]
    allowed = [[int(seq) % VOCAB_SIZE, (7 * int(seq) + 3) % VOCAB_SIZE] for seq in seqs_M]
    allowed[0] = [VOCAB_SIZE - 1]
    masks = StepMasks(seqs_M=seqs_M, words_MW=words_for(allowed, VOCAB_SIZE))
    plain, masked = (
        Sampler(num_rows=len(rows), vocab_size=VOCAB_SIZE, device=device, backend=functions)
        for _ in range(2)
    )
    for row, sampling in enumerate(all_params):
        plain.start(start(row, sampling))
        masked.start(start(row, sampling))
    for step in range(4):
        logits_SV = logits_of_step(step, len(rows)).to(device)
        before_SV = logits_SV.clone()
        positions = np.full(len(rows), len(PROMPT) + step, dtype=np.int32)
        free = to_host(plain.sample(logits_SV, rows, positions)).token_ids()
        found = to_host(masked.sample(logits_SV, rows, positions, masks)).token_ids()
        assert torch.equal(logits_SV, before_SV)
        assert (found[1::2] == free[1::2]).all()
        for token, ids in zip(found[::2].tolist(), allowed, strict=True):
            assert token in ids
