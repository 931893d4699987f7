"""The daemon: builds every part, says when it is ready, drains and stops.

The composition root: the only place where the engine meets the runtime. Runs on the event loop;
loading runs on a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import uvloop
from aiohttp import web

from pipeserve import __version__
from pipeserve.config import Config
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.client import EngineClient
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import EngineMessage
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.hub import resolve_model
from pipeserve.notify import ServiceNotifier
from pipeserve.runtime.pipeline import Pipeline
from pipeserve.server.app import build_app, make_runner
from pipeserve.server.state import AppState, ModelCard, Services
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.tokenizer import Tokenizer

log = structlog.get_logger()

TEXT_THREADS = 2
"""Threads for templates and tokenising."""
STOP_TIMEOUT_S = 5.0
"""How long threads may take to end once nobody waits for their work."""
FAREWELL_S = 2.0
"""How long requests have to receive their errors after the engine died."""


def serve(config: Config) -> int:
    """Serve until a signal or a failure; returns the exit status.

    A thread that will not end (a stage blocked in a kernel, a download) ends with the process,
    which then ends at once, here.

    Raises:
        PipeserveError: the daemon could not start.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        exit_status = runner.run(Daemon(config).run())
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(max(0.0, deadline_s - time.monotonic()))
    if threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    return exit_status


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model file turned into running stages and the text side that goes with them."""

    pipeline: Pipeline
    inbox: Inbox
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    card: ModelCard


def load_model(config: Config, notifier: ServiceNotifier) -> LoadedModel:
    """Fetch, check and load the model; blocks for as long as that takes.

    Raises:
        PipeserveError: the model cannot be had or served, or options do not fit it.
    """
    path = resolve_model(config.model, cache_dir=config.cache_dir)
    log.info("loading", path=str(path))
    inbox: Inbox = queue.SimpleQueue()
    with GGUFFile.open(path) as gguf_file:
        tokenizer = Tokenizer.from_gguf(gguf_file)
        chat_template = ChatTemplate.from_gguf(gguf_file, tokenizer)
        pipeline = Pipeline.start(
            gguf_file,
            config,
            config.devices,
            post=inbox.put,
            on_progress=_progress_reporter(notifier),
        )
    return LoadedModel(
        pipeline=pipeline,
        inbox=inbox,
        tokenizer=tokenizer,
        chat_template=chat_template,
        card=_model_card(config, path),
    )


def _progress_reporter(notifier: ServiceNotifier) -> Callable[[int, int], None]:
    """Tells log and service manager of every tenth of the weights that was read."""
    last_percent = -1

    def report(num_read: int, num_bytes: int) -> None:
        nonlocal last_percent
        percent = 100 * num_read // max(1, num_bytes)
        if percent >= last_percent + 10 or (percent == 100 and last_percent < 100):
            last_percent = percent
            notifier.status(f"loading weights, {percent} %")
            log.info("loading weights", percent=percent)

    return report


def _model_card(config: Config, path: Path) -> ModelCard:
    """The name that clients use, and a fingerprint of what decides the answers."""
    is_name = path.suffix == ".gguf" and not config.model.endswith(".gguf")
    stem = path.stem.split("-00001-of-")[0]
    stat = path.stat()
    identity = f"{__version__} {path.name} {stat.st_size} {stat.st_mtime_ns}"
    return ModelCard(
        name=config.served_model_name or (config.model if is_name else stem),
        created=int(time.time()),
        fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12],
    )


class StopSignals:
    """SIGTERM and SIGINT: the first asks for an orderly stop, the second for an immediate one."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.asked_again = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._note)

    def _note(self) -> None:
        (self.asked_again if self.asked.is_set() else self.asked).set()


