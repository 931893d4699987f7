"""Chains of samplers through the Sampler against one row in numpy, alone and among others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeserve.core.batch import RowStart, StepMasks
from pipeserve.core.constraint import num_words
from pipeserve.core.sampler_chain import (
    DEFAULT_ORDER,
    WHOLE_SEQUENCE,
    BreakerGroup,
    Dry,
    Mirostat,
    SamplerChain,
    SamplerName,
)
from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels.sampling_backend import REFERENCE
from pipeserve.runtime.sampler import Sampler
from tests.runtime.chain_by_hand import Mirostat2, sample_by_hand
from tests.runtime.test_sampler import PARAMETERS, params

VOCAB_SIZE = 300
PROMPT = [5, 7, 9, 5, 7, 11, 9, 5, 7]


def group(heads: list[int], tail: tuple[int, ...] = ()) -> BreakerGroup:
    return BreakerGroup(tail=tail, heads=np.array(heads, dtype=np.int32).tobytes())


DRY = Dry(multiplier=0.8, breakers=(group([11, 250]), group([9], (5, 7))))

CHAINS: dict[str, dict[str, object]] = {
    "typical": {"chain": SamplerChain(typical_p=0.6)},
    "top-n-sigma": {"chain": SamplerChain(top_n_sigma=1.5)},
    "xtc": {"chain": SamplerChain(xtc_probability=0.5, xtc_threshold=0.02)},
    "xtc of all": {"chain": SamplerChain(xtc_probability=0.3, xtc_threshold=0.0)},
    "xtc always": {"chain": SamplerChain(xtc_probability=1.0, xtc_threshold=0.05)},
    "dry": {"chain": SamplerChain(dry=replace(DRY, breakers=()))},
    "dry with breakers": {"temperature": 0.3, "chain": SamplerChain(dry=DRY)},
    "dry in a window": {"chain": SamplerChain(dry=replace(DRY, window=6, allowed_length=1))},
    "dynamic temperature": {
        "temperature": 0.7,
        "chain": SamplerChain(dynatemp_range=0.6, dynatemp_exponent=1.5),
    },
    "dynamic temperature from 0": {
        "temperature": 0.0,
        "chain": SamplerChain(dynatemp_range=0.9),
    },
    "window": {
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.3,
        "chain": SamplerChain(penalty_window=4),
    },
    "no window": {"presence_penalty": 2.0, "chain": SamplerChain(penalty_window=0)},
    "whole window": {
        "temperature": 0.0,
        "frequency_penalty": 1.0,
        "chain": SamplerChain(penalty_window=WHOLE_SEQUENCE),
    },
    "temperature first": {
        "temperature": 3.0,
        "top_p": 0.6,
        "top_k": 40,
        "chain": SamplerChain(
            order=(SamplerName.TEMPERATURE, SamplerName.TOP_P, SamplerName.TOP_K)
        ),
    },
    "temperature last": {"temperature": 3.0, "top_p": 0.6, "top_k": 40, "chain": SamplerChain()},
    "no sampler": {"temperature": 0.0, "top_k": 1, "chain": SamplerChain(order=())},
    "everything": {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.005,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "chain": SamplerChain(
            penalty_window=12,
            dry=DRY,
            top_n_sigma=2.5,
            typical_p=0.9,
            xtc_probability=0.4,
            xtc_threshold=0.1,
            dynatemp_range=0.3,
        ),
    },
}
MIROSTAT = {"temperature": 1.3, "chain": SamplerChain(mirostat=Mirostat(tau=1.0, eta=0.3))}


def start(
    row: int, sampling: SamplingParams, output: list[int] | None = None, seq_id: int = 0
) -> RowStart:
    return RowStart(
        row=row,
        sampling=sampling,
        token_ids=np.array(PROMPT + (output or []), dtype=np.int32),
        num_prompt_tokens=len(PROMPT),
        seq_id=seq_id,
    )


def make_sampler(num_rows: int = 40) -> Sampler:
    return Sampler(
        num_rows=num_rows,
        vocab_size=VOCAB_SIZE,
        device=torch.device("cpu"),
        backend=REFERENCE,
    )


def logits_of_step(step: int) -> torch.Tensor:
    """[1, V]: the prompt's tokens are likely, so that what looks back has effect."""
    logits = torch.randn((1, VOCAB_SIZE), generator=torch.Generator().manual_seed(step))
    logits[0, 5:12] += 3.5
    return logits


