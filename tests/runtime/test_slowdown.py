"""A slowed stage computes the same and takes as much longer as was said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.runtime import slowdown
from pipeserve.runtime.memory import dearest_step
from pipeserve.runtime.slowdown import slow_down
from tests.models import tiny
from tests.runtime.driver import Prompt, running_driver

CPU = torch.device("cpu")


def make_facts() -> PipelineFacts:
    return PipelineFacts(
        num_stages=1,
        num_rows=4,
        num_blocks=8,
        block_size=16,
        context_length=64,
        max_batch_tokens=32,
        num_look_ahead=0,
        vocab_size=300,
    )


class Clock:
    """Stands for `time` in the module: a step of the runner advances it, as sleeping does."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


class Runner:
    """Takes 2 s."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def run(self, batch: MicroBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        self._clock.now_s += 2.0
        return torch.ones(3, 4)


@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_a_step_takes_the_factor_longer(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(slowdown, "time", clock)
    (runner,) = slow_down([Runner(clock)], [factor], [CPU])
    result = runner.run(dearest_step(make_facts(), num_chunks=1), None)
    assert isinstance(result, torch.Tensor)
    assert result.shape == (3, 4)
    assert clock.now_s == pytest.approx(2.0 * factor)


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(3)
    return [
        Prompt(
            token_ids=rng.integers(0, 300, 5 + 9 * index).tolist(),
            sampling=SamplingParams(max_tokens=12, seed=index),
        )
        for index in range(5)
    ]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slowdown") / "tiny.gguf"
    return tiny.write_gguf(path, tiny.random_llama(tiny.llama_config(num_hidden_layers=9)))


def test_mismatched_stages_compute_the_same(tiny_path: Path) -> None:
    """Eight stages, one slowed and one with little memory, whatever order they come in."""
    slowdowns = [1.0, 3.0, *[1.0] * 6]
    limits = (2**30,) * 5 + (12 * 2**20,) + (2**30,) * 2
    with running_driver(tiny_path, ("cpu",)) as driver:
        expected = [result.token_ids for result in driver.generate(prompts())]
    with running_driver(
        tiny_path,
        ("cpu",) * 8,
        slowdowns=slowdowns,
        memory_limit_bytes=limits,
        kv_cache_bytes=None,
    ) as driver:
        results = driver.generate(prompts())
        facts = driver.pipeline.facts
    assert [result.token_ids for result in results] == expected
    assert facts.num_stages == 8
    assert (driver.stage_busy_s > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_a_card_sleeps_by_what_its_steps_take(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda:0")
    left, right = (torch.randn(2048, 2048, device=device) for _ in range(2))

    class Product:
        def run(self, batch: MicroBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor:
            return left @ right

    batch = dearest_step(make_facts(), num_chunks=1)
    slowed = slowdown._SlowedGpu(Product(), factor, device)
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    results = [slowed.run(batch, None) for _ in range(6)]
    assert all(torch.equal(result, left @ right) for result in results)
    (measured_s,) = slowed._measured_s.values()
    assert len(measured_s) == 3, "later steps are not waited for"
    assert len(slept) == 6
    assert slept[-1] == int((factor - 1.0) * min(measured_s) * slowed._cycles_per_s) > 0