class Daemon:
    """One run of the daemon, from the open port to the exit status."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._notifier = ServiceNotifier()

    async def run(self) -> int:
        """Returns the exit status: 0 after a stop that was asked for, 1 after a failure."""
        started_s = time.monotonic()
        self._state = AppState()
        self._stop = StopSignals()
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        async with self._listening():
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(loader, load_model, self._config, self._notifier)
            loader.shutdown(wait=False)
            await _first(loading, self._stop.asked.wait())
            if not loading.done():
                log.info("stopped while loading")
                return 0
            return await self._serve_model(loading.result(), started_s)

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """The HTTP port is open, and /health answers, while the context is."""
        config = self._config
        runner = make_runner(build_app(self._state, config), shutdown_timeout_s=FAREWELL_S)
        await runner.setup()
        try:
            site = web.TCPSite(runner, config.host, config.port, backlog=1024)
            try:
                await site.start()
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
                    "change host or port"
                ) from None
            host, port = runner.addresses[0][:2]
            log.info("listening", url=f"http://{host}:{port}/v1")
            yield
        finally:
            await runner.cleanup()

    async def _serve_model(self, model: LoadedModel, started_s: float) -> int:
        config, loop = self._config, asyncio.get_running_loop()
        client = EngineClient(
            facts=model.pipeline.facts,
            post=model.inbox.put,
            max_queued_requests=config.max_queued_requests,
        )

        def to_loop(message: EngineMessage) -> None:
            loop.call_soon_threadsafe(client.deliver, message)

        engine = Engine(
            pipeline=model.pipeline,
            inbox=model.inbox,
            post=to_loop,
            stage_timeout_s=config.stage_timeout_s,
        )
        engine.start()
        text_executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        watchdog = asyncio.create_task(self._feed_watchdog(client))
        try:
            await _warm_up(client)
            self._announce(model, text_executor, client, started_s)
            return await self._until_stopped(client)
        finally:
            watchdog.cancel()
            client.shut_down()
            text_executor.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(_close, engine, model.pipeline)
            log.info("stopped")

    def _announce(
        self,
        model: LoadedModel,
        text_executor: ThreadPoolExecutor,
        client: EngineClient,
        started_s: float,
    ) -> None:
        self._state.ready(
            Services(
                engine=client,
                tokenizer=model.tokenizer,
                chat_template=model.chat_template,
                card=model.card,
                text_executor=text_executor,
            )
        )
        facts = client.facts
        log.info(
            "ready",
            model=model.card.name,
            stages=facts.num_stages,
            context_length=facts.context_length,
            kv_tokens=facts.num_blocks * facts.block_size,
            startup_s=round(time.monotonic() - started_s, 2),
        )
        self._notifier.ready(f"serving {model.card.name}")

    async def _until_stopped(self, client: EngineClient) -> int:
        await _first(self._stop.asked.wait(), client.wait_failed())
        if client.failure is None:
            await self._drain(client)
        if client.failure is None:
            return 0
        log.error("engine failed", error=str(client.failure))
        self._notifier.stopping(f"failed: {client.failure}")
        await _first(self._state.wait_idle(), asyncio.sleep(FAREWELL_S))
        return 1

    async def _drain(self, client: EngineClient) -> None:
        """Refuse new requests; wait for those in progress, within limits."""
        self._state.drain()
        self._notifier.stopping(f"draining {self._state.num_requests} requests")
        log.info("draining", requests=self._state.num_requests)
        await _first(
            self._state.wait_idle(),
            asyncio.sleep(self._config.drain_timeout_s),
            self._stop.asked_again.wait(),
            client.wait_failed(),
        )
        if self._state.num_requests:
            log.warning("requests cut off", requests=self._state.num_requests)

    async def _feed_watchdog(self, client: EngineClient) -> None:
        interval_s = self._notifier.watchdog_interval_s
        while interval_s is not None and client.failure is None:
            self._notifier.feed_watchdog()
            await asyncio.sleep(interval_s)


async def _warm_up(client: EngineClient) -> None:
    """One short generation through all stages, so that the first request pays for nothing."""
    sampling = SamplingParams(max_tokens=2, seed=0, temperature=0.0)
    async with client.generate((0,), sampling) as generation:
        async for _ in generation:
            pass


def _close(engine: Engine, pipeline: Pipeline) -> None:
    if not (engine.join(STOP_TIMEOUT_S) and pipeline.close(STOP_TIMEOUT_S)):
        log.error("a thread did not end", stages=pipeline.describe_stall())


async def _first(*waits: asyncio.Future[Any] | Coroutine[Any, Any, Any]) -> None:
    """Return when one of these is done; coroutines that are not are cancelled, futures kept."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
