"""A service manager's notification socket: collects what a daemon tells it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class NotifySocket:
    """The messages so far, each as its assignments."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self.path = path
        self.messages: list[dict[str, str]] = []
        self._listener = listener

    def environ(self, **more: str) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), **more}

    def read(self) -> list[dict[str, str]]:
        """All messages up to now."""
        self._listener.setblocking(False)
        while True:
            try:
                lines = self._listener.recv(65536).decode().splitlines()
            except BlockingIOError:
                return self.messages
            self.messages.append(dict(line.split("=", 1) for line in lines))

    def until(
        self, holds: Callable[[dict[str, str]], bool], timeout_s: float = 60.0
    ) -> dict[str, str]:
        """The first message of which it holds."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            for message in self.read():
                if holds(message):
                    return message
            time.sleep(0.02)
        raise AssertionError(f"not told within {timeout_s} s: {self.messages}")

    def values(self, name: str) -> list[str]:
        """Of one assignment, in order."""
        return [message[name] for message in self.read() if name in message]


@contextmanager
def notify_socket(folder: Path) -> Iterator[NotifySocket]:
    path = folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        listener.bind(str(path))
        yield NotifySocket(listener, path)
