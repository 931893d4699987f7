"""The daemon: builds every part, says when it is ready, drains and stops.

Runs on the event loop; loading runs on threads. Has no torch: the engine half, in this process or
beside it, brings its own.
"""

from __future__ import annotations

import asyncio
import enum
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from typing import Any, TypeVar

import structlog
import uvloop

from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.client import EngineClient
from pipeserve.engine.messages import Load, SurveyLayouts
from pipeserve.engine_host import LayoutSurveyor, may_have_several_gpus, takes_two_processes
from pipeserve.errors import PipeserveError
from pipeserve.layout import choose_layout, needs_survey
from pipeserve.notify import ServiceNotifier, take_inherited_sockets
from pipeserve.ports import Ports
from pipeserve.progress import report_progress
from pipeserve.reload import Reloader
from pipeserve.replicated_engine import ReplicatedEngine
from pipeserve.restarts import Restarts
from pipeserve.served_model import ServedModel, fetch_model
from pipeserve.server.api_keys import ApiKeys
from pipeserve.server.app import build_app, make_runner
from pipeserve.server.options import LiveOptions
from pipeserve.server.state import AppState, Services
from pipeserve.server.text_pool import TextPool
from pipeserve.server.tracing import RequestTracer
from pipeserve.signals import Signals
from pipeserve.watchdog import Watchdog

log = structlog.get_logger()

T = TypeVar("T")

TEXT_THREADS = 2
"""Threads for templates and tokenising."""
STOP_TIMEOUT_S = 5.0
"""How long threads and the engine may take to end once nobody waits for their work."""
TRACES_TIMEOUT_S = 2.0
"""How long the collector may take for the last traces."""
FAREWELL_S = 2.0
"""How long requests have to receive their errors after the engine died."""


class _End(enum.Enum):
    """Why an engine ended that did not fail."""

    STOPPED = enum.auto()
    UNUSED = enum.auto()


