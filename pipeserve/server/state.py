"""What the daemon hands to the HTTP side, and whether requests may use it yet.

Owned by the event loop. Knows neither HTTP nor how anything in here was built.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

from pipeserve.engine.client import EngineClient
from pipeserve.errors import NotReadyError, UnknownModelError
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What clients may know of the model that is served."""

    name: str
    created: int
    """Unix time in seconds."""
    fingerprint: str
    """Changes whenever the same request might give another answer: model file, version, options."""

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
    text_executor: Executor
    """Runs parsing, templates and tokenising, which would hold up the event loop."""


class Phase(enum.Enum):
    """Where the daemon stands; the value is the reason that /health gives."""

    LOADING = "loading"
    READY = "ready"
    DEGRADED = "degraded"
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
        return self.phase in (Phase.READY, Phase.DEGRADED)


class AppState:
    """Starts as loading; the daemon moves it on. Counts the generation requests in progress."""

    def __init__(self) -> None:
        self._readiness = Readiness(phase=Phase.LOADING, detail="the model is being loaded")
        self._services: Services | None = None
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def ready(self, services: Services) -> None:
        """From now on these take requests, unless the daemon was told to stop meanwhile."""
        self._services = services
        if self._readiness.phase is not Phase.DRAINING:
            self._readiness = Readiness(phase=Phase.READY, detail=f"serving {services.card.name}")

    def restart(self, detail: str) -> None:
        """The engine is gone and another is being started; `ready` ends that."""
        if self._readiness.phase is not Phase.DRAINING:
            self._readiness = Readiness(phase=Phase.RESTARTING, detail=detail)

    def drain(self) -> None:
        """From now on new requests are refused; those in progress go on."""
        self._readiness = Readiness(
            phase=Phase.DRAINING, detail="the daemon is stopping and takes no new requests"
        )

    @property
    def readiness(self) -> Readiness:
        """An engine that died counts as failed until the daemon restarts it, one that misses a
        replica as degraded."""
        phase = self._readiness.phase
        if self._services is None or phase is Phase.RESTARTING:
            return self._readiness
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

    @contextmanager
    def admit(self) -> Iterator[Services]:
        """Counts one generation request in while the context is open.

        Raises:
            NotReadyError: loading, restarting, draining or failed.
        """
        readiness = self.readiness
        if not readiness.takes_requests or self._services is None:
            raise NotReadyError(f"{readiness.phase.value}: {readiness.detail}")
        self._num_requests += 1
        self._idle.clear()
        try:
            yield self._services
        finally:
            self._num_requests -= 1
            if self._num_requests == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Returns when no generation request is in progress; for draining."""
        await self._idle.wait()
