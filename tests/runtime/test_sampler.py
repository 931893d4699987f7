"""Each sampling parameter through the Sampler, many rows at once, against one row in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeserve.core.batch import RowStart
from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels.sampling_backend import REFERENCE
from pipeserve.runtime.sampled import to_host
from pipeserve.runtime.sampler import Sampler
from tests.kernels.test_reference_sampling import draw_by_hand, uniform_by_hand

VOCAB_SIZE = 1200
PROMPT = [5, 17, 17, 300]

PARAMETERS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 2.5},
    "top-k": {"top_k": 5},
    "top-k of everything": {"top_k": 50_000},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "bias": {"logit_bias": ((3, 6.0), (8, -100.0), (3, 1.0), (999_999, 5.0))},
    "greedy with bias": {"temperature": 0.0, "logit_bias": ((77, 50.0),)},
    "repetition": {"temperature": 0.0, "repetition_penalty": 5.0},
    "presence": {"temperature": 0.0, "presence_penalty": 2.0},
    "frequency": {"temperature": 0.5, "frequency_penalty": 1.5},
    "min tokens": {"min_tokens": 4, "stop_token_ids": (0, 1, 2, 3)},
    "greedy with min tokens": {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (9, 10)},
    "all": {
        "temperature": 0.9,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": ((17, 3.0),),
        "min_tokens": 2,
        "stop_token_ids": (17,),
    },
}


def params(seed: int = 1, **changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 50, "seed": seed, **changes})  # type: ignore[arg-type]


def start(row: int, sampling: SamplingParams, output: list[int] | None = None) -> RowStart:
    return RowStart(
        row=row,
        sampling=sampling,
        token_ids=np.array(PROMPT + (output or []), dtype=np.int32),
        num_prompt_tokens=len(PROMPT),
    )


def make_sampler(num_rows: int = 20) -> Sampler:
    return Sampler(
        num_rows=num_rows,
        vocab_size=VOCAB_SIZE,
        device=torch.device("cpu"),
        backend=REFERENCE,
    )


def logits_of_step(step: int, num_rows: int) -> torch.Tensor:
    """Few likely tokens, the same ones for all rows and steps, so that penalties have effect."""
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn((1, VOCAB_SIZE), generator=generator)
    logits[0, :20] += 4.0
    return logits.expand(num_rows, -1).clone()


def adjusted_by_hand(logits: np.ndarray, p: SamplingParams, output: list[int]) -> np.ndarray:
    x = logits.astype(np.float64).copy()
    for token, bias in p.logit_bias:
        if token < len(x):
            x[token] += bias
    for token in set(PROMPT) | set(output):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(output):
        x[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    if len(output) < p.min_tokens:
        x[list(p.stop_token_ids)] = -np.inf
    return x


def sample_by_hand(logits: np.ndarray, p: SamplingParams, output: list[int]) -> int:
    x = adjusted_by_hand(logits, p, output)
    if p.temperature == 0.0:
        return int(x.argmax())
    return draw_by_hand(
        x,
        uniform_by_hand(p.seed, len(PROMPT) + len(output)),
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
    )


def run(sampler: Sampler, rows: list[int], num_steps: int, first: int = 0) -> list[list[int]]:
    """Sample the given rows together, step by step; returns tokens per row."""
    outputs: list[list[int]] = [[] for _ in rows]
    row_array = np.array(rows, dtype=np.int32)
    for step in range(first, first + num_steps):
        positions = np.full(len(rows), len(PROMPT) + step, dtype=np.int32)
        drawn = sampler.sample(logits_of_step(step, len(rows)), row_array, positions)
        for output, token in zip(outputs, drawn.ids_S.tolist(), strict=True):
            output.append(token)
    return outputs


def test_all_parameters_together_equal_each_alone_by_hand() -> None:
    all_params = [
        params(seed=index, **changes) for index, changes in enumerate(PARAMETERS.values())
    ]
    sampler = make_sampler()
    rows = [19 - index for index in range(len(all_params))]
    for row, sampling in zip(rows, all_params, strict=True):
        sampler.start(start(row, sampling))
    outputs = run(sampler, rows, num_steps=12)
    for name, sampling, output in zip(PARAMETERS, all_params, outputs, strict=True):
        expected: list[int] = []
        for step in range(12):
            logits = logits_of_step(step, 1)[0].numpy()
            expected.append(sample_by_hand(logits, sampling, expected))
        assert output == expected, name


@pytest.mark.parametrize("name", PARAMETERS)
def test_neighbours_change_nothing(name: str) -> None:
    sampling = params(seed=99, **PARAMETERS[name])
    alone, crowded = make_sampler(), make_sampler()
    alone.start(start(0, sampling))
    for row, changes in enumerate(PARAMETERS.values()):
        crowded.start(start(row, params(seed=row, **changes)))
    crowded.start(start(16, sampling))
    expected = run(alone, [0], num_steps=8)[0]
    assert run(crowded, [*range(len(PARAMETERS)), 16], num_steps=8)[-1] == expected


def test_a_row_forgets_its_previous_sequence() -> None:
    sampling = params(temperature=0.0, repetition_penalty=3.0, frequency_penalty=0.1)
    used, fresh = make_sampler(), make_sampler()
    likely_tokens = np.arange(20, dtype=np.int32)
    for prompt_length in (20, 0):
        previous = RowStart(
            row=3,
            sampling=params(presence_penalty=1.0, logit_bias=((1, 9.0),), top_k=1),
            token_ids=likely_tokens,
            num_prompt_tokens=prompt_length,
        )
        used.start(previous)
        used.start(start(3, sampling))
        fresh.start(start(3, sampling))
        assert run(used, [3], num_steps=10) == run(fresh, [3], num_steps=10)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_resumed_sequence_goes_on_as_if_never_stopped(name: str) -> None:
    sampling = params(seed=5, **PARAMETERS[name])
    sampler = make_sampler()
    sampler.start(start(2, sampling))
    whole = run(sampler, [2], num_steps=10)[0]
    sampler.start(start(6, sampling, output=whole[:4]))
    assert run(sampler, [6], num_steps=6, first=4)[0] == whole[4:]


def test_seeds_and_positions_decide_the_draw() -> None:
    sampler = make_sampler()
    for row, seed in enumerate([1, 1, 2]):
        sampler.start(start(row, params(seed=seed, temperature=5.0)))
    same, again, other = run(sampler, [0, 1, 2], num_steps=10)
    assert same == again
    assert same != other
    assert len(set(same)) > 5


def test_penalties_take_no_memory_before_they_are_used() -> None:
    sampler = make_sampler()
    sampler.start(start(0, params()))
    assert sampler._seen is None
    sampler.start(start(1, params(presence_penalty=0.1)))
    assert sampler._seen is not None


def test_logprobs_are_of_the_unmodified_logits() -> None:
    sampler = make_sampler()
    sampler.start(start(0, params(temperature=0.0, num_logprobs=3, logit_bias=((50, 100.0),))))
    sampler.start(start(1, params(temperature=0.0)))
    sampler.start(start(2, params(temperature=0.7, num_logprobs=0)))
    logits = logits_of_step(0, 3)
    before = logits.clone()
    rows, positions = np.arange(3, dtype=np.int32), np.full(3, 4, dtype=np.int32)
    sampled = to_host(sampler.sample(logits, rows, positions))
    ids, logprobs = sampled.token_ids(), sampled.step_logprobs()
    assert torch.equal(logits, before)
    assert ids[0] == 50
    expected = logits.double().log_softmax(-1).numpy()
    assert logprobs is not None
    assert logprobs.top_ids_SK.shape == logprobs.top_SK.shape == (3, 3)
    for row in (0, 2):
        assert logprobs.token_S[row] == pytest.approx(expected[row, ids[row]], abs=1e-5)
    assert logprobs.top_ids_SK[0].tolist() == (-expected[0]).argsort()[:3].tolist()
    np.testing.assert_allclose(logprobs.top_SK[0], np.sort(expected[0])[:-4:-1], atol=1e-5)


def test_no_logprobs_where_nobody_asked() -> None:
    sampler = make_sampler()
    sampler.start(start(0, params()))
    drawn = sampler.sample(
        logits_of_step(0, 1), np.zeros(1, dtype=np.int32), np.full(1, 4, dtype=np.int32)
    )
    assert drawn.logprobs is None
    assert to_host(drawn).step_logprobs() is None


def test_a_seed_may_use_all_63_bits() -> None:
    sampler = make_sampler()
    sampling = params(seed=2**63 - 1, temperature=3.0)
    sampler.start(start(0, sampling))
    expected: list[int] = []
    for step in range(4):
        expected.append(sample_by_hand(logits_of_step(step, 1)[0].numpy(), sampling, expected))
    assert run(sampler, [0], num_steps=4)[0] == expected
