"""Daemons that the load tools start for themselves: their start, their log, their end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

FAKE_ENGINE_DAEMON = Path(__file__).with_name("fake_engine_daemon.py")
SLOW_STAGE_DAEMON = Path(__file__).with_name("slow_stage_daemon.py")
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 120.0


@contextmanager
def running_daemon(
    program: Sequence[str], options: Sequence[str], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon that logs JSON into `log`; it is stopped at the end.

    program: a script that stands for `-m pipeserve`, and its own arguments.
    """
    command = [sys.executable, *program, "serve", "--port", "0"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--log-format", "json", *options], stderr=log, env=environ
    )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_TIMEOUT_S)
        if status != 0:
            raise RuntimeError(f"the daemon ended with status {status}")
    finally:
        process.kill()
        process.wait()


def log_lines(log: IO[bytes]) -> list[dict[str, Any]]:
    lines = []
    for line in Path(log.name).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            lines.append({"event": line, "level": "not JSON"})
    return lines


async def wait_ready(daemon: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """The daemon's address, once it takes requests."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while daemon.poll() is None:
            events = {line["event"]: line for line in log_lines(log)}
            if "ready" in events:
                return str(events["listening"]["url"]).removesuffix("/v1")
            await asyncio.sleep(0.2)
    raise RuntimeError(f"the daemon ended: {log_lines(log)}")
