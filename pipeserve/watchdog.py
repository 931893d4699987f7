"""Feeds systemd's watchdog as long as accepted work makes progress.

Runs on the event loop. That this loop runs is not enough: a stage may be stuck while it answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from pipeserve.engine.client import EngineClient
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import EngineError
from pipeserve.notify import ServiceNotifier
from pipeserve.server.state import AppState

ANSWER_TIMEOUT_S = 1.0
"""For the engine to say what it has done; one that does not has done nothing."""

log = structlog.get_logger()


class Watchdog:
    """Stops to feed once a sequence waits and no step has come back for stage_timeout_s: that is
    when the daemon itself gets rid of the engine, and where it cannot, systemd does so later, by
    WatchdogSec. Nothing to do is alive, as are loading and restarting."""

    def __init__(
        self,
        notifier: ServiceNotifier,
        state: AppState,
        *,
        stage_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notifier = notifier
        self._state = state
        self._patience_s = stage_timeout_s
        self._clock = clock
        self._progress: object = None
        self._progressed_at = clock()

    async def run(self) -> None:
        """Until it is cancelled; returns at once where nobody watches."""
        interval_s = self._notifier.watchdog_interval_s
        was_alive = True
        while interval_s is not None:
            is_alive = await self.check()
            if is_alive:
                self._notifier.feed_watchdog()
            elif was_alive:
                log.error("no progress, the watchdog is not fed", patience_s=self._patience_s)
            was_alive = is_alive
            await asyncio.sleep(interval_s)

    async def check(self) -> bool:
        """Whether work makes progress, or there is none."""
        services = self._state.services
        if services is None:
            return True
        progress = await self._measure(services.engine)
        if progress is None or progress != self._progress:
            self._progress = progress
            self._progressed_at = self._clock()
        is_late = self._clock() - self._progressed_at >= self._patience_s
        return not is_late and not services.text_pool.is_stuck

    async def _measure(self, engine: EngineClient) -> object:
        """Changes with every step that comes back; None where there is nothing to do."""
        if engine.failure is not None or engine.num_live == 0:
            return None
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                stats = await engine.stats()
        except (TimeoutError, EngineError):
            return self._progress or "no answer yet"
        return engine, _work_done(stats)


def _work_done(stats: EngineStats) -> tuple[object, ...]:
    return stats.num_prompt_tokens, stats.num_generated_tokens, stats.stage_busy_s
