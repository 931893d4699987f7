"""Replicas in processes of their own: one that dies or falls silent takes only its own requests
with it and comes back."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pipeserve import engine_process, replicated_engine, restarts
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.loading import LoadEvent, OnProgress, StageProgress
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.client import EngineClient
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import FrontMessage, Load, SurveyLayouts
from pipeserve.engine_host import Deliver, LayoutSurveyor
from pipeserve.engine_process import EngineProcess
from pipeserve.errors import StageFailedError, StageStalledError, UnsupportedModelError
from pipeserve.replicated_engine import ReplicatedEngine
from tests.fakes import FakePipeline, expected_tokens, facts
from tests.processes import is_running, python_path

FAKE_CHILD = Path(__file__).with_name("fake_engine_child.py")
LONG = 900
"""Tokens: 9 s at least."""

Make = Callable[..., ReplicatedEngine]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Makes replicas whose children do what `mode` says."""
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.setattr(engine_process, "EXIT_TIMEOUT_S", 0.3)

    def start(
        num_replicas: int = 2, *, mode: str = "serve", stage_timeout_s: float = 60.0
    ) -> ReplicatedEngine:
        set_mode(monkeypatch, tmp_path, mode)
        config = Config(processes="two", stage_timeout_s=stage_timeout_s)
        return ReplicatedEngine([Load(config=config, model_path=Path("/m.gguf"))] * num_replicas)

    return start


def set_mode(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str) -> None:
    """What children that are started from now on do."""
    command = [sys.executable, str(FAKE_CHILD), mode, mode, str(folder / "marker")]
    monkeypatch.setattr(engine_process, "child_command", lambda: command)


def pids(engine: ReplicatedEngine) -> list[int]:
    hosts = [each.host for each in engine._replicas]
    return [host.pid for host in hosts if isinstance(host, EngineProcess)]


@asynccontextmanager
async def connected(engine: ReplicatedEngine) -> AsyncIterator[EngineClient]:
    """A client of loaded replicas, as the daemon makes it; all ended with the context."""
    started = pids(engine)
    try:
        merged = await asyncio.to_thread(engine.load, lambda event: None)
        client = EngineClient(facts=merged, post=engine.post, max_queued_requests=100)
        engine.start(client.deliver)
        yield client
        engine.stop_watching()
        client.shut_down()
    finally:
        started += pids(engine)
        await asyncio.to_thread(engine.close, 2.0)
        assert not any(is_running(pid) for pid in started)


async def tokens(client: EngineClient, seed: int, max_tokens: int) -> list[int]:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
    async with client.generate((1, 2, seed), sampling) as generation:
        return [token.token_id async for tokens in generation for token in tokens]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not holds():
            await asyncio.sleep(0.02)


