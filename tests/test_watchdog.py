"""The watchdog: fed while work makes progress or there is none, not while a stage is stuck."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pipeserve.notify import ServiceNotifier
from pipeserve.server.state import AppState
from pipeserve.server.text_pool import TextPool
from pipeserve.watchdog import Watchdog
from tests.e2e.notify_socket import NotifySocket, notify_socket
from tests.server.conftest import make_services
from tests.server.fakes import ScriptedEngine, text_answer

PATIENCE_S = 10.0


class Watched:
    """A watchdog over a scripted engine, with a clock that the test moves."""

    def __init__(self, environ: dict[str, str] | None = None) -> None:
        self.now_s = 0.0
        self.engine = ScriptedEngine()
        self.engine.answer = text_answer("", ends=False)
        self.stats = self.engine._stats()
        self.pool = TextPool(1)
        self.state = AppState()
        self.watchdog = Watchdog(
            ServiceNotifier(environ or {}),
            self.state,
            stage_timeout_s=PATIENCE_S,
            clock=lambda: self.now_s,
        )

    async def after(self, seconds: float) -> bool:
        self.now_s += seconds
        return await self.watchdog.check()

    def step(self) -> None:
        """A step comes back from the stages."""
        self.stats = dataclasses.replace(self.stats, stage_busy_s=(self.now_s, self.now_s))
        self.engine.stats = self.stats

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """A sequence that gets no token while the context is open."""
        self.state.ready(make_services(self.engine, self.pool))
        from pipeserve.core.sampling import SamplingParams

        async with self.engine.client.generate((1,), SamplingParams(max_tokens=5, seed=0)):
            yield


async def test_nothing_to_do_is_alive() -> None:
    watched = Watched()
    assert await watched.after(1000)
    watched.state.ready(make_services(watched.engine, watched.pool))
    assert await watched.after(1000)
    assert await watched.after(1000)


async def test_steps_without_a_token_are_progress() -> None:
    watched = Watched()
    async with watched.working():
        for _ in range(5):
            watched.step()
            assert await watched.after(PATIENCE_S - 1)


async def test_a_stuck_stage_is_dead_though_the_engine_answers() -> None:
    watched = Watched()
    async with watched.working():
        watched.step()
        assert await watched.after(1000)  # patience starts with the first look at the work
        assert await watched.after(PATIENCE_S - 1)
        assert not await watched.after(1)
        assert not await watched.after(1000)
        watched.step()
        assert await watched.after(1)
    assert await watched.after(1000)


async def test_an_engine_that_answers_nothing_is_dead(monkeypatch: object) -> None:
    monkeypatch.setattr("pipeserve.watchdog.ANSWER_TIMEOUT_S", 0.01)  # type: ignore[attr-defined]
    watched = Watched()
    watched.engine.answers_stats = False
    async with watched.working():
        assert await watched.after(1)
        assert not await watched.after(PATIENCE_S)


async def test_an_engine_that_failed_is_the_daemons_own_affair() -> None:
    watched = Watched()
    async with watched.working():
        watched.step()
        assert await watched.after(1)
        watched.engine.fail("stage 0 raised")
        assert await watched.after(1000)


async def test_the_loop_runs_but_a_stuck_stage_is_not_fed(tmp_path: Path) -> None:
    with notify_socket(tmp_path) as notified:
        watched = Watched(notified.environ(WATCHDOG_USEC="20000"))
        async with watched.working(), asyncio.timeout(10):
            watched.step()
            run = asyncio.create_task(watched.watchdog.run())
            await _feedings(notified, 3)
            watched.now_s += PATIENCE_S
            await asyncio.sleep(0.05)
            notified.read()
            notified.messages.clear()
            await asyncio.sleep(0.2)  # ten times what systemd would wait
            assert notified.read() == []
            watched.step()
            await _feedings(notified, 2)
            run.cancel()


async def _feedings(notified: NotifySocket, number: int) -> None:
    while len([each for each in notified.read() if "WATCHDOG" in each]) < number:
        await asyncio.sleep(0.005)