def run(sampler: Sampler, rows: list[int], num_steps: int, first: int = 0) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in rows]
    for step in range(first, first + num_steps):
        logits_SV = logits_of_step(step).expand(len(rows), -1).clone()
        before = logits_SV.clone()
        positions = np.full(len(rows), len(PROMPT) + step, dtype=np.int32)
        drawn = sampler.sample(logits_SV, np.array(rows, dtype=np.int32), positions)
        assert torch.equal(logits_SV, before)
        for output, token in zip(outputs, drawn.ids_S.tolist(), strict=True):
            output.append(token)
    return outputs


def masks_of(allowed: dict[int, list[int]]) -> StepMasks:
    """By the place of the row in the step."""
    bits = np.zeros((len(allowed), 32 * num_words(VOCAB_SIZE)), dtype=np.bool_)
    for row, ids in zip(bits, allowed.values(), strict=True):
        row[ids] = True
    return StepMasks(
        seqs_M=np.array(list(allowed), dtype=np.int32),
        words_MW=np.packbits(bits, axis=1, bitorder="little").view(np.int32),
    )


def run_by_hand(sampling: SamplingParams, num_steps: int) -> list[int]:
    output: list[int] = []
    for step in range(num_steps):
        logits = logits_of_step(step)[0].numpy()
        output.append(sample_by_hand(logits, sampling, PROMPT + output))
    return output


@pytest.mark.parametrize("name", CHAINS)
def test_each_chain_alone_equals_numpy(name: str) -> None:
    for seed in range(3):
        sampling = params(seed=seed, **CHAINS[name])
        sampler = make_sampler()
        sampler.start(start(3, sampling))
        assert run(sampler, [3], num_steps=15)[0] == run_by_hand(sampling, 15)


def test_every_sampler_changes_something() -> None:
    """Otherwise agreement would say nothing."""
    neutral = {
        "typical": SamplerChain(order=()),
        "top-n-sigma": SamplerChain(order=()),
        "xtc": SamplerChain(order=()),
        "dry": SamplerChain(),
        "dynamic temperature": SamplerChain(),
        "window": SamplerChain(penalty_window=0),
        "temperature first": SamplerChain(),
    }
    for name, chain in neutral.items():
        outputs = [
            [run_by_hand(params(seed=seed, **{**CHAINS[name], "chain": other}), 12)]
            for other in (chain, CHAINS[name]["chain"])
            for seed in range(5)
        ]
        assert outputs[:5] != outputs[5:], name


def test_all_chains_together_equal_each_alone() -> None:
    sampler = make_sampler()
    all_params = [params(seed=seed, **changes) for seed, changes in enumerate(CHAINS.values())]
    rows = [39 - index for index in range(len(all_params))]
    for row, sampling in zip(rows, all_params, strict=True):
        sampler.start(start(row, sampling))
    outputs = run(sampler, rows, num_steps=10)
    for name, sampling, output in zip(CHAINS, all_params, outputs, strict=True):
        assert output == run_by_hand(sampling, 10), name


def test_many_rows_of_one_kind_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeserve.runtime.chain_sampler._MOST_ELEMENTS", 3 * VOCAB_SIZE)
    sampler = make_sampler()
    all_params = [params(seed=seed, **CHAINS["everything"]) for seed in range(8)]
    for row, sampling in enumerate(all_params):
        sampler.start(start(row, sampling))
    outputs = run(sampler, list(range(8)), num_steps=6)
    assert outputs == [run_by_hand(sampling, 6) for sampling in all_params]


