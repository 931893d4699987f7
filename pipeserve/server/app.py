"""The aiohttp application and its runner, put together. Knows nothing of models or stages."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pipeserve.server import handlers
from pipeserve.server.connection import ConnectionLimits, ConnectionRunner
from pipeserve.server.metrics import Metrics
from pipeserve.server.middleware import add_request_id, make_middleware
from pipeserve.server.openapi import openapi_document
from pipeserve.server.options import LiveOptions
from pipeserve.server.state import AppState
from pipeserve.server.tracing import RequestTracer


def build_app(
    state: AppState, options: LiveOptions, tracer: RequestTracer | None = None
) -> web.Application:
    """The HTTP side; it answers from the start, with 503 until `state.ready` was called."""
    metrics = Metrics()
    # read_body keeps the limit, which a reload may change.
    middleware = make_middleware(metrics, options, tracer)
    app = web.Application(middlewares=[middleware], client_max_size=0)
    app[handlers.STATE] = state
    app[handlers.OPTIONS] = options
    app[handlers.METRICS] = metrics
    app[handlers.OPENAPI] = openapi_document()
    app.on_response_prepare.append(add_request_id)
    app.router.add_get("/v1/models", handlers.list_models)
    app.router.add_get("/v1/models/{model:.+}", handlers.get_model)
    app.router.add_post("/v1/chat/completions", handlers.chat_completions)
    app.router.add_post("/v1/completions", handlers.completions)
    app.router.add_post("/tokenize", handlers.tokenize_text)
    app.router.add_post("/detokenize", handlers.detokenize_tokens)
    app.router.add_post("/apply-template", handlers.render_template)
    app.router.add_get("/tokenizer_info", handlers.describe_tokenizer)
    app.router.add_get("/openapi.json", handlers.openapi)
    app.router.add_get("/health", handlers.health)
    app.router.add_get("/metrics", handlers.metrics)
    return app


def make_runner(
    app: web.Application, options: LiveOptions, *, shutdown_timeout_s: float = 5.0
) -> web.AppRunner:
    """shutdown_timeout_s: how long `cleanup` waits for handlers before it cancels them."""
    logger = logging.getLogger("pipeserve.http")
    logger.addFilter(_shorten_bad_http)
    return ConnectionRunner(
        app,
        ConnectionLimits(options),
        shutdown_timeout_s=shutdown_timeout_s,
        access_log=None,
        logger=logger,
    )


def _shorten_bad_http(record: logging.LogRecord) -> bool:
    """A client that does not speak HTTP gets one line in the log, not aiohttp's traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = None
        record.msg = f"{record.msg}: {type(error).__name__}"
    return True
