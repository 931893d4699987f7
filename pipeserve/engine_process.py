"""EngineProcess: the engine half in a process beside this one, as the daemon sees it.

Its methods run on the event loop, but `load`, `close` and the reader have threads of their own.
Must not import the runtime: this side has no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from pipeserve.core.batch import PipelineFacts
from pipeserve.core.layout import LayoutSurvey
from pipeserve.core.loading import OnProgress
from pipeserve.engine.messages import (
    EngineFailed,
    EngineMessage,
    FrontMessage,
    Load,
    Loaded,
    LoadFailed,
    Surveyed,
    SurveyLayouts,
)
from pipeserve.engine.wire import Outbox, Wire, WireError
from pipeserve.errors import EngineError, StageFailedError

EXIT_TIMEOUT_S = 2.0
"""For a process to end after its connection did."""
KILL_TIMEOUT_S = 30.0
"""For the kernel to take back what a killed process held, GPU memory above all."""
FLUSH_TIMEOUT_S = 1.0
"""For the threads of a connection that is gone."""

log = structlog.get_logger()

Answer = TypeVar("Answer", Loaded, Surveyed)


class EngineProcess:
    """A child process that runs pipeserve.engine_child, from its start to its end.

    First `load`, then `start`, or only `survey`, as ordered; `close` at any time. Construct it on
    the main thread.

    Raises:
        EngineError: no process can be started.
    """

    def __init__(self, order: Load | SurveyLayouts) -> None:
        here, there = socket.socketpair()
        with there:
            try:
                self._process = _spawn([*child_command(), str(there.fileno())], there.fileno())
            except OSError as error:
                here.close()
                raise EngineError(f"the engine process cannot be started: {error}") from None
        log.info("engine process started", pid=self._process.pid)
        self._wire = Wire(here)
        self._outbox = Outbox(self._wire, name="to-engine")
        self._outbox.put(order)
        self._unread: Sequence[EngineMessage] = ()
        """What came in one frame with Loaded: an engine may fail at once."""
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, on_progress: OnProgress) -> PipelineFacts:
        """Wait until the model is loaded; on_progress gets what the runtime reports.

        Raises:
            PipeserveError: the model cannot be served here, or the process died.
        """
        return self._await_answer(Loaded, on_progress).facts

    def survey(self) -> LayoutSurvey:
        """Wait until the devices are surveyed.

        Raises:
            PipeserveError: the model cannot be served here, or the process died.
        """
        return self._await_answer(Surveyed, lambda event: None).survey

    def _await_answer(self, kind: type[Answer], on_progress: OnProgress) -> Answer:
        try:
            while (messages := self._wire.receive()) is not None:
                for index, message in enumerate(messages):
                    if isinstance(message, LoadFailed):
                        raise message.error
                    if isinstance(message, kind):
                        self._unread = messages[index + 1 :]
                        return message
                    on_progress(message)
        except WireError as error:
            log.error("engine process not understood", error=str(error))
        raise StageFailedError(f"{self._describe_end()} while it loaded the model")

    def start(self, deliver: Callable[[Sequence[EngineMessage]], None]) -> None:
        """Deliver messages from now on, each batch as it came, on the reader's thread.

        The last message says how the process ended.
        """
        self._reader = threading.Thread(
            target=self._read, args=(deliver,), name="from-engine", daemon=True
        )
        self._reader.start()

    def post(self, message: FrontMessage) -> None:
        """Send a message to the engine; returns at once."""
        self._outbox.put(message)

    def close(self, timeout_s: float) -> None:
        """Wait for the process to end, which a Shutdown or a failure has told it to; then kill it.

        A process that still loads is killed at once, and `load` raises.
        """
        try:
            self._process.wait(timeout_s if self._reader is not None else 0.0)
        except subprocess.TimeoutExpired:
            if self._reader is not None:
                log.error("engine process killed", pid=self._process.pid)
            self._kill()
        self._outbox.close(FLUSH_TIMEOUT_S)
        if self._reader is not None:
            self._reader.join(FLUSH_TIMEOUT_S)
        self._wire.close()

    def _read(self, deliver: Callable[[Sequence[EngineMessage]], None]) -> None:
        try:
            deliver(self._unread)
            while (messages := self._wire.receive()) is not None:
                deliver(messages)
        except WireError as error:
            log.error("engine process not understood", error=str(error))
        deliver((EngineFailed(error=self._describe_end(), stalled=False),))

    def _describe_end(self) -> str:
        """How the process ended; ends it where it only closed its connection."""
        try:
            status = self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return "the engine process broke its connection off and was killed"
        if status >= 0:
            return f"the engine process ended with status {status}"
        names = {int(number): number.name for number in signal.Signals}
        name = names.get(-status, f"signal {-status}")
        mend = "; if nobody sent that, memory ran out: see dmesg" if name == "SIGKILL" else ""
        return f"the engine process was killed by {name}{mend}"

    def _kill(self) -> None:
        self._process.kill()
        try:
            self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # a device driver that hangs can hold it
            log.error("engine process cannot be killed", pid=self._process.pid)


def child_command() -> list[str]:
    """The program of the child, which takes the number of its socket as last argument."""
    # Where this process does not look for modules in the current folder, the child must not.
    is_safe = not sys.path or sys.path[0] not in ("", os.getcwd())
    return [sys.executable, *(["-P"] if is_safe else []), "-m", "pipeserve.engine_child"]


def _spawn(command: Sequence[str], fd: int) -> subprocess.Popen[bytes]:
    """Start it with the stop signals blocked, until it has said that it ignores them."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        return subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