def test_plain_rows_draw_the_same_beside_chains() -> None:
    plain = [params(seed=seed, **changes) for seed, changes in enumerate(PARAMETERS.values())]
    alone, crowded = make_sampler(), make_sampler()
    for row, sampling in enumerate(plain):
        alone.start(start(row, sampling))
        crowded.start(start(row, sampling))
    for row, changes in enumerate(CHAINS.values(), start=len(plain)):
        crowded.start(start(row, params(seed=row, **changes)))
    rows = list(range(len(plain)))
    everyone = list(range(len(plain) + len(CHAINS)))
    expected = run(alone, rows, num_steps=8)
    assert run(crowded, everyone, num_steps=8)[: len(plain)] == expected


def test_mirostat_follows_the_surprise() -> None:
    sampling = params(seed=4, **MIROSTAT, presence_penalty=2.0, top_k=1)
    by_hand = Mirostat2(sampling)
    sampler = make_sampler()
    sampler.start(start(2, sampling))
    expected = [
        by_hand.sample(logits_of_step(step)[0].numpy(), len(PROMPT) + step) for step in range(40)
    ]
    assert run(sampler, [2], num_steps=40)[0] == expected
    fixed = Mirostat2(replace(sampling, chain=SamplerChain(mirostat=Mirostat(tau=1.0, eta=0.0))))
    assert expected != [
        fixed.sample(logits_of_step(step)[0].numpy(), len(PROMPT) + step) for step in range(40)
    ]


@pytest.mark.parametrize("name", [*CHAINS, "mirostat"])
@pytest.mark.parametrize("is_row_taken", [True, False])
def test_a_preempted_sequence_goes_on_as_if_never_stopped(name: str, is_row_taken: bool) -> None:
    """Also where a step was in flight, whose token is sampled again."""
    sampling = params(seed=5, **(MIROSTAT if name == "mirostat" else CHAINS[name]))
    whole_sampler, sampler = make_sampler(), make_sampler()
    whole_sampler.start(start(0, sampling))
    whole = run(whole_sampler, [0], num_steps=12)[0]
    sampler.start(start(2, sampling, seq_id=77))
    assert run(sampler, [2], num_steps=6)[0] == whole[:6]
    if is_row_taken:
        sampler.start(start(2, params(), seq_id=78))
    sampler.start(start(6, sampling, output=whole[:4], seq_id=77))
    assert run(sampler, [6], num_steps=8, first=4)[0] == whole[4:]


@pytest.mark.parametrize("retaken", [(), (2,), (6,), (2, 6)])
def test_a_sequence_may_be_preempted_again_and_again(retaken: tuple[int, ...]) -> None:
    """Rows that it has left, taken by others or not, say nothing of it any more."""
    sampling = params(seed=5, **MIROSTAT)
    whole_sampler, sampler = make_sampler(), make_sampler()
    whole_sampler.start(start(0, sampling))
    whole = run(whole_sampler, [0], num_steps=20)[0]
    sampler.start(start(2, sampling, seq_id=77))
    run(sampler, [2], num_steps=6)
    for row, length in ((6, 5), (7, 11)):
        sampler.start(start(row, sampling, output=whole[:length], seq_id=77))
        assert run(sampler, [row], num_steps=7, first=length)[0] == whole[length : length + 7]
    for row in retaken:
        sampler.start(start(row, params(**MIROSTAT), seq_id=100 + row))
    sampler.start(start(8, sampling, output=whole[:17], seq_id=77))
    assert run(sampler, [8], num_steps=3, first=17)[0] == whole[17:]


