"""What the daemon hands to the HTTP side, and whether requests may use it yet.

Owned by the event loop. Knows neither HTTP nor how anything in here was built.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pipeserve.engine.client import EngineClient
from pipeserve.errors import NotReadyError, UnknownModelError
from pipeserve.server.model_facts import ModelFacts
from pipeserve.server.text_pool import TextPool
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.grammar import GrammarCompiler
from pipeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What clients may know of the model that is served."""

    name: str
    created: int
    """Unix time in seconds."""
    fingerprint: str
    """Changes whenever the same request might give another answer: model file, version, options."""
    facts: ModelFacts | None = None
    """Of the model file, where there is one."""

    def check_name(self, name: str) -> None:
        """Raises UnknownModelError where a client asks for another model."""
        if name != self.name:
            shown = name if len(name) <= 100 else f"{name[:97]}..."
            raise UnknownModelError(
                f"model {shown!r} is not served here; this daemon serves {self.name!r}",
                param="model",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """All that a request needs once the model is loaded."""

    engine: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    card: ModelCard
    grammars: GrammarCompiler
    """Finds out what answers can be held to before they are asked for."""
    text_pool: TextPool
    """Runs parsing, templates and tokenising, which would hold up the event loop."""


class Phase(enum.Enum):
    """Where the daemon stands; the value is the reason that /health gives."""

    LOADING = "loading"
    READY = "ready"
    DEGRADED = "degraded"
    UNLOADED = "unloaded"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether requests are taken, and a sentence for the person who asks why not."""

    phase: Phase
    detail: str

    @property
    def takes_requests(self) -> bool:
        """Also where the first request has to wait until the model is loaded again."""
        return self.phase in (Phase.READY, Phase.DEGRADED, Phase.UNLOADED)


class AppState:
    """Starts as loading; the daemon moves it on. Counts the generation requests in progress."""

    def __init__(self) -> None:
        self._readiness = Readiness(phase=Phase.LOADING, detail="the model is being loaded")
        self._services: Services | None = None
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._used_at = time.monotonic()
        self._wanted = asyncio.Event()
        """A request waits for a model that is unloaded."""
        self._moved = asyncio.Event()
        """Set, and replaced by another, whenever the daemon moves the state on."""

    def ready(self, services: Services) -> None:
        """From now on these take requests, unless the daemon was told to stop meanwhile."""
        self._services = services
        self._used_at = time.monotonic()
        if self._readiness.phase is not Phase.DRAINING:
            self._move_on(Phase.READY, f"serving {services.card.name}")

    def restart(self, detail: str) -> None:
        """The engine is gone and another is being started; `ready` ends that."""
        if self._readiness.phase is not Phase.DRAINING:
            self._move_on(Phase.RESTARTING, detail)

    def unload(self) -> None:
        """The engine is gone until a request wants it; `ready` ends that."""
        self._wanted.clear()
        if self._readiness.phase is not Phase.DRAINING:
            self._move_on(Phase.UNLOADED, "the model is unloaded; the next request loads it again")

    def fail(self, detail: str) -> None:
        """The engine is gone for good, and the daemon ends."""
        if self._readiness.phase is not Phase.DRAINING:
            self._move_on(Phase.FAILED, detail)

    def drain(self) -> None:
        """From now on new requests are refused; those in progress go on."""
        self._move_on(Phase.DRAINING, "the daemon is stopping and takes no new requests")

    def _move_on(self, phase: Phase, detail: str) -> None:
        self._readiness = Readiness(phase=phase, detail=detail)
        self._moved.set()
        self._moved = asyncio.Event()

    @property
    def readiness(self) -> Readiness:
        """An engine that died counts as failed until the daemon restarts it, one that misses a
        replica as degraded; text work that is stuck for good as failed."""
        phase = self._readiness.phase
        if self._services is None or phase in (Phase.RESTARTING, Phase.UNLOADED, Phase.FAILED):
            return self._readiness
        if self._services.text_pool.is_stuck:
            return Readiness(phase=Phase.FAILED, detail="no thread is left for templates and text")
        engine = self._services.engine
        if engine.failure is not None:
            return Readiness(phase=Phase.FAILED, detail=str(engine.failure))
        if engine.degradation is not None and phase is Phase.READY:
            return Readiness(phase=Phase.DEGRADED, detail=engine.degradation)
        return self._readiness

    @property
    def services(self) -> Services | None:
        """None while the model loads."""
        return self._services

    @property
    def num_requests(self) -> int:
        """Generation requests in progress."""
        return self._num_requests

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[Services]:
        """Counts one generation request in while the context is open; waits before that for a
        model that is unloaded.

        Raises:
            NotReadyError: loading, restarting, draining or failed.
        """
        self._num_requests += 1
        self._idle.clear()
        try:
            yield await self._usable_services()
        finally:
            self._num_requests -= 1
            self._used_at = time.monotonic()
            if self._num_requests == 0:
                self._idle.set()

    async def _usable_services(self) -> Services:
        while self._readiness.phase is Phase.UNLOADED:
            self._wanted.set()
            await self._moved.wait()
        readiness = self.readiness
        if not readiness.takes_requests or self._services is None:
            raise NotReadyError(f"{readiness.phase.value}: {readiness.detail}")
        return self._services

    async def wait_wanted(self) -> None:
        """Returns when a request waits for the unloaded model."""
        await self._wanted.wait()

    @property
    def unused_s(self) -> float:
        """Since when no generation request has been in progress."""
        return 0.0 if self._num_requests else time.monotonic() - self._used_at

    async def wait_unused(self, patience_s: float) -> None:
        """Returns when no generation request was in progress for so long."""
        while self.unused_s < patience_s:
            await self._idle.wait()
            await asyncio.sleep(max(0.0, patience_s - self.unused_s))

    async def wait_idle(self) -> None:
        """Returns when no generation request is in progress; for draining."""
        await self._idle.wait()
