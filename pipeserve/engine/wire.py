"""Wire: messages between two processes, as frames on a socket; Outbox: a thread that sends them.

A frame is its length in 8 bytes and a pickled tuple of messages. Both ends are this program.
"""

from __future__ import annotations

import pickle
import queue
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_LENGTH = struct.Struct("<Q")
MAX_FRAME_BYTES = 1 << 30
"""Longer than anything that is ever sent: a header beyond it is not one."""


_UNREADABLE = (
    *(pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError),
    *(MemoryError, OverflowError, TypeError, ValueError),
)
"""What pickle.loads raises where the other end runs another version of this program."""


class WireError(ConnectionError):
    """What arrived is not a frame: the other end is not what it should be."""


class Wire:
    """One end of the connection; one thread may send while another receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = end.makefile("rb")

    def send(self, messages: Sequence[Any]) -> None:
        """Write one frame; blocks while the other end does not read.

        Raises:
            OSError: the other end is gone.
        """
        # 256 rows of token events take 10 us to pickle and 12 us to read: no format of our own.
        body = pickle.dumps(tuple(messages), protocol=5)
        assert len(body) <= MAX_FRAME_BYTES, f"a frame of {len(body)} bytes"
        self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> tuple[Any, ...] | None:
        """The messages of the next frame; None once the other end is gone.

        A frame that was cut off goes with the process that wrote it.

        Raises:
            WireError: what arrived is not a frame.
        """
        try:
            header = self._reader.read(_LENGTH.size)
            if len(header) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(header)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes was announced")
            body = self._reader.read(length)
        except ConnectionResetError:
            return None
        if len(body) < length:
            return None
        try:
            messages = pickle.loads(body)
        except _UNREADABLE as error:
            raise WireError(f"a frame cannot be read: {error!r}") from None
        if not isinstance(messages, tuple):
            raise WireError(f"a frame held a {type(messages).__name__}, not messages")
        return messages

    def close(self) -> None:
        """End the connection; a `receive` that waits in another thread returns None."""
        with suppress(OSError):  # the other end may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Outbox:
    """Sends what is put into it, from a thread of its own.

    What queues up while a frame is written goes into the next one together, so that a step's
    messages cost one write however many they are.
    """

    def __init__(self, wire: Wire, *, name: str) -> None:
        self._wire = wire
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Queue a message; returns at once, from any thread."""
        self._waiting.put(message)

    def close(self, timeout_s: float) -> bool:
        """Send what is queued, then end the thread. False if that takes too long."""
        self._waiting.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._is_closed:
                if messages := self._take():
                    self._wire.send(messages)
        except OSError:
            return  # the other end is gone, as whoever receives from it will hear

    def _take(self) -> list[Any]:
        """Wait for a message; return it with all that are queued behind it."""
        messages = [self._waiting.get()]
        while messages[-1] is not None and not self._waiting.empty():
            messages.append(self._waiting.get())
        if messages[-1] is None:
            self._is_closed = True
            messages.pop()
        return messages
