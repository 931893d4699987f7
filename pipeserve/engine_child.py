"""The engine process: an EngineHalf behind a socket, started by pipeserve.engine_process.

Ends when it is told to, when the engine fails, and at once when the process that started it is
gone, since nobody else could use the memory that it holds.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading

import structlog

from pipeserve.engine.engine import Inbox
from pipeserve.engine.messages import (
    EngineFailed,
    EngineMessage,
    Load,
    Loaded,
    LoadFailed,
    SetLogLevel,
    Surveyed,
    SurveyLayouts,
)
from pipeserve.engine.wire import Outbox, Wire
from pipeserve.errors import EngineError, PipeserveError
from pipeserve.log import LogFormat, configure_logging
from pipeserve.toolchain import keep_kernels_in

STOP_TIMEOUT_S = 3.0
"""For the stages to end after a Shutdown; less than the front half waits for the process."""
FLUSH_TIMEOUT_S = 2.0
"""For the last words to be written."""

log = structlog.get_logger()


def main() -> None:
    """`python -m pipeserve.engine_child FD`, FD being this process's end of the connection."""
    # Ctrl-C in a terminal goes to every process; this one is ended by the one that started it,
    # which blocked these signals for the time until here.
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    status = serve_engine(Wire(socket.socket(fileno=int(sys.argv[-1]))))
    sys.stderr.flush()
    os._exit(status)  # a thread that is blocked in a kernel must not hold the process up


def serve_engine(wire: Wire) -> int:
    """Load, serve, end, or survey and end; returns the exit status: 0 after a Shutdown or a
    survey, 1 after a failure."""
    first = wire.receive()
    if first is None:
        return 1
    order = first[0]
    assert isinstance(order, Load | SurveyLayouts), f"the first message is {order!r}"
    configure_logging(level=order.config.log_level, log_format=order.config.log_format)
    inbox: Inbox = queue.SimpleQueue()
    arguments = (wire, inbox, order.config.log_format)
    threading.Thread(target=_receive, args=arguments, name="from-front", daemon=True).start()
    outbox = Outbox(wire, name="to-front")
    status = _run(order, inbox, outbox)
    outbox.close(FLUSH_TIMEOUT_S)
    return status


def _receive(wire: Wire, inbox: Inbox, log_format: LogFormat) -> None:
    """Runs on a thread of its own, from before torch is imported, to notice an orphan's fate."""
    try:
        while (messages := wire.receive()) is not None:
            for message in messages:
                if isinstance(message, SetLogLevel):
                    configure_logging(level=message.level, log_format=log_format)
                    log.debug("engine process: log level", level=message.level)
                else:
                    inbox.put(message)
    except Exception:
        log.exception("engine process: unreadable message")
    os._exit(1)


def _run(order: Load | SurveyLayouts, inbox: Inbox, outbox: Outbox) -> int:
    failures: list[EngineFailed] = []

    def deliver(message: EngineMessage) -> None:
        if isinstance(message, EngineFailed):
            failures.append(message)
        outbox.put(message)

    try:
        keep_kernels_in(order.config.cache_dir)
        from pipeserve.engine_half import EngineHalf, survey  # brings torch and Triton

        if isinstance(order, SurveyLayouts):
            outbox.put(Surveyed(survey=survey(order)))
            return 0
        half = EngineHalf.load(order, inbox=inbox, on_progress=outbox.put)
    except PipeserveError as error:
        outbox.put(LoadFailed(error=error))
        return 1
    except Exception as error:
        log.exception("loading failed")
        outbox.put(LoadFailed(error=EngineError(f"loading failed: {error!r}; see the log")))
        return 1
    outbox.put(Loaded(facts=half.facts))
    half.start(deliver)
    half.wait_ended()
    if failures:
        return 1  # without waiting for stages, one of which may be blocked
    half.close(STOP_TIMEOUT_S)
    return 0


if __name__ == "__main__":
    main()
