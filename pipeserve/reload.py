"""Reloader: reads the options again while the daemon runs, on SIGHUP.

Runs on the event loop; files are read on threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from pipeserve.config import Config
from pipeserve.errors import PipeserveError
from pipeserve.log import configure_logging
from pipeserve.notify import ServiceNotifier
from pipeserve.server.api_keys import ApiKeys
from pipeserve.server.options import LiveOptions
from pipeserve.server.state import AppState

RELOADABLE = frozenset(
    {
        *("api_keys_file", "client_timeout_s", "drain_timeout_s", "log_level"),
        *("max_body_bytes", "max_connections", "max_queued_requests", "text_timeout_s"),
        *("max_queued_tokens", "request_timeout_s"),
    }
)
"""Options that a running daemon follows."""

log = structlog.get_logger()


class Reloader:
    """Puts new options in place of the old ones, all or none."""

    def __init__(
        self,
        options: LiveOptions,
        read_options: Callable[[], Config],
        state: AppState,
        notifier: ServiceNotifier,
    ) -> None:
        self._options = options
        self._read_options = read_options
        self._state = state
        self._notifier = notifier

    async def run(self, asked: asyncio.Event) -> None:
        """Reload whenever the event is set; until it is cancelled."""
        while True:
            await asked.wait()
            asked.clear()
            with self._notifier.reloading():
                try:
                    await self._reload()
                except Exception:  # the task's top: the next SIGHUP must still be heard
                    log.exception("reload failed, the options may be half in place")

    async def _reload(self) -> None:
        try:
            fresh = await asyncio.to_thread(self._read_options)
            keys = await asyncio.to_thread(ApiKeys.read, fresh.api_keys_file)
        except PipeserveError as error:
            log.error("reload failed, the options stay as they were", error=str(error))
            return
        config, need_restart = follow(self._options.config, fresh)
        configure_logging(level=config.log_level, log_format=config.log_format)
        self._options.replace(config, keys)
        if self._state.services is not None:
            self._state.services.engine.limit_queue(
                config.max_queued_requests, config.max_queued_tokens
            )
            self._state.services.engine.set_log_level(config.log_level)
        log.warning("reloaded", need_restart=need_restart)


def follow(now: Config, fresh: Config) -> tuple[Config, list[str]]:
    """The options that hold from now on, and the names of changed ones that need a restart."""
    changed = {name for name in Config.model_fields if getattr(now, name) != getattr(fresh, name)}
    values = {name: getattr(fresh, name) for name in changed & RELOADABLE}
    return now.model_copy(update=values), sorted(changed - RELOADABLE)
