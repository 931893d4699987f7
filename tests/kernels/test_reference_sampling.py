"""Sampling kernels against one row at a time in plain numpy, and their distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeserve.kernels import reference_sampling as kernels
from pipeserve.kernels.sampling_state import BiasEntries, Penalties


def uniform_by_hand(seed: int, position: int) -> float:
    """splitmix64's finaliser over (seed, position), in Python's unbounded integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    return (mix((mix(seed) + position * 0x9E3779B97F4A7C15) & mask) >> 11) / 2**53


def draw_by_hand(
    logits: np.ndarray,
    u: float,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """SamplingParams' definition, step by step in float64."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -logits.astype(np.float64)))
    if top_k is not None:
        p[order[top_k:]] = 0.0
        p /= p.sum()
    if top_p < 1.0:
        likelier = np.cumsum(p[order]) - p[order]
        p[order[likelier >= top_p]] = 0.0
        p /= p.sum()
    p[p < min_p * p.max()] = 0.0
    cumulated = np.cumsum(p / p.sum())
    return int(np.searchsorted(cumulated, u, side="right"))


def test_uniform_is_the_hash_of_seed_and_position() -> None:
    seeds = [0, 0, 1, 2**63 - 1, 12345678901234567]
    positions = [0, 1, 0, 8191, 100]
    ours = kernels.uniform(torch.tensor(seeds), torch.tensor(positions)).tolist()
    expected = [uniform_by_hand(s, p) for s, p in zip(seeds, positions, strict=True)]
    assert ours == expected
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_uniform_is_flat_and_uncorrelated(axis: str) -> None:
    count, num_bins = 40_000, 50
    numbers, same = torch.arange(count), torch.full((count,), 7)
    arguments = (numbers, same) if axis == "seeds" else (same, numbers)
    u = kernels.uniform(*arguments).numpy()
    observed = np.histogram(u, bins=num_bins, range=(0, 1))[0]
    chi_square = ((observed - count / num_bins) ** 2 / (count / num_bins)).sum()
    assert chi_square < 85.4  # 49 degrees of freedom: exceeded by chance once in a thousand
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("vocab_size", [5, 256, 1000])
def test_greedy_takes_the_lowest_of_equals(vocab_size: int) -> None:
    logits = torch.randn(6, vocab_size)
    logits[1] = 2.0
    logits[2, [vocab_size - 1, 3]] = 50.0
    logits[3] = float("-inf")
    logits[3, vocab_size - 1] = -1e30
    expected = logits.numpy().argmax(axis=1)
    assert expected[1] == 0 and expected[2] == 3 and expected[3] == vocab_size - 1
    np.testing.assert_array_equal(kernels.greedy(logits), expected)


FILTERS: dict[str, dict[str, float | int]] = {
    "top-k": {"top_k": 7},
    "top-k of 1": {"top_k": 1},
    "top-k beyond the first window": {"top_k": 1500},
    "top-p": {"top_p": 0.6},
    "top-p near 0": {"top_p": 1e-6},
    "top-p beyond the first window": {"top_p": 0.9999, "temperature": 3.0},
    "top-k, then top-p": {"top_k": 40, "top_p": 0.5, "temperature": 2.0},
    "all": {"top_k": 900, "top_p": 0.95, "min_p": 0.02, "temperature": 1.5},
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab_size", [60, 3000])
def test_filtered_draw_equals_the_definition(name: str, vocab_size: int) -> None:
    parameters = FILTERS[name]
    num_rows = 60
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn((num_rows, vocab_size), generator=generator) * 2
    logits[::3] = (logits[::3] * 2).round() / 2  # many equals
    u = kernels.uniform(torch.arange(num_rows), torch.arange(num_rows))
    top_k = int(parameters.get("top_k", vocab_size))
    ours = kernels.sample_filtered(
        logits,
        torch.full((num_rows,), float(parameters.get("temperature", 1.0))),
        torch.full((num_rows,), top_k),
        torch.full((num_rows,), float(parameters.get("top_p", 1.0))),
        torch.full((num_rows,), float(parameters.get("min_p", 0.0))),
        u,
    )
    expected = [
        draw_by_hand(row.numpy(), float(number), **parameters)
        for row, number in zip(logits, u, strict=True)
    ]
    assert ours.tolist() == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.3}, {"min_p": 0.2}])
@pytest.mark.parametrize("vocab_size", [60, 3000])
def test_draw_equals_the_definition(parameters: dict[str, float], vocab_size: int) -> None:
    num_rows = 60
    logits = torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(12)) * 2
    u = kernels.uniform(torch.arange(num_rows), torch.arange(num_rows))
    ours = kernels.sample(
        logits,
        torch.full((num_rows,), parameters.get("temperature", 1.0)),
        torch.full((num_rows,), parameters.get("min_p", 0.0)),
        u,
    )
    expected = [
        draw_by_hand(row.numpy(), float(number), **parameters)
        for row, number in zip(logits, u, strict=True)
    ]
    assert ours.tolist() == expected


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(u: float) -> None:
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, [300, 301, 700]] = torch.tensor([0.1, 0.2, 0.3])
    one, number = torch.ones(1), torch.tensor([u], dtype=torch.float64)
    plain = kernels.sample(logits, one, torch.zeros(1), number)
    filtered = kernels.sample_filtered(
        logits, one, torch.tensor([3]), torch.tensor([0.999]), torch.zeros(1), number
    )
    expected = 300 if u == 0.0 else 700
    assert plain.item() == filtered.item() == expected


def test_a_tiny_temperature_is_greedy_and_stays_finite() -> None:
    logits = torch.randn(4, 500) * 100
    tiny = torch.full((4,), 1e-30)
    drawn = kernels.sample(logits, tiny, torch.zeros(4), torch.full((4,), 0.999).double())
    assert drawn.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("is_filtered", [False, True])
def test_draws_follow_the_probabilities(is_filtered: bool) -> None:
    count, vocab_size = 20_000, 12
    logits = torch.linspace(-2.0, 2.0, vocab_size).unsqueeze(0)
    rows = logits.expand(count, -1).contiguous()
    u = kernels.uniform(torch.full((count,), 42), torch.arange(count))
    one = torch.ones(count)
    if is_filtered:
        kept = torch.full((count,), 8)
        drawn = kernels.sample_filtered(rows, one, kept, one, torch.zeros(count), u)
    else:
        drawn = kernels.sample(rows, one, torch.zeros(count), u)
    observed = np.bincount(drawn, minlength=vocab_size)
    p = np.exp(logits[0].numpy().astype(np.float64))
    if is_filtered:
        p[:4] = 0.0
    expected = p / p.sum() * count
    possible = expected > 0
    assert not observed[~possible].any()
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    # Exceeded by chance once in a thousand, for 7 and 11 degrees of freedom.
    assert chi_square < (24.3 if is_filtered else 31.3)


STRENGTHS = [[1.3, 0.0, 0.0], [1.0, 0.7, 0.4], [1.0, 0.0, 0.0], [0.8, -1.0, 1.5]]
ROW_SLOTS = [4, 0, 2, 3]


def some_penalties() -> Penalties:
    """Of five row slots and 40 tokens; for a step of four rows, one of which has none."""
    repetition, presence, frequency = torch.tensor(STRENGTHS).T
    return Penalties(
        in_prompt_RV=torch.rand(5, 40) < 0.3,
        output_counts_RV=(torch.randint(-6, 4, (5, 40))).clamp(min=0).int(),
        repetition_S=repetition,
        presence_S=presence,
        frequency_S=frequency,
    )


def penalised_by_hand(value: float, seq: int, token: int, penalties: Penalties) -> float:
    row, (repetition, presence, frequency) = ROW_SLOTS[seq], STRENGTHS[seq]
    count = int(penalties.output_counts_RV[row, token])
    if penalties.in_prompt_RV[row, token] or count > 0:
        value = value / repetition if value > 0 else value * repetition
    return value - presence * (count > 0) - frequency * count


def test_penalties_equal_the_definition() -> None:
    logits, penalties = torch.randn(4, 40), some_penalties()
    before = logits.clone()
    ours = kernels.apply_penalties(logits, torch.tensor(ROW_SLOTS), penalties)
    for seq in range(4):
        for token in range(40):
            expected = penalised_by_hand(float(before[seq, token]), seq, token, penalties)
            assert float(ours[seq, token]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("has_penalties", [False, True])
def test_bias_comes_before_penalties(has_penalties: bool) -> None:
    logits, penalties = torch.randn(4, 40), some_penalties()
    before, rows = logits.clone(), torch.tensor(ROW_SLOTS)
    entries = {(0, 3): 2.5, (0, 39): -1.0, (3, 3): float("-inf"), (2, 0): 0.5}
    bias = BiasEntries(
        seqs_E=torch.tensor([seq for seq, _ in entries], dtype=torch.int32),
        ids_E=torch.tensor([token for _, token in entries], dtype=torch.int32),
        values_E=torch.tensor(list(entries.values())),
    )
    ours = kernels.apply_penalties(logits, rows, penalties) if has_penalties else logits.clone()
    kernels.apply_bias(logits, ours, bias, rows, penalties if has_penalties else None)
    for seq in range(4):
        for token in range(40):
            expected = float(before[seq, token]) + entries.get((seq, token), 0.0)
            if has_penalties:
                expected = penalised_by_hand(expected, seq, token, penalties)
            assert float(ours[seq, token]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("is_filtered", [False, True])
def test_mixed_rows_draw_what_each_kind_draws_alone(is_filtered: bool) -> None:
    logits = torch.randn(30, 400)
    temperature = torch.tensor([0.0, 0.7, 1.3]).repeat(10)
    u, zeros = torch.rand(30, dtype=torch.float64), torch.zeros(30)
    plain = kernels.sample(logits[1::3], temperature[1::3], zeros[1::3], u[1::3])
    if is_filtered:
        top_k = torch.tensor([3, 400, 5]).repeat(10)
        arguments = (logits, temperature, top_k, torch.ones(30), zeros, u)
        mixed = kernels.sample_filtered(*arguments)
        last = kernels.sample_filtered(*(argument[2::3] for argument in arguments))
    else:
        mixed = kernels.sample(logits, temperature, zeros, u)
        last = kernels.sample(logits[2::3], temperature[2::3], zeros[2::3], u[2::3])
    assert mixed[::3].tolist() == logits[::3].argmax(1).tolist()
    assert mixed[1::3].tolist() == plain.tolist()
    assert mixed[2::3].tolist() == last.tolist()


def test_record_counts_and_leaves_fillers_alone() -> None:
    counts = torch.zeros(4, 9, dtype=torch.int32)
    positions = torch.zeros(3, dtype=torch.int32)
    for _ in range(2):
        kernels.record(torch.tensor([8, 1, 5]), torch.tensor([3, -1, 0]), positions, counts)
    assert counts.nonzero().tolist() == [[0, 5], [3, 8]]
    assert int(counts.sum()) == 4


def test_log_probs() -> None:
    logits = torch.randn(5, 50)
    ids, asked = torch.tensor([4, 7, 0, 7, 49]), torch.tensor([0, 2, 4], dtype=torch.int32)
    of_token, top_ids, top = kernels.log_probs(logits, ids, asked, 5)
    expected = logits[::2].double().log_softmax(-1)
    torch.testing.assert_close(of_token.double(), expected[[0, 1, 2], [4, 0, 49]])
    assert torch.equal(top_ids, expected.argsort(descending=True)[:, :5])
    torch.testing.assert_close(top.double(), expected.sort(descending=True).values[:, :5])
