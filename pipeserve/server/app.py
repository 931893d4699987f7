"""The aiohttp application and its runner, put together. Knows nothing of models or stages."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pipeserve.config import Config
from pipeserve.server import handlers
from pipeserve.server.metrics import Metrics
from pipeserve.server.middleware import add_request_id, make_middleware
from pipeserve.server.state import AppState


def build_app(state: AppState, config: Config) -> web.Application:
    """The HTTP side; it answers from the start, with 503 until `state.ready` was called."""
    metrics = Metrics()
    app = web.Application(
        middlewares=[make_middleware(metrics)], client_max_size=int(config.max_body_bytes)
    )
    app[handlers.STATE] = state
    app[handlers.CONFIG] = config
    app[handlers.METRICS] = metrics
    app.on_response_prepare.append(add_request_id)
    app.router.add_get("/v1/models", handlers.list_models)
    app.router.add_get("/v1/models/{model:.+}", handlers.get_model)
    app.router.add_post("/v1/chat/completions", handlers.chat_completions)
    app.router.add_post("/v1/completions", handlers.completions)
    app.router.add_get("/health", handlers.health)
    app.router.add_get("/metrics", handlers.metrics)
    return app


def make_runner(app: web.Application, *, shutdown_timeout_s: float = 5.0) -> web.AppRunner:
    """A runner that cancels a handler when its client goes away, which aiohttp does not by default.

    shutdown_timeout_s: how long `cleanup` waits for handlers before it cancels them.
    """
    logger = logging.getLogger("pipeserve.http")
    logger.addFilter(_shorten_bad_http)
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=logger,
        shutdown_timeout=shutdown_timeout_s,
    )


def _shorten_bad_http(record: logging.LogRecord) -> bool:
    """A client that does not speak HTTP gets one line in the log, not aiohttp's traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = None
        record.msg = f"{record.msg}: {type(error).__name__}"
    return True
