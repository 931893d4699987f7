"""Server-sent events: framing, and one socket write for everything that is ready.

Runs on the event loop. Knows the framing of text/event-stream, not what the events say.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import HttpVersion11, web

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the tokens back
}

DONE = b"data: [DONE]\n\n"


def event(data: str) -> bytes:
    """One event; data must be a single line, which JSON with ASCII escapes always is."""
    return f"data: {data}\n\n".encode()


class EventStream:
    """A response that starts with the first events, so that an error before them has a status."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=_HEADERS)
        if request.version >= HttpVersion11:
            self.response.enable_chunked_encoding()

    @property
    def has_started(self) -> bool:
        return self.response.prepared

    async def send(self, events: Sequence[bytes]) -> None:
        """Sends all events in one write; waits while the client reads too slowly.

        Raises:
            ConnectionError: the client is gone.
        """
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(b"".join(events))

    def send_now(self, events: Sequence[bytes]) -> bool:
        """Sends all events in one write; False where the next ones should be sent by `send`,
        since the client reads too slowly. Needs a `send` before it, which sends the headers.

        Raises:
            ConnectionError: the client is gone.
        """
        data = b"".join(events)
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        # aiohttp's own write is a coroutine, which costs as much as the write itself.
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.response.chunked else data)
        return not self._request.protocol.writing_paused

    async def end(self, events: Sequence[bytes]) -> web.StreamResponse:
        """Sends the last events and ends the response."""
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write_eof(b"".join(events))
        return self.response


EVENT_STREAM = web.RequestKey("event_stream", EventStream)
"""Where a request keeps its stream, so that an error can still be told on it."""
