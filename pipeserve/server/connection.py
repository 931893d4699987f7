"""One HTTP connection: how long a client may hold it up, how many there may be, and what a client
that does not speak HTTP is told.

Runs on the event loop; aiohttp's own protocol does the rest.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from pipeserve.server.options import LiveOptions
from pipeserve.server.responses import ErrorReply


class ConnectionLimits:
    """What all connections share: the options, and how many there are."""

    def __init__(self, options: LiveOptions) -> None:
        self.options = options
        self.num_open = 0

    @property
    def patience_s(self) -> float:
        return self.options.config.client_timeout_s

    @property
    def is_full(self) -> bool:
        return self.num_open >= self.options.config.max_connections


class Connection(RequestHandler):
    """Is cut off when the client leaves it without a whole request head, or does not read its
    answer, for client_timeout_s."""

    __slots__ = ("_is_counted", "_limits", "_reading_deadline")

    def __init__(self, server: web.Server, limits: ConnectionLimits, **arguments: Any) -> None:
        # aiohttp counts keep-alive from the connection's start, and a request that is not
        # complete by then does not stop it: that is the limit on the head.
        super().__init__(server, keepalive_timeout=limits.patience_s, **arguments)
        self._limits = limits
        self._is_counted = False
        self._reading_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._limits.is_full:
            assert isinstance(transport, asyncio.WriteTransport), "sockets are written to"
            transport.abort()
            return
        self._limits.num_open += 1
        self._is_counted = True
        super().connection_made(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        if self._is_counted:
            self._limits.num_open -= 1
            self._is_counted = False
        self._end_wait()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        """The client has not read what fills the socket's buffers."""
        super().pause_writing()
        self._await_reading()

    def _await_reading(self) -> None:
        num_unread = self._num_unread
        self._reading_deadline = self._loop.call_later(
            self._limits.patience_s, self._check_reading, num_unread
        )

    def resume_writing(self) -> None:
        self._end_wait()
        super().resume_writing()

    def _end_wait(self) -> None:
        if self._reading_deadline is not None:
            self._reading_deadline.cancel()
            self._reading_deadline = None

    @property
    def _num_unread(self) -> int:
        assert isinstance(self.transport, asyncio.WriteTransport), "sockets are written to"
        return self.transport.get_write_buffer_size()

    def _check_reading(self, num_unread: int) -> None:
        """Cut off who has read nothing since; a slow reader of a long answer may go on."""
        if self.transport is None:
            return
        if self._num_unread < num_unread:
            self._await_reading()
        else:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """OpenAI's JSON for what is not even a request, in place of aiohttp's plain text."""
        self.logger.warning("no HTTP request could be read: %s", type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("half an answer was sent already")
        # The lines after the first show the client's bytes.
        problem = (message or "it cannot be read").splitlines()[0].rstrip(": ")
        reply = ErrorReply(
            status=status,
            message=f"this is not a valid HTTP request: {problem}",
            code="bad_http",
        )
        response = web.json_response(text=reply.to_json(), status=status)
        response.force_close()
        return response


class ConnectionServer(web.Server):
    """aiohttp's server with connections of the kind above."""

    def __init__(self, server: web.Server, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
        )
        self._limits = limits
        self._arguments = arguments

    def __call__(self) -> RequestHandler:
        return Connection(self, self._limits, loop=self._loop, **self._arguments)


class ConnectionRunner(web.AppRunner):
    """A runner that cancels a handler when its client goes away, which aiohttp does not by
    default."""

    __slots__ = ("_arguments", "_limits")

    def __init__(
        self,
        app: web.Application,
        limits: ConnectionLimits,
        *,
        shutdown_timeout_s: float,
        **arguments: Any,
    ) -> None:
        """arguments: of aiohttp's protocol."""
        super().__init__(app, handler_cancellation=True, shutdown_timeout=shutdown_timeout_s)
        self._limits = limits
        self._arguments = arguments

    async def _make_server(self) -> web.Server:
        return ConnectionServer(await super()._make_server(), self._limits, **self._arguments)
