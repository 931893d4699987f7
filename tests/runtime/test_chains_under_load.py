"""Chains of samplers in a whole pipeline: the same tokens alone, in a crowd and when preempted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.core.sampling import SamplingParams
from tests.models import tiny
from tests.runtime import random_load
from tests.runtime.driver import Prompt, Schedule, running_driver
from tests.runtime.random_load import Load, Phase, loaded_engine
from tests.runtime.test_chain_sampler import CHAINS, MIROSTAT
from tests.runtime.test_late_sampler import drawn_alone

ALL_CHAINS = [*CHAINS.values(), MIROSTAT]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chains") / "tiny.gguf"
    return tiny.write_gguf(path, tiny.random_llama(tiny.llama_config()))


def sampling(seed: int, **changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "seed": seed, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("samples_late", [False, True], ids=["in_step", "late"])
@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")], ids=len)
def test_alone_as_in_a_crowd(devices: tuple[str, ...], samples_late: bool, tiny_path: Path) -> None:
    rng = np.random.default_rng(1)
    crowd = [
        Prompt(
            token_ids=rng.integers(0, 12, 5 + index).tolist(),
            sampling=sampling(
                index, **(ALL_CHAINS[index // 2] if index % 4 in {1, 2} else {"top_p": 0.9})
            ),
        )
        for index in range(2 * len(ALL_CHAINS))
    ]
    with running_driver(
        tiny_path, devices, samples_late=samples_late, block_size=4, max_num_seqs=40
    ) as driver:
        together = driver.generate(crowd, Schedule(chunk_size=7))
        num_late = driver.num_late
        alone = [driver.generate([prompt])[0] for prompt in crowd]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert num_late == driver.num_late, "alone, all are sampled in the step"
    assert (num_late > len(crowd)) == samples_late


LOAD = Load(
    phases=[Phase(num_live=3, max_prompt=20), Phase(num_live=9, max_prompt=8, least_output=30)],
    events_per_phase=80,
    num_tokens=1200,
    max_output=36,
)
"""For six rows and too few blocks."""
TINY_BLOCKS: dict[str, object] = {
    "block_size": 4,
    "kv_cache_bytes": 26 * 2 * 4 * 2 * 8 * 4 * 2,  # 26 of the larger stage's two layers
    "max_num_batched_tokens": 24,
}
DEMO_BLOCKS: dict[str, object] = {
    "block_size": 8,
    "kv_cache_bytes": 16 * 8 * 2 * 3 * 30 * 128,  # 16 of 30 layers with 3 heads
    "max_num_batched_tokens": 512,
}


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences with every chain and without, of which many are preempted."""
    mix = [
        sampling(0, **changes)
        for chain in CHAINS.values()
        for changes in (chain, {}, MIROSTAT, MIROSTAT, {})
    ]
    monkeypatch.setattr(random_load, "MIX", tuple(mix))
    monkeypatch.setattr(random_load, "BACKGROUND", 0.5)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("samples_late", [False, True], ids=["in_step", "late"])
def test_preempted_sequences_get_the_same_tokens(samples_late: bool, tiny_path: Path) -> None:
    """The engine drops steps in flight and gives a sequence another row."""
    with loaded_engine(
        tiny_path,
        ("cpu", "cpu"),
        record_every=10_000,
        samples_late=samples_late,
        max_num_seqs=6,
        **TINY_BLOCKS,
    ) as loaded:
        served = loaded.run(LOAD)
        preempted = [s for s in served if len(s.admitted_lengths) > 1 and not s.is_aborted]
        assert (loaded.watched.num_late > 50) == samples_late
        under_load = [list(sequence.token_ids) for sequence in preempted]
        alone = [loaded.run_alone(sequence) for sequence in preempted]
    assert any(s.sampling.chain and s.sampling.chain.mirostat for s in preempted)
    assert sum(s.sampling.chain is not None for s in preempted) > 3
    differing = [
        (sequence.sampling, sequence.admitted_lengths, len(sequence.prompt), expected, found)
        for sequence, expected, found in zip(preempted, alone, under_load, strict=True)
        if expected != found
    ]
    assert differing == []


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    ("device_name", "blocks"),
    [
        ("cpu", TINY_BLOCKS),
        pytest.param("cuda:0", DEMO_BLOCKS, marks=[pytest.mark.gpu, pytest.mark.timeout(300)]),
    ],
    ids=["cpu", "cuda"],
)
def test_late_tokens_under_load_are_drawn_from_their_logits(
    device_name: str, blocks: dict[str, object], tiny_path: Path, request: pytest.FixtureRequest
) -> None:
    """On a GPU, where the logits of a row hang a little on how many others there are."""
    path = tiny_path if device_name == "cpu" else request.getfixturevalue("demo_model_path")
    device = torch.device(device_name)
    with loaded_engine(
        path,
        (device_name,),
        record_every=1,
        samples_late=True,
        max_num_seqs=6,
        **blocks,
    ) as loaded:
        served = [each for each in loaded.run(LOAD) if each.token_ids]
        assert loaded.watched.num_late > 50
    preempted = [each for each in served if len(each.admitted_lengths) > 1]
    assert any(each.sampling.chain for each in preempted)
    for each in served:
        first = len(each.prompt)
        logits = {(0, first + at): row_V for at, row_V in each.final_logits().items()}
        given = replace(each.sampling, max_tokens=len(each.token_ids))
        prompt = Prompt(token_ids=each.prompt, sampling=given)
        on_device = {place: row_V.to(device) for place, row_V in logits.items()}
        assert drawn_alone(prompt, 0, on_device, device) == each.token_ids, each.sampling
