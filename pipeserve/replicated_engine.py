"""ReplicatedEngine: the engines behind the daemon's one client, each watched and started again.

Runs on the event loop; loading and closing block threads of their own. Has no torch.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial

import structlog

from pipeserve.core.batch import PipelineFacts
from pipeserve.core.loading import LoadEvent, LoadNotice, LoadReport, OnProgress, StageProgress
from pipeserve.engine.messages import (
    EngineFailed,
    EngineMessage,
    FrontMessage,
    GetStats,
    Load,
    RouterMessage,
)
from pipeserve.engine.replicas import Member, ReplicaRouter, merge_facts
from pipeserve.engine_host import EngineHost, make_host, takes_two_processes
from pipeserve.errors import PipeserveError, StageFailedError
from pipeserve.restarts import Restarts

CLOSE_TIMEOUT_S = 5.0
"""For a failed replica to end before another takes its devices."""
WATCH_REPLY_ID = -1
"""Of the questions that only prove that an engine lives; clients count from 0."""

log = structlog.get_logger()


class _Replica:
    """One replica: its present engine, and how often in a row it failed."""

    def __init__(self, index: int, order: Load) -> None:
        self.index = index
        self.order = order
        self.restarts = Restarts()
        self.facts: PipelineFacts | None = None
        self.make_host()

    def make_host(self) -> None:
        self.ready_s: float | None = None
        self.host: EngineHost = make_host(self.order)
        self.failure: str | None = None
        """Why the host is dead."""
        self.failed = asyncio.Event()
        self.heard = asyncio.Event()
        """Set by whatever it says."""

    @property
    def can_restart(self) -> bool:
        """Threads of this process cannot be got rid of."""
        return takes_two_processes(self.order.config)

    @property
    def served_s(self) -> float:
        return 0.0 if self.ready_s is None else time.monotonic() - self.ready_s


class ReplicatedEngine:
    """Every replica from its load to the end, as one engine.

    First `load`, then `start`; `close` at any time. A replica that fails is started again while
    another lives; after the last one's failure the client hears EngineFailed and nothing restarts.
    Construct it on the main thread, with the event loop running: processes are started.
    """

    def __init__(self, orders: Sequence[Load]) -> None:
        self._replicas = [_Replica(index, order) for index, order in enumerate(orders)]
        self._stage_timeout_s = orders[0].config.stage_timeout_s
        self._facts: PipelineFacts | None = None
        self._router: ReplicaRouter | None = None
        self._watches: list[asyncio.Task[None]] = []

    def load(self, on_progress: OnProgress) -> PipelineFacts:
        """Load all replicas; blocks. At the same time where each has a process and GPUs of its own:
        each takes the measure of what its GPUs have left.

        Raises:
            PipeserveError: one of them cannot serve the model here.
        """
        gpus = [
            name for each in self._replicas for name in each.order.config.devices if name != "cpu"
        ]
        are_apart = len(set(gpus)) == len(gpus)
        has_processes = all(each.can_restart for each in self._replicas)
        loaders = ThreadPoolExecutor(
            len(self._replicas) if has_processes and are_apart else 1,
            thread_name_prefix="replica-loader",
        )
        loads = [
            loaders.submit(each.host.load, report)
            for each, report in zip(self._replicas, self._reports(on_progress), strict=True)
        ]
        done, _ = wait(loads, return_when=FIRST_EXCEPTION)
        loaders.shutdown(wait=False, cancel_futures=True)
        for each in done:
            each.result()
        all_facts = [each.result() for each in loads]
        for replica, facts in zip(self._replicas, all_facts, strict=True):
            replica.facts = facts
        self._facts = all_facts[0] if len(all_facts) == 1 else merge_facts(all_facts)
        return self._facts

    def _reports(self, on_progress: OnProgress) -> list[OnProgress]:
        """One for each replica, which calls on_progress for one of them at a time."""
        count, lock = len(self._replicas), threading.Lock()

        def report(index: int, event: LoadEvent) -> None:
            with lock:
                on_progress(_of_replica(event, index, count))

        if count == 1:
            return [on_progress]
        return [partial(report, index) for index in range(count)]

    def start(self, deliver: Callable[[RouterMessage], None]) -> None:
        """After `load`: take messages. `deliver` is called on the event loop."""
        members = [self._begin(replica) for replica in self._replicas]
        self._router = ReplicaRouter(
            members, deliver=deliver, max_wait_s=self._replicas[0].order.config.max_wait_s
        )
        self._watches = [asyncio.create_task(self._watch(each)) for each in self._replicas]
        for watch in self._watches:
            watch.add_done_callback(_log_crash)

    def post(self, message: FrontMessage) -> None:
        """Send a message to the engine that it concerns; on the event loop."""
        assert self._router is not None, "start comes first"
        self._router.post(message)

    def stop_watching(self) -> None:
        """From now on nothing is started again."""
        for watch in self._watches:
            watch.cancel()

    def close(self, timeout_s: float) -> None:
        """Wait for the ends that a Shutdown or failures began, or break loading off; blocks."""
        with ThreadPoolExecutor(len(self._replicas), thread_name_prefix="closer") as closers:
            for replica in self._replicas:
                closers.submit(replica.host.close, timeout_s)

    def _begin(self, replica: _Replica) -> Member:
        """Let a loaded replica's engine run."""
        assert replica.facts is not None, "load comes first"
        loop, host = asyncio.get_running_loop(), replica.host

        def to_loop(messages: Sequence[EngineMessage]) -> None:
            loop.call_soon_threadsafe(self._take, replica, host, messages)

        host.start(to_loop)
        replica.ready_s = time.monotonic()
        return Member(facts=replica.facts, post=host.post)

    def _take(self, replica: _Replica, host: EngineHost, messages: Sequence[EngineMessage]) -> None:
        if replica.host is not host:
            return  # last words of one that was replaced
        replica.heard.set()
        for message in messages:
            self._hand_on(replica, message)

    def _hand_on(self, replica: _Replica, message: EngineMessage) -> None:
        assert self._router is not None, "start made it"
        if isinstance(message, EngineFailed) and replica.failure is None:
            replica.failure = message.error
            replica.failed.set()
        self._router.take(replica.index, message)

    async def _watch(self, replica: _Replica) -> None:
        """Notice failures and silence; start the replica again while another one lives."""
        assert self._router is not None, "start made it"
        while True:
            await self._until_failed(replica)
            if self._router.num_live == 0:
                return
            log.error("replica failed", replica=replica.index, error=replica.failure)
            if not await self._restart(replica):
                log.error("replica given up", replica=replica.index)
                return
            self._router.rejoin(replica.index, self._begin(replica))
            log.info("replica ready", replica=replica.index)

    async def _until_failed(self, replica: _Replica) -> None:
        """Fails it by itself once its engine says nothing for stage_timeout_s."""
        patience_s = self._stage_timeout_s
        while replica.failure is None:
            replica.heard.clear()
            replica.host.post(GetStats(reply_id=WATCH_REPLY_ID))
            try:
                async with asyncio.timeout(patience_s):
                    await replica.heard.wait()
            except TimeoutError:
                error = f"the engine answered nothing for {patience_s:g} s (stage_timeout_s)"
                self._hand_on(replica, EngineFailed(error=error, stalled=True))
            with suppress(TimeoutError):
                async with asyncio.timeout(patience_s / 4):
                    await replica.failed.wait()

    async def _restart(self, replica: _Replica) -> bool:
        """Load another engine in place of one that failed; False if there is to be none."""
        while True:
            await asyncio.to_thread(replica.host.close, CLOSE_TIMEOUT_S)
            delay_s = replica.restarts.note_failure(served_s=replica.served_s)
            if delay_s is None or not replica.can_restart:
                return False
            log.warning("replica restarts", replica=replica.index, delay_s=delay_s)
            await asyncio.sleep(delay_s)
            try:
                replica.make_host()
                facts = await asyncio.to_thread(replica.host.load, lambda event: None)
                self._check_context(facts)
            except PipeserveError as error:
                log.error("replica failed", replica=replica.index, error=str(error))
                continue
            replica.facts = facts
            return True

    def _check_context(self, facts: PipelineFacts) -> None:
        """Clients were promised that every sequence of the first length fits."""
        assert self._facts is not None, "load comes first"
        promised = self._facts.context_length
        if facts.context_length < promised:
            raise StageFailedError(
                f"the KV cache holds only {facts.context_length} tokens now, and clients were "
                f"promised {promised}; free memory on its devices or set context_length"
            )


def _log_crash(watch: asyncio.Task[None]) -> None:
    if not watch.cancelled() and (error := watch.exception()) is not None:
        log.error("a replica is watched no more", exc_info=error)


def _of_replica(event: LoadEvent, index: int, count: int) -> LoadEvent:
    match event:
        case StageProgress():
            stage = index * event.num_stages + event.stage
            return replace(event, stage=stage, num_stages=count * event.num_stages)
        case LoadNotice() | LoadReport():
            return replace(event, text=f"replica {index}: {event.text}")
