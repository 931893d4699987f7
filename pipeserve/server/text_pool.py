"""TextPool: threads for parsing, templates and tokenising, which a job cannot keep past its time.

`run` is for the event loop. A chat template is a stranger's program and may never end: the thread
of a job whose time is up gets an exception between two of its bytecodes, and another its place.
"""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

MAX_LOST = 8
"""Threads that may be on their way out, or ignore the exception in a call that never returns,
beside those that work."""
STUCK_AFTER_S = 10.0
"""How long they may take to end before text work counts as stuck. A library's call on a long text
takes a second at most; jobs wait meanwhile."""


class _Interrupted(SystemExit):
    """Ends a thread from outside; what a job runs catches Exception at most."""


class _Job:
    """One call, on its way through a thread. Whoever takes the claim decides how it ends, the
    thread with a result or the event loop by giving it up."""

    def __init__(self, call: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.result: asyncio.Future[Any] = loop.create_future()
        self._call = call
        self._loop = loop
        self._claim = [True]  # a list's pop is atomic, and nobody waits for a lock
        self._thread: threading.Thread | None = None

    def run(self) -> bool:
        """On a thread: False if the job was given up under it, and the thread with it."""
        if not self._claim:
            return True
        self._thread = threading.current_thread()
        if not self._claim:  # an exception may be on its way to this thread
            return False
        try:
            report: Callable[[], None] = partial(self._set_result, self._call())
        except Exception as error:
            report = partial(self._set_error, error)
        if not self._take_claim():
            return False
        self._loop.call_soon_threadsafe(report)
        return True

    def give_up(self) -> threading.Thread | None:
        """On the event loop: the thread that had to be interrupted for it, if any."""
        if not self._take_claim() or self._thread is None:
            return None
        assert self._thread.ident is not None, "it is started"
        identity = ctypes.c_ulong(self._thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(_Interrupted))
        return self._thread

    def _take_claim(self) -> bool:
        try:
            return self._claim.pop()
        except IndexError:
            return False

    def _set_result(self, value: object) -> None:
        if not self.result.done():
            self.result.set_result(value)

    def _set_error(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class TextPool:
    """A fixed number of threads that take jobs in order. Owned by the event loop."""

    def __init__(self, num_threads: int, *, stuck_after_s: float = STUCK_AFTER_S) -> None:
        self._num_threads = num_threads
        self._stuck_after_s = stuck_after_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._working: set[threading.Thread] = set()
        self._lost: dict[threading.Thread, float] = {}
        """Since when, by time.monotonic."""

    async def run(self, timeout_s: float, function: Callable[..., T], *arguments: object) -> T:
        """What the function returns or raises, on a thread.

        Raises:
            TimeoutError: it was not done in timeout_s, the wait for a thread included.
        """
        job = _Job(partial(function, *arguments), asyncio.get_running_loop())
        self._fill_up()
        self._jobs.put(job)
        try:
            async with asyncio.timeout(timeout_s):
                result: T = await job.result
                return result
        finally:
            if job.result.cancelled():  # too late, or nobody waits for it any more
                self._give_up(job)

    @property
    def is_stuck(self) -> bool:
        """No thread is left that takes jobs, and those that were interrupted do not end."""
        self._forget_ended()
        if self._working or not self._lost:
            return False
        return time.monotonic() - max(self._lost.values()) > self._stuck_after_s

    def close(self) -> None:
        """Threads end when they are done with their job, interrupted ones at once."""
        self._num_threads = 0
        for _ in self._working:
            self._jobs.put(None)

    def _give_up(self, job: _Job) -> None:
        thread = job.give_up()
        if thread is not None:
            self._working.discard(thread)
            self._lost[thread] = time.monotonic()
        self._fill_up()

    def _forget_ended(self) -> None:
        self._lost = {thread: at for thread, at in self._lost.items() if thread.is_alive()}
        self._working = {thread for thread in self._working if thread.is_alive()}

    def _fill_up(self) -> None:
        self._forget_ended()
        most = min(self._num_threads, self._num_threads + MAX_LOST - len(self._lost))
        while len(self._working) < most:
            loop = asyncio.get_running_loop()
            thread = threading.Thread(target=self._work, args=(loop,), name="text", daemon=True)
            thread.start()
            self._working.add(thread)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(_Interrupted):
            while (job := self._jobs.get()) is not None:
                if not job.run():
                    break
                del job  # a body of megabytes need not wait for the next one
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._end, threading.current_thread())

    def _end(self, thread: threading.Thread) -> None:
        """Jobs may wait for the place of one that was lost."""
        self._lost.pop(thread, None)
        self._working.discard(thread)
        self._fill_up()
