"""Tells systemd how the service is doing: the datagrams of sd_notify(3), where it listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

SEND_TIMEOUT_S = 1.0


class ServiceNotifier:
    """Sends state to $NOTIFY_SOCKET; does nothing where that is not set."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the null byte of Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_us = int(environ.get("WATCHDOG_USEC", "0"))

    @property
    def watchdog_interval_s(self) -> float | None:
        """How often to call `feed_watchdog`: half of what systemd waits. None: no watchdog."""
        return self._watchdog_us / 2e6 or None

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def feed_watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A service manager that does not read or is gone must not hold the daemon up.
            sender.settimeout(SEND_TIMEOUT_S)
            with suppress(OSError):
                sender.connect(self._address)
                sender.sendall(state.encode())
