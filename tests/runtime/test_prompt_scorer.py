"""Log-probabilities of a prompt: those that its beginnings give, however it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeserve.core.sampling import SamplingParams
from pipeserve.runtime import prompt_scorer
from tests.models import tiny
from tests.runtime.driver import Driver, Prompt, Result, Schedule, running_driver

NUM_TOP = 20


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "tiny.gguf"
    return tiny.write_gguf(path, tiny.random_llama(tiny.llama_config()))


def greedy(token_ids: list[int], num_tokens: int, **changes: object) -> Prompt:
    values = {"max_tokens": num_tokens, "seed": 0, "temperature": 0.0, "num_logprobs": NUM_TOP}
    return Prompt(token_ids=token_ids, sampling=SamplingParams(**values | changes))  # type: ignore[arg-type]


def scored(prompt: Prompt) -> Prompt:
    return greedy(list(prompt.token_ids), 3, num_prompt_logprobs=NUM_TOP)


def make_prompt(driver: Driver, length: int, seed: int) -> Prompt:
    """Some tokens that the model itself would say, and some that it would not."""
    rng = np.random.default_rng(seed)
    ids: list[int] = rng.integers(0, 300, 4).tolist()
    (result,) = driver.generate([greedy(ids, length - 8)])
    return greedy(ids + result.token_ids + rng.integers(0, 300, 4).tolist(), 3)


def check(prompt: Prompt, result: Result, beginnings: dict[int, Result], tolerance: float) -> None:
    """beginnings: what the prompt's first tokens, so many, are followed by."""
    length = len(prompt.token_ids)
    assert sorted(result.prompt_logprobs) == list(range(1, length))
    for place, beginning in beginnings.items():
        expected = dict(zip(beginning.top_ids[0], beginning.top_logprobs[0], strict=True))
        logprob, top = result.prompt_logprobs[place]
        assert list(top.values()) == sorted(top.values(), reverse=True)
        likely = [token for token in expected if expected[token] > -5.0]
        for token in likely:
            assert top.get(token, -99.0) == pytest.approx(expected[token], abs=tolerance)
        token = prompt.token_ids[place]
        if token in top:
            assert logprob == top[token]
        else:
            assert logprob <= min(top.values())


def follow_beginnings(driver: Driver, prompt: Prompt, every: int) -> dict[int, Result]:
    places = range(1, len(prompt.token_ids), every)
    found = [driver.generate([greedy(list(prompt.token_ids[:at]), 1)])[0] for at in places]
    return dict(zip(places, found, strict=True))


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_scores_are_those_of_the_beginnings(
    tiny_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_scorer, "SCORED_AT_ONCE", 5)
    with running_driver(tiny_path) as driver:
        prompts = [make_prompt(driver, length, seed=length) for length in (30, 12)]
        unasked = make_prompt(driver, 20, seed=1)
        results = driver.generate(
            [scored(prompts[0]), unasked, scored(prompts[1])], Schedule(chunk_size=chunk_size)
        )
        assert results[1].prompt_logprobs == {}
        for prompt, result in zip(prompts, (results[0], results[2]), strict=True):
            check(prompt, result, follow_beginnings(driver, prompt, 1), tolerance=1e-4)
        # Whoever takes the row next has not asked.
        assert driver.generate([prompts[0]])[0].prompt_logprobs == {}


def test_a_preempted_sequence_is_scored_again_as_far_as_its_prompt(tiny_path: Path) -> None:
    with running_driver(tiny_path) as driver:
        prompt = scored(make_prompt(driver, 20, seed=3))
        (first,) = driver.generate([prompt])
        resumed = Prompt(
            token_ids=[*prompt.token_ids, *first.token_ids[:2]],
            sampling=prompt.sampling,
            num_output_tokens=2,
        )
        (again,) = driver.generate([resumed])
    assert again.prompt_logprobs.keys() == first.prompt_logprobs.keys()
    for place, (logprob, _) in first.prompt_logprobs.items():
        assert again.prompt_logprobs[place][0] == pytest.approx(logprob, abs=1e-4)


@pytest.mark.gpu
def test_scores_on_a_gpu(demo_model_path: Path) -> None:
    """Steps that score run eagerly among others that are replayed; a chunk ends where none
    samples, so that nothing but the scores comes back."""
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "activations": "f16"}
    with running_driver(demo_model_path, ("cuda:0",), **options) as driver:
        prompt = make_prompt(driver, 150, seed=2)
        others = [make_prompt(driver, 40, seed=seed) for seed in (5, 6)]
        results = driver.generate([*others, scored(prompt)], Schedule(chunk_size=50))
        check(prompt, results[2], follow_beginnings(driver, prompt, 15), tolerance=0.05)
        (alone,) = driver.generate([others[0]])
        assert results[0].logprobs[0] == pytest.approx(alone.logprobs[0], abs=0.05)
