"""Sampling on the device draws what the twin draws, ties, floods of candidates and all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import reference_sampling as twin
from pipeserve.kernels import sampling, sampling_adjust, sampling_logprobs, sampling_uniform
from pipeserve.kernels.sampling_state import BiasEntries, Penalties

V = 700
CHUNK = 256
INFINITY = float("inf")


def logits_like(kind: str, num_rows: int, device: torch.device) -> Tensor:
    logits_SV = torch.randn(num_rows, V) * 3
    match kind:
        case "ties":
            logits_SV = (logits_SV * 2).round() / 2
        case "masked":
            logits_SV[:, torch.rand(V) < 0.7] = -INFINITY
        case "flat":
            logits_SV *= 0.01
        case "negative":
            logits_SV -= 100
        case "zeros":
            # Both zeros are one logit.
            logits_SV = torch.where(logits_SV > 0, -0.0, 0.0)
            logits_SV[:, ::50] = -1.0
    return logits_SV.to(device)


KINDS = ("plain", "ties", "masked", "flat", "negative", "zeros")


def test_uniform_is_the_twins(device: torch.device) -> None:
    seeds_S = torch.randint(0, 2**63 - 1, (200,), device=device)
    positions_S = torch.randint(0, 100_000, (200,), device=device)
    expected = twin.uniform(seeds_S, positions_S)
    assert torch.equal(sampling_uniform.uniform(seeds_S, positions_S), expected)
    assert torch.equal(sampling_uniform.uniform(seeds_S, positions_S.int()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy(kind: str, device: torch.device) -> None:
    logits_SV = logits_like(kind, 4, device)
    assert torch.equal(sampling.greedy(logits_SV, chunk=CHUNK), twin.greedy(logits_SV))


@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind: str, device: torch.device) -> None:
    logits_SV = logits_like(kind, 5, device)
    temperature_S = torch.tensor([1.0, 0.3, 2.0, 0.7, 1.0], device=device)
    min_p_S = torch.tensor([0.0, 0.1, 0.0, 0.01, 1.0], device=device)
    uniform_S = torch.tensor([0.1, 0.5, 0.0, 1 - 2**-53, 0.7], dtype=torch.float64, device=device)
    arguments = (logits_SV, temperature_S, min_p_S, uniform_S)
    assert torch.equal(sampling.sample(*arguments, chunk=CHUNK), twin.sample(*arguments))


# top_k, top_p, min_p, temperature
ROWS = (
    (V, 0.9, 0.0, 1.0),
    (40, 0.95, 0.01, 0.3),
    (1, 0.5, 0.0, 2.0),
    (V, 0.05, 0.0, 1.0),
    (300, 1.0, 0.0, 0.7),
    (5, 0.99, 0.2, 1.5),
    (V, 1.0, 0.0, 1.0),
    (699, 0.999999, 0.0, 1.0),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_candidates", [V, 8], ids=["candidates", "whole-rows"])
def test_sample_filtered(kind: str, max_candidates: int, device: torch.device) -> None:
    logits_SV = logits_like(kind, len(ROWS), device)
    top_k, top_p, min_p, temperature = zip(*ROWS, strict=True)
    arguments = (
        logits_SV,
        torch.tensor(temperature, device=device),
        torch.tensor(top_k, device=device),
        torch.tensor(top_p, device=device),
        torch.tensor(min_p, device=device),
        torch.rand(len(ROWS), dtype=torch.float64).to(device),
    )
    found = sampling.sample_filtered(*arguments, chunk=CHUNK, max_candidates=max_candidates)
    assert torch.equal(found, twin.sample_filtered(*arguments))


def test_rows_of_temperature_0_take_the_likeliest(device: torch.device) -> None:
    logits_SV = logits_like("ties", 3, device)
    temperature_S = torch.tensor([0.0, 1.0, 0.0], device=device)
    zeros_S, uniform_S = torch.zeros(3, device=device), torch.full((3,), 0.5).double().to(device)
    expected = twin.greedy(logits_SV)[::2]
    drawn = sampling.sample(logits_SV, temperature_S, zeros_S, uniform_S, chunk=CHUNK)
    assert torch.equal(drawn[::2], expected)
    top_k_S, top_p_S = torch.tensor([3, 3, 3], device=device), torch.full((3,), 0.5).to(device)
    filtered = sampling.sample_filtered(
        logits_SV, temperature_S, top_k_S, top_p_S, zeros_S, uniform_S, chunk=CHUNK
    )
    assert torch.equal(filtered[::2], expected)


def test_a_draw_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    logits_SV = logits_like("plain", 4, device)
    parameters = [torch.full((4,), x, device=device) for x in (0.9, 20, 0.9, 0.0)]
    uniform_S = torch.rand(4, dtype=torch.float64).to(device)
    together = sampling.sample_filtered(logits_SV, *parameters, uniform_S, chunk=CHUNK)
    alone = [
        sampling.sample_filtered(
            logits_SV[[row]], *(p[[row]] for p in parameters), uniform_S[[row]], chunk=CHUNK
        )
        for row in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_filtered_is_drawn_as_by_sample(kind: str, device: torch.device) -> None:
    logits_SV = logits_like(kind, 6, device)
    temperature_S = torch.tensor([1.0, 0.3, 2.0, 0.7, 0.0, 1.0], device=device)
    min_p_S = torch.tensor([0.0, 0.1, 0.0, 0.01, 0.0, 0.0], device=device)
    uniform_S = torch.rand(6, dtype=torch.float64).to(device)
    top_k_S = torch.tensor([V, V, V, V, 3, 3], device=device, dtype=torch.int32)
    filtered = sampling.sample_filtered(
        logits_SV,
        temperature_S,
        top_k_S,
        torch.ones(6, device=device),
        min_p_S,
        uniform_S,
        chunk=CHUNK,
    )
    plain = sampling.sample(logits_SV, temperature_S, min_p_S, uniform_S, chunk=CHUNK)
    assert torch.equal(filtered[:5], plain[:5])


@pytest.mark.parametrize("kind", ["plain", "ties", "masked"])
def test_log_probs(kind: str, device: torch.device) -> None:
    logits_SV = logits_like(kind, 5, device)
    logits_SV[:, [3, 300, 699]] = 2.0
    ids_S = torch.tensor([3, 0, 300, 699, 1], device=device)
    asked_G = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    of_token, top_ids, top = sampling_logprobs.log_probs(logits_SV, ids_S, asked_G, 5, chunk=CHUNK)
    expected_token, _, expected_top = twin.log_probs(logits_SV, ids_S, asked_G, 5)
    torch.testing.assert_close(of_token, expected_token, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(top, expected_top, atol=1e-5, rtol=1e-5)
    order = torch.sort(logits_SV[asked_G], dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_ids, order[:, :5])


ROW_SLOTS = (4, 0, 5, 2)


def some_penalties(device: torch.device) -> Penalties:
    """Of six row slots, for a step of four rows, one of which has none."""
    return Penalties(
        in_prompt_RV=(torch.rand(6, V) < 0.2).to(device),
        output_counts_RV=(torch.randint(-6, 4, (6, V)).clamp(min=0)).to(device, torch.int32),
        repetition_S=torch.tensor([1.3, 1.0, 0.8, 1.0], device=device),
        presence_S=torch.tensor([0.5, 0.0, -1.0, 0.7], device=device),
        frequency_S=torch.tensor([0.1, 0.0, 0.0, -2.0], device=device),
    )


def test_apply_penalties(device: torch.device) -> None:
    logits_SV, penalties = logits_like("masked", 4, device), some_penalties(device)
    rows_S = torch.tensor(ROW_SLOTS, device=device)
    rows_S[3] = -1
    before_SV = logits_SV.clone()
    found = sampling_adjust.apply_penalties(logits_SV, rows_S, penalties)
    torch.testing.assert_close(found, twin.apply_penalties(logits_SV, rows_S, penalties))
    assert torch.equal(found[[1, 3]], logits_SV[[1, 3]])
    assert not torch.equal(found[[0, 2]], logits_SV[[0, 2]])
    assert torch.equal(logits_SV, before_SV)


@pytest.mark.parametrize("has_penalties", [False, True])
def test_apply_bias(has_penalties: bool, device: torch.device) -> None:
    logits_SV, rows_S = logits_like("plain", 4, device), torch.tensor(ROW_SLOTS, device=device)
    penalties = some_penalties(device) if has_penalties else None
    num_entries = 300  # of more than one program
    places = torch.randperm(3 * V)[:num_entries]
    values_E = torch.randn(num_entries)
    values_E[::7] = -INFINITY
    bias = BiasEntries(
        seqs_E=(places // V).to(device, torch.int32),
        ids_E=(places % V).to(device, torch.int32),
        values_E=values_E.to(device),
    )
    outs = [
        logits_SV.clone()
        if penalties is None
        else sampling_adjust.apply_penalties(logits_SV, rows_S, penalties)
        for _ in range(2)
    ]
    sampling_adjust.apply_bias(logits_SV, outs[0], bias, rows_S, penalties)
    twin.apply_bias(logits_SV, outs[1], bias, rows_S, penalties)
    torch.testing.assert_close(outs[0], outs[1])
    assert int((outs[0] == -INFINITY).sum()) == len(values_E[::7])


def test_record(device: torch.device) -> None:
    counts_RV = torch.zeros(4, V, dtype=torch.int32, device=device)
    history_RL = torch.zeros(4, 30, dtype=torch.int32, device=device)
    rows_S = torch.tensor([3, -1, 0], device=device)
    positions_S = torch.tensor([29, 5, 0], device=device)
    for _ in range(2):
        sampling_adjust.record(
            torch.tensor([699, 1, 5], device=device),
            rows_S,
            positions_S,
            output_counts_RV=counts_RV,
            history_RL=history_RL,
        )
    assert counts_RV.nonzero().tolist() == [[0, 5], [3, 699]]
    assert int(counts_RV.sum()) == 4
    assert history_RL.nonzero().tolist() == [[0, 0], [3, 29]]
    assert int(history_RL[3, 29]) == 699
