"""Frames arrive whole or not at all, in order, whatever happens to the process that wrote them."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from pipeserve.engine.messages import Abort, Finish
from pipeserve.engine.wire import MAX_FRAME_BYTES, Outbox, Wire, WireError

FRAMES = ((Abort(seq_id=1), Finish(seq_id=2)), (Abort(seq_id=3),))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


class SlowWire(Wire):
    """Holds what it sends until the gate opens."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end)
        self.entered = threading.Event()
        self.gate = threading.Event()

    def send(self, messages: Sequence[Any]) -> None:
        self.entered.set()
        assert self.gate.wait(10)
        super().send(messages)


def frame(body: bytes) -> bytes:
    return struct.pack("<Q", len(body)) + body


def received(raw: bytes) -> list[object]:
    """What a Wire makes of these bytes and the end after them."""
    one, other = socket.socketpair()
    with one, other:
        one.sendall(raw)
        one.shutdown(socket.SHUT_WR)
        wire = Wire(other)
        frames: list[object] = []
        while (messages := wire.receive()) is not None:
            frames.append(messages)
        return frames


def test_cut_off_anywhere_only_whole_frames_arrive() -> None:
    raw = [frame(pickle.dumps(messages)) for messages in FRAMES]
    joined = b"".join(raw)
    for length in range(len(joined) + 1):
        num_whole = (length >= len(raw[0])) + (length == len(joined))
        assert received(joined[:length]) == list(FRAMES[:num_whole])


def test_a_frame_that_lacks_its_end_is_an_error_and_not_a_message() -> None:
    body = pickle.dumps(FRAMES[0])
    for length in range(len(body)):
        with pytest.raises(WireError):
            received(frame(body[:length]))


@pytest.mark.parametrize(
    "raw",
    [
        frame(pickle.dumps(["a list"])),
        frame(pickle.dumps(FRAMES[0]).replace(b"Abort", b"Abhor")),
        struct.pack("<Q", MAX_FRAME_BYTES + 1),
    ],
    ids=["not a tuple", "another version", "a header that is none"],
)
def test_what_is_not_a_frame_is_an_error(raw: bytes) -> None:
    with pytest.raises(WireError):
        received(raw)


def test_close_wakes_whoever_receives(ends: tuple[socket.socket, socket.socket]) -> None:
    wire = Wire(ends[0])
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(wire.receive()))
    reader.start()
    wire.close()
    reader.join(10)
    assert results == [None]


def test_what_queues_up_goes_in_one_frame(ends: tuple[socket.socket, socket.socket]) -> None:
    sending = SlowWire(ends[0])
    outbox = Outbox(sending, name="outbox")
    outbox.put("first")
    assert sending.entered.wait(10)
    for number in range(1000):
        outbox.put(number)
    sending.gate.set()
    receiving = Wire(ends[1])
    assert receiving.receive() == ("first",)
    assert receiving.receive() == tuple(range(1000))
    outbox.put("last words")
    assert outbox.close(10)
    assert receiving.receive() == ("last words",)


def test_an_outbox_ends_when_nobody_is_left_to_read(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    outbox = Outbox(Wire(ends[0]), name="outbox")
    ends[1].close()
    outbox.put("unheard")
    assert outbox.close(10)
