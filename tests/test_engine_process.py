"""The engine in a process of its own: tokens come through, and every death is told at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pipeserve import engine_process
from pipeserve.config import Config
from pipeserve.core.loading import LoadEvent
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.client import EngineClient
from pipeserve.engine.messages import EngineMessage, Load
from pipeserve.engine_process import EngineProcess
from pipeserve.errors import EngineError, StageFailedError, UnsupportedModelError
from tests.fakes import expected_tokens
from tests.processes import is_running, python_path

FAKE_CHILD = Path(__file__).with_name("fake_engine_child.py")


Spawn = Callable[[str], EngineProcess]


@pytest.fixture
def spawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Spawn:
    """Makes an EngineProcess whose child does what the mode says."""
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.setattr(engine_process, "EXIT_TIMEOUT_S", 0.3)

    def start(mode: str) -> EngineProcess:
        command = [sys.executable, str(FAKE_CHILD), mode, mode, str(tmp_path / "marker")]
        monkeypatch.setattr(engine_process, "child_command", lambda: command)
        return EngineProcess(Load(config=Config(), model_path=Path("/m.gguf")))

    return start


@asynccontextmanager
async def connected(process: EngineProcess) -> AsyncIterator[EngineClient]:
    """A client of a loaded process, as the daemon makes it; both ended with the context."""
    loop = asyncio.get_running_loop()
    try:
        facts = await asyncio.to_thread(process.load, lambda event: None)
        client = EngineClient(facts=facts, post=process.post, max_queued_requests=100)

        def to_loop(messages: Sequence[EngineMessage]) -> None:
            for message in messages:
                loop.call_soon_threadsafe(client.deliver, message)

        process.start(to_loop)
        yield client
        client.shut_down()
    finally:
        await asyncio.to_thread(process.close, 2.0)
        assert not is_running(process.pid)


async def tokens(client: EngineClient, seed: int, max_tokens: int) -> list[int]:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
    async with client.generate((1, 2, seed), sampling) as generation:
        return [token.token_id async for tokens in generation for token in tokens]


async def test_every_sequence_gets_its_own_tokens(spawn: Spawn) -> None:
    async with connected(spawn("serve")) as client:
        jobs = [(seed, 1 + seed % 9) for seed in range(40)]
        results = await asyncio.gather(*(tokens(client, *job) for job in jobs))
        for (seed, max_tokens), result in zip(jobs, results, strict=True):
            sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
            assert result == expected_tokens((1, 2, seed), sampling)
        assert (await client.stats()).num_running == 0


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSEGV, "killed by SIGSEGV")],
)
async def test_a_death_fails_every_request_with_its_signal(
    spawn: Spawn, number: signal.Signals, message: str
) -> None:
    process = spawn("serve")
    async with connected(process) as client:
        running = [asyncio.create_task(tokens(client, seed, 900)) for seed in range(12)]
        await asyncio.sleep(0.1)
        os.kill(process.pid, number)
        async with asyncio.timeout(5):
            failures = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(failure, StageFailedError) for failure in failures)
        assert message in str(failures[0])
        with pytest.raises(StageFailedError):
            await client.stats()


async def test_an_engine_that_fails_as_soon_as_it_is_loaded_says_why(spawn: Spawn) -> None:
    async with connected(spawn("at-once")) as client, asyncio.timeout(10):
        assert str(await client.wait_failed()) == "stage 0 failed"


async def test_stop_signals_are_left_to_the_parent(spawn: Spawn) -> None:
    process = spawn("serve")
    os.kill(process.pid, signal.SIGINT)  # before it has ignored anything
    async with connected(process) as client:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
        assert len(await tokens(client, 1, 20)) == 20


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("unsupported", UnsupportedModelError, r"^/m.gguf: architecture 'gpt5' is not built in$"),
        ("bug", EngineError, r"RuntimeError\('told to fail'\)"),
        ("exit", StageFailedError, "ended with status 3 while it loaded the model"),
        ("crash", StageFailedError, "killed by SIGABRT while it loaded"),
        ("leave", StageFailedError, "broke its connection off and was killed"),
        ("rubbish", StageFailedError, "broke its connection off and was killed"),
    ],
)
def test_a_start_that_fails_says_why(
    spawn: Spawn, mode: str, kind: type[EngineError], message: str
) -> None:
    process = spawn(mode)
    events: list[LoadEvent] = []
    with pytest.raises(kind, match=message):
        process.load(events.append)
    process.close(0.0)
    assert len(events) == (mode in ("unsupported", "bug"))
    assert not is_running(process.pid)


async def test_a_load_that_is_broken_off_ends_at_once(spawn: Spawn) -> None:
    process = spawn("slow")
    loading = asyncio.create_task(asyncio.to_thread(process.load, lambda event: None))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(process.close, 60.0)
    with pytest.raises(StageFailedError):
        await loading
    assert not is_running(process.pid)


async def test_a_process_that_does_not_end_is_killed(spawn: Spawn) -> None:
    process = spawn("deaf")
    async with connected(process) as client:
        assert len(await tokens(client, 1, 3)) == 3
        client.shut_down()
        await asyncio.to_thread(process.close, 0.2)
        assert not is_running(process.pid)


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "child_command", lambda: ["/nowhere/python"])
    with pytest.raises(EngineError, match=r"cannot be started: .*/nowhere/python"):
        EngineProcess(Load(config=Config(), model_path=Path("/m.gguf")))