@pytest.mark.parametrize("name", [*CHAINS, "mirostat"])
def test_a_row_forgets_its_previous_sequence(name: str) -> None:
    sampling = params(seed=5, **(MIROSTAT if name == "mirostat" else CHAINS[name]))
    used, fresh = make_sampler(), make_sampler()
    used.start(start(1, params(**MIROSTAT), seq_id=1))
    run(used, [1], num_steps=3)
    used.start(start(1, params(**CHAINS["everything"]), output=[5, 7] * 20, seq_id=2))
    run(used, [1], num_steps=3, first=40)
    used.start(start(1, sampling, seq_id=3))
    fresh.start(start(1, sampling, seq_id=3))
    assert run(used, [1], num_steps=8) == run(fresh, [1], num_steps=8)
    used.start(start(1, params(seed=8), seq_id=4))
    fresh.start(start(1, params(seed=8), seq_id=4))
    assert run(used, [1], num_steps=3) == run(fresh, [1], num_steps=3)


def test_bias_comes_before_the_chain() -> None:
    sampler = make_sampler()
    sampling = params(temperature=0.0, logit_bias=((200, 50.0),), chain=SamplerChain())
    sampler.start(start(0, sampling))
    assert run(sampler, [0], num_steps=2) == [[200, 200]]


def test_chains_take_no_memory_before_they_are_used() -> None:
    sampler = make_sampler()
    sampler.start(start(0, params(top_p=0.5, presence_penalty=1.0)))
    assert sampler._chains is None


CHAIN_VALUES = st.builds(
    SamplerChain,
    order=st.permutations(DEFAULT_ORDER).map(tuple),
    penalty_window=st.integers(0, 12),
    dry=st.none()
    | st.builds(
        Dry,
        multiplier=st.floats(0.1, 2.0),
        base=st.floats(1.0, 2.0),
        allowed_length=st.integers(0, 4),
        window=st.integers(1, 40),
        breakers=st.sampled_from(
            [(), DRY.breakers, (group([6]), group([6, 7], (8,)), group([10], (5, 6, 5)))]
        ),
    ),
    top_n_sigma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    typical_p=st.floats(0.05, 1.0),
    xtc_probability=st.floats(0.0, 1.0),
    xtc_threshold=st.just(0.0) | st.floats(0.001, 0.5),
    dynatemp_range=st.sampled_from([0.0, 0.4, 2.0]),
    dynatemp_exponent=st.floats(0.3, 3.0),
)


@settings(max_examples=150, deadline=None)
@given(
    chain=CHAIN_VALUES,
    seed=st.integers(0, 2**63 - 1),
    tokens=st.lists(st.integers(5, 10), min_size=1, max_size=60),
    spread=st.floats(0.5, 6.0),
    plain=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
            "top_k": st.none() | st.integers(1, 320),
            "top_p": st.floats(0.05, 1.0),
            "min_p": st.sampled_from([0.0, 0.01, 0.2]),
            "repetition_penalty": st.floats(0.5, 2.0),
            "frequency_penalty": st.floats(-1.0, 1.0),
        }
    ),
    allowed=st.none() | st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40),
)
def test_any_chain_in_any_order_equals_numpy(
    chain: SamplerChain,
    seed: int,
    tokens: list[int],
    spread: float,
    plain: dict[str, object],
    allowed: set[int] | None,
) -> None:
    """Also where a mask allows few tokens."""
    sampling = params(seed=seed, chain=chain, **plain)
    logits = torch.randn((1, VOCAB_SIZE), generator=torch.Generator().manual_seed(seed)) * spread
    sampler = make_sampler(num_rows=1)
    ids = np.array(tokens, dtype=np.int32)
    sampler.start(RowStart(row=0, sampling=sampling, token_ids=ids, num_prompt_tokens=1))
    rows, positions = np.zeros(1, dtype=np.int32), np.array([len(tokens)], dtype=np.int32)
    masks = None if allowed is None else masks_of({0: sorted(allowed)})
    (token,) = sampler.sample(logits, rows, positions, masks).ids_S.tolist()
    if allowed is not None:
        assert token in allowed
        logits[0, [other for other in range(VOCAB_SIZE) if other not in allowed]] = -torch.inf
    assert token == sample_by_hand(logits[0].numpy(), sampling, tokens)
