"""Talks with systemd: the datagrams of sd_notify(3), and the sockets of sd_listen_fds(3)."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager, suppress

SEND_TIMEOUT_S = 1.0
EXTEND_EVERY_S = 10.0
EXTEND_BY_S = 60.0
FIRST_INHERITED_FD = 3
"""SD_LISTEN_FDS_START."""


class ServiceNotifier:
    """Sends state to $NOTIFY_SOCKET; does nothing where that is not set."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the null byte of Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        is_watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog_us = int(environ.get("WATCHDOG_USEC", "0")) if is_watched else 0
        self._status = ""
        self._is_ready = False

    @property
    def watchdog_interval_s(self) -> float | None:
        """How often to call `feed_watchdog`: half of what systemd waits. None: no watchdog."""
        return self._watchdog_us / 2e6 or None

    def ready(self, status: str) -> None:
        self._is_ready = True
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._status = status
        self._send(f"STATUS={status}")

    @asynccontextmanager
    async def extending_timeout(self) -> AsyncIterator[None]:
        """Ask for more time to start as long as the context is open and the event loop runs."""

        async def extend() -> None:
            while True:
                self._send(f"EXTEND_TIMEOUT_USEC={EXTEND_BY_S * 1e6:.0f}")
                await asyncio.sleep(EXTEND_EVERY_S)

        task = asyncio.create_task(extend())
        try:
            yield
        finally:
            task.cancel()

    def feed_watchdog(self) -> None:
        self._send("WATCHDOG=1")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """While the context is open; not told before the first `ready`, which it would end."""
        status, was_ready = self._status, self._is_ready
        if was_ready:
            now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self._send(f"RELOADING=1\nMONOTONIC_USEC={now_us}\nSTATUS=reloading the options")
        try:
            yield
        finally:
            if was_ready:
                self.ready(status)

    def stopping(self, status: str, *, within_s: float) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}\nEXTEND_TIMEOUT_USEC={within_s * 1e6:.0f}")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A service manager that does not read or is gone must not hold the daemon up.
            sender.settimeout(SEND_TIMEOUT_S)
            with suppress(OSError):
                sender.connect(self._address)
                sender.sendall(state.encode())


def take_inherited_sockets(
    environ: MutableMapping[str, str] = os.environ,
) -> list[socket.socket]:
    """The listening sockets that systemd's socket unit holds for this process; taken once, so
    that no child takes them for its own."""
    num_sockets, pid = environ.pop("LISTEN_FDS", "0"), environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    numbers = range(FIRST_INHERITED_FD, FIRST_INHERITED_FD + int(num_sockets))
    for number in numbers:
        os.set_inheritable(number, False)
    return [socket.socket(fileno=number) for number in numbers]