def serve(config: Config, read_options: Callable[[], Config]) -> int:
    """Serve until a signal or a failure; returns the exit status.

    A thread that will not end (a stage blocked in a kernel, a download) ends with the process,
    which then ends at once, here. read_options reads the configuration again, on SIGHUP.

    Raises:
        PipeserveError: the daemon could not start.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        daemon = Daemon(config, read_options)
        exit_status = runner.run(daemon.run())
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread not in daemon.abandoned:
            thread.join(max(0.0, deadline_s - time.monotonic()))
    if threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    return exit_status


class Daemon:
    """One run of the daemon, from the open port to the exit status."""

    def __init__(self, config: Config, read_options: Callable[[], Config]) -> None:
        """Raises ConfigError where the API keys cannot be read, or traces not be made."""
        self._read_options = read_options
        self._options = LiveOptions(config, ApiKeys.read(config.api_keys_file))
        self._notifier = ServiceNotifier()
        endpoint = config.otlp_endpoint
        self._tracer = None if endpoint is None else RequestTracer.exporting_to(endpoint)
        self._restarts = Restarts()
        self._ready_s: float | None = None
        """When the present engine began to take requests; None while it does not."""
        self.abandoned: frozenset[threading.Thread] = frozenset()
        """Threads that have had their time to end."""

    @property
    def _config(self) -> Config:
        return self._options.config

    async def run(self) -> int:
        """Returns the exit status: 0 after a stop that was asked for, 1 after a failure."""
        started_s = time.monotonic()
        self._state = AppState()
        self._signals = Signals()
        stage_timeout_s = self._config.stage_timeout_s
        watchdog = Watchdog(self._notifier, self._state, stage_timeout_s=stage_timeout_s)
        reloader = Reloader(self._options, self._read_options, self._state, self._notifier)
        reloads = reloader.run(self._signals.asked_to_reload)
        beside = [asyncio.create_task(each) for each in (watchdog.run(), reloads)]
        for task in beside:
            task.add_done_callback(_log_crash)
        try:
            with closing(TextPool(TEXT_THREADS)) as text_pool:
                async with self._listening():
                    return await self._fetch_and_serve(text_pool, started_s)
        finally:
            for task in beside:
                task.cancel()
            log.info("stopped")

    async def _fetch_and_serve(self, text_pool: TextPool, started_s: float) -> int:
        async with self._notifier.extending_timeout():
            self._notifier.status(f"fetching {self._config.model}")
            model = await self._unless_stopped(fetch_model, self._config)
            orders = await self._lay_out(model) if model is not None else None
        if model is None or orders is None:
            return 0
        return await self._serve_model(model, orders, text_pool, started_s)

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """The HTTP port is open, and /health answers, while the context is."""
        app = build_app(self._state, self._options, self._tracer)
        runner = make_runner(app, self._options, shutdown_timeout_s=FAREWELL_S)
        await runner.setup()
        try:
            self._ports = Ports(runner, take_inherited_sockets())
            await self._ports.open_own(self._config.host, self._config.port)
            yield
        finally:
            await runner.cleanup()
            if self._tracer is not None:
                await self._send_traces(self._tracer)

    async def _send_traces(self, tracer: RequestTracer) -> None:
        if not await asyncio.to_thread(tracer.close, TRACES_TIMEOUT_S):
            log.warning("the collector takes no traces, the last are lost")
            self.abandoned = tracer.threads

    async def _unless_stopped(self, function: Callable[..., T], *arguments: object) -> T | None:
        """Run it on a thread of its own; None if a stop is asked for before it returns."""
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        work = asyncio.get_running_loop().run_in_executor(loader, function, *arguments)
        loader.shutdown(wait=False)
        await _first(work, self._signals.asked_to_stop.wait())
        if work.done():
            return work.result()
        log.info("stopped while loading")
        self._state.drain()
        self._notifier.stopping("stopped while loading", within_s=2 * STOP_TIMEOUT_S)
        work.add_done_callback(lambda late: late.cancelled() or late.exception())
        return None

    async def _lay_out(self, model: ServedModel) -> list[Load] | None:
        """One order for each replica; None if a stop is asked for before they are known.

        Raises:
            PipeserveError: options do not fit the devices, or the model cannot be served.
        """
        config, survey = self._config, None
        if needs_survey(config, may_have_several_gpus=may_have_several_gpus()):
            surveyor = LayoutSurveyor(SurveyLayouts(config=config, model_path=model.path))
            try:
                survey = await self._unless_stopped(surveyor.survey)
            finally:
                await asyncio.to_thread(surveyor.close)
            if survey is None:
                return None
        layout = choose_layout(config, survey)
        if survey is not None or len(layout.replicas) > 1:
            log.info("layout", replicas=len(layout.replicas), reason=layout.reason)
        # Replicas on a CPU and on GPUs live in the same way.
        processes = {"processes": "two" if takes_two_processes(config) else "one"}
        return [
            Load(config=each.model_copy(update=processes), model_path=model.path)
            for each in layout.replicas
        ]

    async def _serve_model(
        self,
        model: ServedModel,
        orders: Sequence[Load],
        text_pool: TextPool,
        started_s: float,
    ) -> int:
        """One engine after another, until a stop or a failure that ends the daemon.

        Raises:
            PipeserveError: the first engine did not come to take requests.
        """
        while True:
            self._ready_s = None
            try:
                end = await self._run_engine(model, orders, text_pool, started_s)
            except PipeserveError as error:
                if self._state.services is None:
                    raise
                end = error
            if isinstance(end, PipeserveError):
                log.error("engine failed", error=str(end))
                was_stopping = self._signals.asked_to_stop.is_set()
                may_go_on = await self._may_restart(end)
                if not may_go_on and self._signals.asked_to_stop.is_set() and not was_stopping:
                    return 0  # it was stopped while it waited to restart
                if not may_go_on:
                    return await self._fail(end)
            elif end is _End.STOPPED or not await self._until_wanted():
                return 0
            started_s = time.monotonic()

    async def _fail(self, failure: PipeserveError) -> int:
        """Let requests hear of it; returns the exit status."""
        self._state.fail(str(failure))
        self._notifier.stopping(f"failed: {failure}", within_s=FAREWELL_S + 2 * STOP_TIMEOUT_S)
        await _first(self._state.wait_idle(), asyncio.sleep(FAREWELL_S))
        return 1

    async def _until_wanted(self) -> bool:
        """Without a model until a request wants it; False if a stop is asked for before."""
        self._notifier.status("idle, the model is unloaded; the next request loads it")
        await _first(self._signals.asked_to_stop.wait(), self._state.wait_wanted())
        if self._signals.asked_to_stop.is_set():
            self._state.drain()
            return False
        log.info("a request wants the model")
        return True

    async def _may_restart(self, failure: PipeserveError) -> bool:
        """Wait until it is time to start the engine again; False if it should not be."""
        if self._signals.asked_to_stop.is_set() or not takes_two_processes(self._config):
            return False
        served_s = 0.0 if self._ready_s is None else time.monotonic() - self._ready_s
        delay_s = self._restarts.note_failure(served_s=served_s)
        if delay_s is None:
            log.error("engine failed too often in a row")
            return False
        self._state.restart(f"the engine is started again after a failure: {failure}")
        self._notifier.status(f"restarting the engine: {failure}")
        log.warning("engine restarts", delay_s=delay_s)
        await _first(self._signals.asked_to_stop.wait(), asyncio.sleep(delay_s))
        return not self._signals.asked_to_stop.is_set()

    async def _run_engine(
        self,
        model: ServedModel,
        orders: Sequence[Load],
        text_pool: TextPool,
        started_s: float,
    ) -> PipeserveError | _End:
        """All replicas from their load to the last one's end; returns why that came.

        Raises:
            PipeserveError: it did not come to take requests.
        """
        log.info("loading", path=str(model.path))
        engine = ReplicatedEngine(orders)
        try:
            report = report_progress(self._notifier.status)
            async with self._notifier.extending_timeout():
                facts = await self._unless_stopped(engine.load, report)
            if facts is None:
                return _End.STOPPED
            async with self._connected(engine, facts) as client:
                async with self._notifier.extending_timeout():  # kernels may be compiled
                    await asyncio.gather(*(_warm_up(client) for _ in orders))
                self._state.ready(
                    Services(
                        engine=client,
                        tokenizer=model.tokenizer,
                        chat_template=model.chat_template,
                        card=model.card,
                        grammars=model.grammars,
                        text_pool=text_pool,
                    )
                )
                await self._announce(model.card.name, facts, len(orders), started_s)
                return await self._until_end(client)
        finally:
            await asyncio.to_thread(engine.close, STOP_TIMEOUT_S)

    @asynccontextmanager
    async def _connected(
        self, engine: ReplicatedEngine, facts: PipelineFacts
    ) -> AsyncIterator[EngineClient]:
        """A loaded engine takes requests while the context is open."""
        client = EngineClient(
            facts=facts,
            post=engine.post,
            max_queued_requests=self._config.max_queued_requests,
            max_queued_tokens=self._config.max_queued_tokens,
            take_times=None if self._tracer is None else self._tracer.sequence_ended,
        )
        engine.start(client.deliver)
        client.set_log_level(self._config.log_level)  # it may have changed since the order
        try:
            yield client
        finally:
            engine.stop_watching()
            client.shut_down()

    async def _announce(
        self, model_name: str, facts: PipelineFacts, num_replicas: int, started_s: float
    ) -> None:
        self._ready_s = time.monotonic()
        await self._ports.take_inherited()
        log.info(
            "ready",
            model=model_name,
            replicas=num_replicas,
            stages=facts.num_stages,
            context_length=facts.context_length,
            kv_tokens=facts.num_blocks * facts.block_size,
            startup_s=round(self._ready_s - started_s, 2),
        )
        self._notifier.ready(f"serving {model_name}")

    async def _until_end(self, client: EngineClient) -> PipeserveError | _End:
        """Returns why the engine is to end or failed."""
        while True:
            await _first(
                self._signals.asked_to_stop.wait(), client.wait_failed(), self._wait_unused()
            )
            if client.failure is not None:
                return client.failure
            if self._signals.asked_to_stop.is_set():
                return await self._drain(client) or _End.STOPPED
            if self._is_unused():
                log.info("unloading", idle_unload_s=self._config.idle_unload_s)
                self._state.unload()
                return _End.UNUSED

    async def _wait_unused(self) -> None:
        patience_s = self._config.idle_unload_s
        if patience_s is None:
            await asyncio.Event().wait()  # for ever
        else:
            await self._state.wait_unused(patience_s)

    def _is_unused(self) -> bool:
        """A request may have come since the wait ended."""
        patience_s = self._config.idle_unload_s
        return patience_s is not None and self._state.unused_s >= patience_s

    async def _drain(self, client: EngineClient) -> PipeserveError | None:
        """Refuse new requests; wait for those in progress, within limits. Returns why the engine
        failed meanwhile, if it did."""
        self._state.drain()
        await self._ports.leave_inherited()
        timeout_s = self._config.drain_timeout_s
        self._notifier.stopping(
            f"draining {self._state.num_requests} requests",
            within_s=timeout_s + FAREWELL_S + 2 * STOP_TIMEOUT_S,
        )
        log.info("draining", requests=self._state.num_requests)
        await _first(
            self._state.wait_idle(),
            asyncio.sleep(timeout_s),
            self._signals.asked_to_stop_now.wait(),
            client.wait_failed(),
        )
        if self._state.num_requests:
            log.warning("requests cut off", requests=self._state.num_requests)
        return client.failure


def _log_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("watchdog or reload is gone", exc_info=error)


async def _warm_up(client: EngineClient) -> None:
    """One short generation through all stages, so that the first request pays for nothing."""
    sampling = SamplingParams(max_tokens=2, seed=0, temperature=0.0)
    async with client.generate((0,), sampling) as generation:
        async for _ in generation:
            pass


async def _first(*waits: asyncio.Future[Any] | Coroutine[Any, Any, Any]) -> None:
    """Return when one of these is done; coroutines that are not are cancelled, futures kept."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
