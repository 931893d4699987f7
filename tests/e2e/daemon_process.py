"""Starts the daemon as a real process and reads its log."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.processes import python_path

START_TIMEOUT_S = 60.0

FAULTY_DAEMON = Path(__file__).with_name("faulty_daemon.py")
FAKE_ENGINE_DAEMON = Path(__file__).with_name("fake_engine_daemon.py")
WITH_SOCKET = Path(__file__).with_name("with_socket.py")


class DaemonProcess:
    """A running daemon: its address, its log lines as they come, its end."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environ},
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        """What it and its engine process have logged so far."""
        self._arrived: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": line.rstrip("\n")}
            self.lines.append(event)
            self._arrived.put(event)
        self._arrived.put(None)

    def wait_for(self, event: str, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The next log line with this event."""
        while True:
            line = self._arrived.get(timeout=timeout_s)
            assert line is not None, f"ended before {event!r}: {self.lines}"
            if line["event"] == event:
                return line

    @property
    def url(self) -> str:
        """Such as http://127.0.0.1:12345, once the daemon listens."""
        (line,) = [line for line in self.lines if line["event"] == "listening"]
        return str(line["url"]).removesuffix("/v1")

    @property
    def engine_pid(self) -> int:
        """The newest engine process, once the daemon has started one."""
        started = [line for line in self.lines if line["event"] == "engine process started"]
        return int(started[-1]["pid"])

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(5.0)
        return status


@contextmanager
def daemon(
    *options: str,
    wait_ready: bool = True,
    command: Sequence[str] = ("-m", "pipeserve"),
    environ: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    port: int = 0,
) -> Iterator[DaemonProcess]:
    """A daemon on a free port; killed when the context is left, if it still runs."""
    arguments = [*command, "serve", "--port", str(port), "--devices", "cpu,cpu", *options]
    running = DaemonProcess(arguments, environ or {}, pass_fds)
    try:
        running.wait_for("listening")
        if wait_ready:
            running.wait_for("ready")
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        running.process.stderr.close()  # type: ignore[union-attr]
