"""The daemon: builds every part, says when it is ready, drains and stops.

Runs on the event loop; loading runs on threads. Has no torch: the engine half, in this process or
beside it, brings its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import structlog
import uvloop
from aiohttp import web

from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.loading import LoadEvent, LoadNotice, LoadReport, OnProgress
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.client import EngineClient
from pipeserve.engine.messages import Load, SurveyLayouts
from pipeserve.engine_host import LayoutSurveyor, may_have_several_gpus, takes_two_processes
from pipeserve.errors import ConfigError, EngineError, PipeserveError
from pipeserve.layout import choose_layout, needs_survey
from pipeserve.notify import ServiceNotifier
from pipeserve.progress import ProgressBars
from pipeserve.replicated_engine import ReplicatedEngine
from pipeserve.restarts import Restarts
from pipeserve.served_model import ServedModel, fetch_model
from pipeserve.server.app import build_app, make_runner
from pipeserve.server.state import AppState, Services

log = structlog.get_logger()

T = TypeVar("T")

TEXT_THREADS = 2
"""Threads for templates and tokenising."""
STOP_TIMEOUT_S = 5.0
"""How long threads and the engine may take to end once nobody waits for their work."""
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


def _progress_reporter(notifier: ServiceNotifier) -> OnProgress:
    """Tells log and service manager of every tenth of a stage's weights that was read; on a
    terminal bars take the place of the log lines."""
    bars = ProgressBars()
    told: dict[int, int] = {}

    def report(event: LoadEvent) -> None:
        if isinstance(event, LoadNotice):
            log.warning("loading", notice=event.text)
            return
        if isinstance(event, LoadReport):
            log.info("loading", report=event.text)
            return
        bars.update(event)
        if told.get(event.stage) == event.percent // 10:
            return
        told[event.stage] = event.percent // 10
        stage = f"{event.stage + 1} of {event.num_stages}"
        notifier.status(f"loading stage {stage}, {event.percent} %")
        if not bars.is_shown:
            log.info("loading weights", stage=stage, percent=event.percent)

    return report


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
        self._restarts = Restarts()
        self._ready_s: float | None = None
        """When the present engine began to take requests; None while it does not."""

    async def run(self) -> int:
        """Returns the exit status: 0 after a stop that was asked for, 1 after a failure."""
        started_s = time.monotonic()
        self._state = AppState()
        self._stop = StopSignals()
        watchdog = asyncio.create_task(self._feed_watchdog())
        text_executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        try:
            async with self._listening():
                model = await self._unless_stopped(fetch_model, self._config)
                orders = await self._lay_out(model) if model is not None else None
                if model is None or orders is None:
                    return 0
                return await self._serve_model(model, orders, text_executor, started_s)
        finally:
            watchdog.cancel()
            text_executor.shutdown(wait=False, cancel_futures=True)
            log.info("stopped")

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

    async def _unless_stopped(self, function: Callable[..., T], *arguments: object) -> T | None:
        """Run it on a thread of its own; None if a stop is asked for before it returns."""
        loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        work = asyncio.get_running_loop().run_in_executor(loader, function, *arguments)
        loader.shutdown(wait=False)
        await _first(work, self._stop.asked.wait())
        if work.done():
            return work.result()
        log.info("stopped while loading")
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
        text_executor: ThreadPoolExecutor,
        started_s: float,
    ) -> int:
        """One engine after another, until a stop or a failure that ends the daemon.

        Raises:
            PipeserveError: the first engine did not come to take requests.
        """
        while True:
            self._ready_s = None
            failure: PipeserveError | None
            try:
                failure = await self._run_engine(model, orders, text_executor, started_s)
            except PipeserveError as error:
                if self._state.services is None:
                    raise
                failure = error
            if failure is None:
                return 0
            log.error("engine failed", error=str(failure))
            if not await self._may_restart(failure):
                self._notifier.stopping(f"failed: {failure}")
                await _first(self._state.wait_idle(), asyncio.sleep(FAREWELL_S))
                return 1
            started_s = time.monotonic()

    async def _may_restart(self, failure: PipeserveError) -> bool:
        """Wait until it is time to start the engine again; False if it should not be."""
        if self._stop.asked.is_set() or not takes_two_processes(self._config):
            return False
        served_s = 0.0 if self._ready_s is None else time.monotonic() - self._ready_s
        delay_s = self._restarts.note_failure(served_s=served_s)
        if delay_s is None:
            log.error("engine failed too often in a row")
            return False
        self._state.restart(f"the engine is started again after a failure: {failure}")
        self._notifier.status(f"restarting the engine: {failure}")
        log.warning("engine restarts", delay_s=delay_s)
        await _first(self._stop.asked.wait(), asyncio.sleep(delay_s))
        return not self._stop.asked.is_set()

    async def _run_engine(
        self,
        model: ServedModel,
        orders: Sequence[Load],
        text_executor: ThreadPoolExecutor,
        started_s: float,
    ) -> EngineError | None:
        """All replicas from their load to the last one's end; returns why that failed, None after
        a stop.

        Raises:
            PipeserveError: it did not come to take requests.
        """
        log.info("loading", path=str(model.path))
        engine = ReplicatedEngine(orders)
        try:
            report = _progress_reporter(self._notifier)
            facts = await self._unless_stopped(engine.load, report)
            if facts is None:
                return None
            async with self._connected(engine, facts) as client:
                await asyncio.gather(*(_warm_up(client) for _ in orders))
                self._state.ready(
                    Services(
                        engine=client,
                        tokenizer=model.tokenizer,
                        chat_template=model.chat_template,
                        card=model.card,
                        text_executor=text_executor,
                    )
                )
                self._announce(model.card.name, facts, len(orders), started_s)
                return await self._until_stopped(client)
        finally:
            await asyncio.to_thread(engine.close, STOP_TIMEOUT_S)

    @asynccontextmanager
    async def _connected(
        self, engine: ReplicatedEngine, facts: PipelineFacts
    ) -> AsyncIterator[EngineClient]:
        """A loaded engine takes requests while the context is open."""
        client = EngineClient(
            facts=facts, post=engine.post, max_queued_requests=self._config.max_queued_requests
        )
        engine.start(client.deliver)
        try:
            yield client
        finally:
            engine.stop_watching()
            client.shut_down()

    def _announce(
        self, model_name: str, facts: PipelineFacts, num_replicas: int, started_s: float
    ) -> None:
        self._ready_s = time.monotonic()
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

    async def _until_stopped(self, client: EngineClient) -> EngineError | None:
        """Returns why the engine failed, None after a stop that was asked for."""
        await _first(self._stop.asked.wait(), client.wait_failed())
        if client.failure is None:
            await self._drain(client)
        return client.failure

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

    async def _feed_watchdog(self) -> None:
        interval_s = self._notifier.watchdog_interval_s
        while interval_s is not None:
            self._notifier.feed_watchdog()
            await asyncio.sleep(interval_s)


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
