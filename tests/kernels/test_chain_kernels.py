"""DRY's kernel and chains of samplers on the kernels, against the same on their twins."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

from pipeserve.kernels import dry, reference_dry, sampling, sampling_adjust, sampling_uniform
from pipeserve.kernels.sampling_backend import triton_sampling
from pipeserve.runtime.sampled import to_host
from pipeserve.runtime.sampler import Sampler, compile_kernels
from tests.kernels.test_sampler_kernels import syncs_forbidden
from tests.runtime.test_chain_sampler import (
    CHAINS,
    MIROSTAT,
    PROMPT,
    VOCAB_SIZE,
    logits_of_step,
    make_sampler,
    masks_of,
    run,
    start,
)
from tests.runtime.test_sampler import PARAMETERS, params

ALL_CHAINS = {**CHAINS, "mirostat": MIROSTAT}


def lengths_by_hand(recent: list[int], limit: int) -> list[int]:
    found = []
    for place in range(len(recent)):
        length = 0
        while (
            0 < place < len(recent) - length
            and length < limit
            and recent[length] == recent[place + length] >= 0
        ):
            length += 1
        found.append(length)
    return found


@pytest.mark.parametrize("width", [1, 2, 31, 300, 700])
def test_repeat_lengths(width: int, device: torch.device) -> None:
    generator = np.random.default_rng(width)
    rows = [
        generator.integers(0, 2, width),
        np.zeros(width, dtype=np.int64),
        np.tile([3, 1, 2], width)[:width],
        np.concatenate([generator.integers(0, 3, width // 2), np.full(width - width // 2, -1)]),
    ]
    limits = [width, min(width, 40), min(width, 7), 0]
    recent_EW = torch.tensor(np.stack(rows), dtype=torch.int32)
    limits_E = torch.tensor(limits, dtype=torch.int32)
    expected = [
        lengths_by_hand(row.tolist(), limit) for row, limit in zip(rows, limits, strict=True)
    ]
    assert reference_dry.repeat_lengths(recent_EW, limits_E).tolist() == expected
    ours = dry.repeat_lengths(recent_EW.to(device), limits_E.to(device))
    assert ours.tolist() == expected


def test_a_token_is_recorded_in_the_history(device: torch.device) -> None:
    history_RL = torch.zeros((4, 8), dtype=torch.int32, device=device)
    ids, rows, positions = ([7, 9, 11], [2, -1, 0], [5, 1, 3])
    sampling_adjust.record(
        torch.tensor(ids, device=device),
        torch.tensor(rows, device=device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        None,
        history_RL,
    )
    expected = torch.zeros_like(history_RL)
    expected[2, 5], expected[0, 3] = 7, 11
    assert torch.equal(history_RL, expected)


def sampler_on(device: torch.device, *, vocab_size: int = VOCAB_SIZE) -> Sampler:
    return Sampler(num_rows=40, vocab_size=vocab_size, device=device, backend=triton_sampling())


def test_chains_equal_the_twins(device: torch.device) -> None:
    ours, twin = sampler_on(device), make_sampler()
    for row, changes in enumerate(ALL_CHAINS.values()):
        for sampler in (ours, twin):
            sampler.start(start(row, params(seed=row, **changes), output=[5, 7, 9], seq_id=row))
    rows, num_steps = list(range(len(ALL_CHAINS))), 4
    expected = run(twin, rows, num_steps=num_steps, first=3)
    outputs: list[list[int]] = [[] for _ in rows]
    for step in range(3, 3 + num_steps):
        logits_SV = logits_of_step(step).expand(len(rows), -1).to(device, copy=True)
        positions = np.full(len(rows), len(PROMPT) + step, dtype=np.int32)
        drawn = ours.sample(logits_SV, np.array(rows, dtype=np.int32), positions)
        logits_SV.fill_(0.0)  # as the next replay of a graph overwrites them
        for output, token in zip(outputs, to_host(drawn).token_ids().tolist(), strict=True):
            output.append(token)
    assert outputs == expected


@pytest.mark.parametrize("backend", ["kernels", "twins"])
def test_no_chain_draws_what_a_mask_bans(backend: str, device: torch.device) -> None:
    """Every second row is masked to unlikely tokens; the others draw what they draw without."""
    masked, plain = (
        (sampler_on(device), sampler_on(device))
        if backend == "kernels"
        else (make_sampler(), make_sampler())
    )
    device = device if backend == "kernels" else torch.device("cpu")
    several = [*ALL_CHAINS.values()] * 2
    for row, changes in enumerate(several):
        for sampler in (masked, plain):
            sampler.start(start(row, params(seed=row, **changes), output=[5, 7], seq_id=row))
    rows = np.arange(len(several), dtype=np.int32)
    allowed = {row: [100 + row, 200 + row, 201 + row] for row in range(1, len(several), 2)}
    allowed[1] = [VOCAB_SIZE - 1]
    for step in range(2, 5):
        logits_SV = logits_of_step(step).expand(len(rows), -1).to(device, copy=True)
        positions = np.full_like(rows, len(PROMPT) + step)
        free = to_host(plain.sample(logits_SV, rows, positions)).token_ids()
        found = to_host(masked.sample(logits_SV, rows, positions, masks_of(allowed))).token_ids()
        assert (found[::2] == free[::2]).all()
        for row, ids in allowed.items():
            assert found[row] in ids


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL_CHAINS)
def test_the_host_waits_for_no_chain(name: str, device: torch.device) -> None:
    sampler, rows = sampler_on(device), np.arange(3, dtype=np.int32)
    sampling = params(**ALL_CHAINS[name])
    starts = [start(row, sampling, output=[5, 7], seq_id=row) for row in range(3)]
    for row_start in starts:  # the history grows and breakers are uploaded before
        sampler.start(row_start)
    for step, mode in ((2, nullcontext), (3, syncs_forbidden)):  # first it compiles
        logits_SV = logits_of_step(step).expand(3, -1).to(device, copy=True)
        torch.cuda.synchronize()
        with mode():
            for row_start in starts:
                sampler.start(row_start)
            sampled = to_host(sampler.sample(logits_SV, rows, np.full_like(rows, 11)))
    assert len(sampled.token_ids()) == 3


def num_compiled() -> int:
    modules = (dry, sampling, sampling_adjust, sampling_uniform)
    kernels = {case.kernel for module in modules for case in module.AOT_CASES}
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.gpu
def test_no_chain_is_compiled_after_compile_kernels(device: torch.device) -> None:
    vocab_size = 6_000  # of no other test
    compile_kernels(vocab_size=vocab_size, device=device, backend=triton_sampling())
    before = num_compiled()
    sampler = sampler_on(device, vocab_size=vocab_size)
    for num_rows in (1, 2, 7, len(ALL_CHAINS)):
        for row, changes in enumerate([*ALL_CHAINS.values()][:num_rows]):
            sampler.start(start(row, params(**changes), seq_id=row))
        rows = np.arange(num_rows, dtype=np.int32)
        logits_SV = torch.randn(num_rows, vocab_size, device=device)
        sampler.sample(logits_SV, rows, np.full_like(rows, len(PROMPT)))
    assert before > 0
    assert num_compiled() == before


@pytest.mark.gpu
def test_plain_rows_draw_the_same_beside_chains_of_a_large_vocabulary(
    device: torch.device,
) -> None:
    vocab_size, plain = 128_256, [*PARAMETERS.values()]
    everything = [*plain, *ALL_CHAINS.values()]
    logits_SV = torch.randn(len(everything), vocab_size, device=device) * 2
    sampler = sampler_on(device, vocab_size=vocab_size)
    tokens: list[list[list[int]]] = []
    for num_rows in (len(plain), len(everything)):
        for row, changes in enumerate(everything[:num_rows]):
            sampler.start(start(row, params(seed=row, **changes), seq_id=row))
        rows = np.arange(num_rows, dtype=np.int32)
        tokens.append([])
        for position in range(9, 13):
            drawn = sampler.sample(logits_SV[:num_rows], rows, np.full_like(rows, position))
            tokens[-1].append(drawn.ids_S[: len(plain)].tolist())
    assert tokens[0] == tokens[1]
