"""The Sampler on the kernels against the Sampler on their twins, every parameter side by side."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.core.batch import StepLogprobs, StepMasks
from pipeserve.core.constraint import num_words
from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels import (
    sampling,
    sampling_adjust,
    sampling_filter,
    sampling_logprobs,
    sampling_mask,
    sampling_uniform,
)
from pipeserve.kernels.sampling_backend import REFERENCE, triton_sampling
from pipeserve.runtime.sampled import to_host
from pipeserve.runtime.sampler import Sampler, compile_kernels
from tests.runtime.test_sampler import PARAMETERS, PROMPT, VOCAB_SIZE, logits_of_step, params, start

CPU = torch.device("cpu")
NUM_ROWS = 20
MIXED = [
    params(seed=seed, **changes, num_logprobs=(None, 0, 3, None, 20)[seed % 5])
    for seed, changes in enumerate(PARAMETERS.values())
]


def sampler_on(device: torch.device, *, vocab_size: int = VOCAB_SIZE) -> Sampler:
    return Sampler(
        num_rows=NUM_ROWS, vocab_size=vocab_size, device=device, backend=triton_sampling()
    )


def twin_sampler() -> Sampler:
    return Sampler(num_rows=NUM_ROWS, vocab_size=VOCAB_SIZE, device=CPU, backend=REFERENCE)


def step(
    sampler: Sampler, logits_SV: Tensor, rows: list[int], position: int
) -> tuple[list[int], StepLogprobs | None]:
    drawn = sampler.sample(
        logits_SV,
        np.array(rows, dtype=np.int32),
        np.full(len(rows), position, dtype=np.int32),
    )
    logits_SV.fill_(0.0)  # as the next replay of a graph overwrites them
    sampled = to_host(drawn)
    return sampled.token_ids().tolist(), sampled.step_logprobs()


def assert_agree(
    device: torch.device, all_params: list[SamplingParams], *, num_steps: int, output: list[int]
) -> None:
    """The same tokens and log-probabilities from the kernels as from their twins."""
    ours, twin = sampler_on(device), twin_sampler()
    rows = [NUM_ROWS - 1 - index for index in range(len(all_params))]
    for row, sampling_params in zip(rows, all_params, strict=True):
        for sampler in (ours, twin):
            # What the row's previous sequence leaves behind must not be seen.
            sampler.start(start(row, params(presence_penalty=2.0, logit_bias=((2, 9.0),)), [1, 4]))
            sampler.start(start(row, sampling_params, output))
    for index in range(num_steps):
        logits_SV = logits_of_step(index, len(rows))
        position = len(PROMPT) + len(output) + index
        found, logprobs = step(ours, logits_SV.to(device, copy=True), rows, position)
        expected, expected_logprobs = step(twin, logits_SV, rows, position)
        assert found == expected
        assert (logprobs is None) == (expected_logprobs is None)
        if logprobs is not None and expected_logprobs is not None:
            np.testing.assert_allclose(logprobs.token_S, expected_logprobs.token_S, atol=1e-5)
            np.testing.assert_allclose(logprobs.top_SK, expected_logprobs.top_SK, atol=1e-5)
            np.testing.assert_array_equal(logprobs.top_ids_SK, expected_logprobs.top_ids_SK)


def test_mixed_steps_equal_the_twins(device: torch.device) -> None:
    assert_agree(device, MIXED, num_steps=5, output=[])


def test_resumed_sequences_equal_the_twins(device: torch.device) -> None:
    assert_agree(device, MIXED, num_steps=2, output=[3, 17, 3])


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_alone_equals_the_twin(name: str, device: torch.device) -> None:
    alike = [params(seed=seed, **PARAMETERS[name]) for seed in range(3)]
    assert_agree(device, alike, num_steps=4, output=[])


@pytest.mark.gpu
def test_a_row_draws_the_same_whatever_its_neighbours_need(device: torch.device) -> None:
    vocab_size, num_plain = 128_256, 60
    logits_SV = torch.randn(num_plain + len(MIXED), vocab_size, device=device) * 2
    sampler = Sampler(
        num_rows=len(logits_SV), vocab_size=vocab_size, device=device, backend=triton_sampling()
    )
    for row in range(num_plain):
        sampler.start(start(row, params(seed=row, temperature=0.5 * (row % 4))))
    for index, sampling_params in enumerate(MIXED):
        sampler.start(start(num_plain + index, sampling_params))
    for position in range(4, 12):
        plain, everything = list(range(num_plain)), list(range(len(logits_SV)))
        alone, _ = step(sampler, logits_SV[:num_plain].clone(), plain, position)
        crowded, _ = step(sampler, logits_SV.clone(), everything, position)
        assert crowded[:num_plain] == alone


@contextmanager
def syncs_forbidden() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("names", [("greedy",), ("plain",), tuple(PARAMETERS)], ids=len)
def test_the_host_waits_for_nothing(names: tuple[str, ...], device: torch.device) -> None:
    sampler, rows = sampler_on(device), np.arange(len(names), dtype=np.int32)
    starts = [
        start(row, params(**PARAMETERS[name], num_logprobs=2 if row else None), [3, 3])
        for row, name in enumerate(names)
    ]
    masks = StepMasks(seqs_M=rows[:1], words_MW=np.full((1, num_words(VOCAB_SIZE)), -1, np.int32))
    for position, mode in ((6, nullcontext), (7, syncs_forbidden)):  # first it compiles
        logits_SV = logits_of_step(position, len(names)).to(device)
        torch.cuda.synchronize()
        with mode():
            for row_start in starts:
                sampler.start(row_start)
            sampled = to_host(sampler.sample(logits_SV, rows, np.full_like(rows, position), masks))
    assert len(sampled.token_ids()) == len(names)


def num_compiled() -> int:
    """Kernels of sampling that this process holds compiled."""
    modules = (
        *(sampling, sampling_adjust, sampling_filter, sampling_logprobs, sampling_mask),
        sampling_uniform,
    )
    kernels = {case.kernel for module in modules for case in module.AOT_CASES}
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.gpu
def test_nothing_is_compiled_after_compile_kernels(device: torch.device) -> None:
    vocab_size = 5_000  # of no other test
    compile_kernels(vocab_size=vocab_size, device=device, backend=triton_sampling())
    before = num_compiled()
    sampler = sampler_on(device, vocab_size=vocab_size)
    for num_rows in (1, 2, 7, len(MIXED)):
        for row, sampling_params in enumerate(MIXED[:num_rows]):
            sampler.start(start(row, sampling_params))
        logits_SV = torch.randn(num_rows, vocab_size, device=device)
        rows = np.arange(num_rows, dtype=np.int32)
        words_MW = np.full((num_rows, num_words(vocab_size)), -1, dtype=np.int32)
        masks = StepMasks(seqs_M=rows, words_MW=words_MW)
        sampler.sample(logits_SV, rows, np.full_like(rows, 4), masks)
        step(sampler, logits_SV, rows.tolist(), 4)
    assert before > 0
    assert num_compiled() == before
