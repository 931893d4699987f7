"""Ports: where the daemon listens, on a port of its own or on sockets of the service manager.

Runs on the event loop.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import structlog
from aiohttp import web

from pipeserve.errors import ConfigError

BACKLOG = 1024
"""Connections that wait to be taken."""

log = structlog.get_logger()


class Ports:
    """A port of its own is open from the start, to say why there is no answer yet. What reaches an
    inherited socket waits there instead, before the model is loaded and after a stop, when the
    next daemon takes it."""

    def __init__(self, runner: web.AppRunner, inherited: Sequence[socket.socket]) -> None:
        self._runner = runner
        self._waiting = [web.SockSite(runner, held, backlog=BACKLOG) for held in inherited]
        self._taken: list[web.SockSite] = []
        for held in inherited:
            log.info("listening", socket=_describe(held))

    async def open_own(self, host: str, port: int) -> None:
        """Unless there are inherited ones.

        Raises:
            ConfigError: it cannot be had.
        """
        if self._waiting:
            return
        try:
            await web.TCPSite(self._runner, host, port, backlog=BACKLOG).start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; change host or port"
            ) from None
        host, port = self._runner.addresses[0][:2]
        log.info("listening", url=f"http://{host}:{port}/v1")

    async def take_inherited(self) -> None:
        """From now on, what waits there is answered."""
        while self._waiting:
            site = self._waiting.pop()
            await site.start()
            self._taken.append(site)

    async def leave_inherited(self) -> None:
        """From now on, what comes there waits."""
        while self._taken:
            await self._taken.pop().stop()


def _describe(held: socket.socket) -> str:
    address = held.getsockname()
    return address if isinstance(address, str) else "{}:{}".format(*address[:2])
