"""Server-sent events: framing, and one socket write for everything that is ready.

Runs on the event loop. Knows the framing of text/event-stream, not what the events say.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

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

    @property
    def has_started(self) -> bool:
        return self.response.prepared

    async def send(self, events: Sequence[bytes]) -> None:
        """Sends all events in one write.

        Raises:
            ConnectionError: the client is gone.
        """
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(b"".join(events))

    async def end(self, events: Sequence[bytes]) -> web.StreamResponse:
        """Sends the last events and ends the response."""
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write_eof(b"".join(events))
        return self.response


EVENT_STREAM = web.RequestKey("event_stream", EventStream)
"""Where a request keeps its stream, so that an error can still be told on it."""
