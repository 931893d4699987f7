"""Around every request: its id, errors as OpenAI's JSON, one log line when it ends.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import TYPE_CHECKING

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pipeserve.errors import PipeserveError
from pipeserve.server.metrics import Metrics
from pipeserve.server.options import LiveOptions
from pipeserve.server.record import CLIENT_DISCONNECTED, RequestRecord
from pipeserve.server.responses import ErrorReply, describe_error
from pipeserve.server.sse import EVENT_STREAM, EventStream, event
from pipeserve.server.tracing import RequestTracer

if TYPE_CHECKING:
    from opentelemetry.trace import Span

RECORD = web.RequestKey("record", RequestRecord)
REQUEST_ID_HEADER = "X-Request-Id"
OPEN_PATHS = ("/health", "/metrics")
"""Need no API key, and are too frequent for the log."""

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

log = structlog.get_logger()


def make_middleware(
    metrics: Metrics, options: LiveOptions, tracer: RequestTracer | None
) -> Middleware:
    """The one middleware of the application."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        record = RequestRecord(request_id=_request_id(request), metrics=metrics)
        request[RECORD] = record
        span = _begin_span(request, record, tracer)
        status: int | None = None
        try:
            response = await _answer(request, handler, record, options)
            status = response.status
            return response
        except (asyncio.CancelledError, ConnectionError):
            # A client that leaves has no transport any more; otherwise the daemon is stopping.
            is_gone = request.transport is None or request.transport.is_closing()
            record.error = CLIENT_DISCONNECTED if is_gone else "daemon stopped"
            raise
        finally:
            _finish(request, record, status)
            if tracer is not None and span is not None:
                tracer.request_ended(span, record, status=status)

    return middleware


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every response says which request it answers."""
    record = request.get(RECORD)
    if record is not None:
        response.headers[REQUEST_ID_HEADER] = record.request_id


async def _answer(
    request: web.Request, handler: Handler, record: RequestRecord, options: LiveOptions
) -> web.StreamResponse:
    try:
        if request.path not in OPEN_PATHS:
            record.key_label = options.keys.label_of(request.headers.get("Authorization"))
        return await handler(request)
    except web.HTTPException as error:
        reply = _describe_http_error(request, error, options)
    except PipeserveError as error:
        reply = describe_error(error)
    except web.RequestPayloadError as error:
        reply = ErrorReply(status=400, message=f"the body cannot be read: {error}")
    except ConnectionError:
        raise
    except Exception:
        log.exception("request failed", request_id=record.request_id)
        reply = ErrorReply(
            status=500,
            message=f"internal error; the log has it under request id {record.request_id}",
            kind="server_error",
        )
    # A refusal's message may quote the request, which must not reach the log.
    record.error = reply.message if reply.status >= 500 else reply.code or reply.kind
    return await _send_error(request, reply)


async def _send_error(request: web.Request, reply: ErrorReply) -> web.StreamResponse:
    stream: EventStream | None = request.get(EVENT_STREAM)
    if stream is not None and stream.has_started:
        return await stream.end([event(reply.to_json())])
    return web.json_response(text=reply.to_json(), status=reply.status, headers=reply.headers)


def _describe_http_error(
    request: web.Request, error: web.HTTPException, options: LiveOptions
) -> ErrorReply:
    """aiohttp's own refusals: no such route, wrong method, body too large."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return ErrorReply(
            status=error.status,
            message=f"{request.path} does not take {request.method}; use {allowed}",
            code="method_not_allowed",
            headers={"Allow": allowed},
        )
    if isinstance(error, web.HTTPNotFound):
        return ErrorReply(
            status=error.status,
            message=f"there is no {request.method} {request.path}; see /v1/models, "
            "/v1/chat/completions, /v1/completions, /health, /metrics, /openapi.json",
            code="unknown_url",
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return ErrorReply(
            status=error.status,
            message=f"the body is larger than {options.config.max_body_bytes:d} bytes; send less "
            "text, or raise max_body_bytes",
            code="body_too_large",
        )
    return ErrorReply(status=error.status, message=error.reason)


def _request_id(request: web.Request) -> str:
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _begin_span(
    request: web.Request, record: RequestRecord, tracer: RequestTracer | None
) -> Span | None:
    """None for polls and for what is served nowhere."""
    resource = request.match_info.route.resource
    if tracer is None or resource is None or request.path in OPEN_PATHS:
        return None
    # The name holds nothing of the request's own.
    name = f"{request.method} {resource.canonical}"
    return tracer.request_began(
        record, name=name, client_traceparent=request.headers.get("traceparent")
    )


def _finish(request: web.Request, record: RequestRecord, status: int | None) -> None:
    """Log line and metrics; status is None where no answer was completed."""
    if status is not None and status >= 400:
        record.metrics.request_refused(status)
    record.request_finished()
    resource = request.match_info.route.resource
    is_poll = request.path in OPEN_PATHS
    (log.debug if is_poll else log.info)(
        "request finished",
        method=request.method,
        route=request.rel_url.raw_path[:100] if resource is None else resource.canonical,
        status=status,
        **record.log_fields(),
    )