async def test_two_are_one_to_the_client(make: Make) -> None:
    async with connected(make()) as client:
        assert (client.facts.num_rows, client.facts.num_stages) == (16, 4)
        jobs = [(seed, 1 + seed % 9) for seed in range(40)]
        results = await asyncio.gather(*(tokens(client, *job) for job in jobs))
        for (seed, max_tokens), result in zip(jobs, results, strict=True):
            sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
            assert result == expected_tokens((1, 2, seed), sampling)
        stats = await client.stats()
        assert (stats.num_replicas, stats.num_live_replicas, stats.num_running) == (2, 2, 0)
        assert stats.num_generated_tokens == sum(max_tokens for _, max_tokens in jobs)
        assert all(busy_s > 0 for busy_s in stats.stage_busy_s)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (signal.SIGKILL, StageFailedError, "replica 0: .* killed by SIGKILL"),
        (signal.SIGSTOP, StageStalledError, "replica 0: the engine answered nothing for 2 s"),
    ],
)
async def test_a_death_takes_only_its_own_requests_and_ends_in_a_return(
    make: Make,
    number: signal.Signals,
    kind: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeserve.replicated_engine.CLOSE_TIMEOUT_S", 0.3)
    engine = make(stage_timeout_s=2.0)
    async with connected(engine) as client:
        first_pid = pids(engine)[0]
        running = [asyncio.create_task(tokens(client, seed, 250)) for seed in range(4)]
        await asyncio.sleep(0.2)
        os.kill(first_pid, number)
        await until(lambda: client.degradation is not None)
        assert "1 of 2 replicas take requests" in str(client.degradation)
        assert len(await tokens(client, 9, 3)) == 3  # by the other one
        results = await asyncio.gather(*running, return_exceptions=True)
        failed = [each for each in results if isinstance(each, BaseException)]
        assert len(failed) == 2
        for failure in failed:
            with pytest.raises(kind, match=message):
                raise failure
        assert [len(each) for each in results if isinstance(each, list)] == [250, 250]
        await until(lambda: client.degradation is None)
        assert client.failure is None
        assert pids(engine)[0] != first_pid
        await asyncio.gather(*(tokens(client, seed, 20) for seed in range(4)))
        assert (await client.stats()).num_live_replicas == 2


async def test_the_last_death_fails_the_engine(make: Make) -> None:
    engine = make()
    async with connected(engine) as client:
        running = [asyncio.create_task(tokens(client, seed, LONG)) for seed in range(4)]
        await asyncio.sleep(0.2)
        for pid in pids(engine):
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            failures = await asyncio.gather(*running, return_exceptions=True)
            assert all(isinstance(failure, StageFailedError) for failure in failures)
            assert "no replica is left" in str(await client.wait_failed())


async def test_one_that_fails_too_often_is_given_up(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(restarts, "MAX_FAILURES", 2)
    engine = make()
    async with connected(engine) as client:
        set_mode(monkeypatch, tmp_path, "unsupported")
        os.kill(pids(engine)[1], signal.SIGKILL)
        watch = engine._watches[1]
        await until(watch.done)
        assert watch.exception() is None
        assert client.degradation is not None
        assert len(await tokens(client, 1, 5)) == 5


class ThreadHost:
    """Stands for EngineThreads."""

    def __init__(self, fail_at_step: int | None) -> None:
        self._inbox: Inbox = queue.SimpleQueue()
        self._pipeline = FakePipeline(facts(), self._inbox.put, fail_at_step=fail_at_step)

    def load(self, on_progress: OnProgress) -> PipelineFacts:
        return self._pipeline.facts

    def start(self, deliver: Deliver) -> None:
        self._engine = Engine(
            pipeline=self._pipeline,
            inbox=self._inbox,
            post=lambda message: deliver((message,)),
            stage_timeout_s=60.0,
        )
        self._engine.start()

    def post(self, message: FrontMessage) -> None:
        self._inbox.put(message)

    def close(self, timeout_s: float) -> None:
        assert self._engine.join(timeout_s)
        assert self._pipeline.close(timeout_s)


async def test_in_one_process_a_failed_replica_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at_steps = [None, 5]
    monkeypatch.setattr(
        replicated_engine, "make_host", lambda order: ThreadHost(fail_at_steps.pop())
    )
    order = Load(config=Config(processes="one"), model_path=Path("/m.gguf"))
    engine = ReplicatedEngine([order, order])
    async with connected(engine) as client:
        with pytest.raises(StageFailedError, match=r"replica 0: stage 0 failed: .*told to fail"):
            await tokens(client, 1, 20)
        await until(engine._watches[0].done)
        assert "told to fail" in str(client.degradation)
        results = await asyncio.gather(*(tokens(client, seed, 20) for seed in range(12)))
        assert [len(result) for result in results] == [20] * 12


async def test_a_stop_while_one_restarts_ends_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make()
    async with connected(engine) as client:
        first_pid = pids(engine)[0]
        set_mode(monkeypatch, tmp_path, "slow")
        os.kill(first_pid, signal.SIGKILL)
        await until(lambda: pids(engine)[0] != first_pid)
        assert len(await tokens(client, 1, 5)) == 5


async def test_one_that_cannot_load_ends_the_load_of_all(make: Make) -> None:
    engine = make(mode="unsupported")
    started = pids(engine)
    with pytest.raises(UnsupportedModelError, match="architecture 'gpt5'"):
        await asyncio.to_thread(engine.load, lambda event: None)
    await asyncio.to_thread(engine.close, 0.0)
    assert not any(is_running(pid) for pid in started)


async def test_progress_counts_the_stages_of_all(make: Make) -> None:
    engine = make(3)
    events: list[LoadEvent] = []
    await asyncio.to_thread(engine.load, events.append)
    await asyncio.to_thread(engine.close, 0.0)
    shown = {(e.stage, e.num_stages) for e in events if isinstance(e, StageProgress)}
    assert shown == {(0, 3), (1, 3), (2, 3)}


async def test_devices_are_surveyed_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())
    set_mode(monkeypatch, tmp_path, "serve")
    order = SurveyLayouts(config=Config(processes="two"), model_path=Path("/m.gguf"))
    surveyor = LayoutSurveyor(order)
    survey = await asyncio.to_thread(surveyor.survey)
    await asyncio.to_thread(surveyor.close)
    assert survey.devices == ("cuda:0", "cuda:1")
    assert [each.num_replicas for each in survey.forecasts] == [1, 2]
