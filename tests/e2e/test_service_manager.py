"""The units under a real systemd: start, reload, restart, watchdog, stop, and a socket that waits.

The engine is fake; rights and users, which need the system's own manager, are left out.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from aiohttp import ClientSession, TCPConnector

from tests.e2e.daemon_process import FAKE_ENGINE_DAEMON
from tests.e2e.service_manager import ServiceManager, can_run, service_manager
from tests.e2e.test_operations import ask
from tests.processes import ROOT, is_running

pytestmark = [
    pytest.mark.usefixtures("demo_model_path"),
    pytest.mark.skipif(not can_run(), reason="needs root and systemd"),
]

LEFT_OUT = (
    *("User=", "Group=", "EnvironmentFile=", "ExecStartPre=", "CacheDirectory=", "StateDirectory="),
    *("WorkingDirectory=", "Environment=", "WatchdogSec=", "RestartSec=", "WantedBy="),
    *("ProtectHome=", "Wants=", "After=", "PrivateTmp=", "ProtectSystem="),
    *("ProtectKernelLogs=", "ProtectKernelTunables="),  # no mounts over /proc in a virtual machine
)


def write_units(folder: Path, port: int) -> None:
    """The project's own units around the fake engine, for a user's manager and an impatient
    watchdog."""
    program = [str(FAKE_ENGINE_DAEMON), "serve", "serve", str(folder / "marker"), "serve"]
    options = ["--processes", "two", "--devices", "cpu,cpu"]
    unit = (ROOT / "systemd" / "pipeserve.service").read_text()
    assert unit.count("StartLimitBurst=5") == 1
    unit = unit.replace("StartLimitBurst=5", "StartLimitBurst=50")
    lines = []
    for line in unit.splitlines():
        if line.startswith("ExecStart="):
            line = f"ExecStart={sys.executable} {' '.join([*program, *options])}"
            lines += [f"Environment=PYTHONPATH={ROOT} HOME={Path.home()}", "WatchdogSec=4"]
            lines.append(f"StandardError=append:{folder}/log")
        if not line.startswith(LEFT_OUT) or line.startswith("Environment=PYTHONPATH"):
            lines.append(line)
    units = folder / "units"
    units.mkdir()
    (units / "pipeserve.service").write_text("\n".join(lines))
    unit = (ROOT / "systemd" / "pipeserve.socket").read_text()
    (units / "pipeserve.socket").write_text(unit.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))


async def main_pid(manager: ServiceManager) -> int:
    shown = await asyncio.to_thread(manager.show, "pipeserve.service", "MainPID")
    return int(shown["MainPID"])


async def test_the_units_under_systemd(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    write_units(tmp_path, port)
    url = f"http://127.0.0.1:{port}"
    with service_manager(tmp_path) as manager:
        every_request_connects = TCPConnector(force_close=True)
        async with ClientSession(connector=every_request_connects) as session, asyncio.timeout(100):
            manager.run("start", "pipeserve.socket")
            assert await ask(session, url) == 200  # the socket unit starts the service for it
            shown = manager.show("pipeserve.service", "ActiveState", "StatusText", "Type")
            assert shown == {
                "ActiveState": "active",
                "StatusText": "serving demo",
                "Type": "notify",
            }
            for number in (signal.SIGKILL, signal.SIGSTOP):  # the watchdog ends a stopped one
                pid = await main_pid(manager)
                os.kill(pid, number)
                assert await ask(session, url) == 200
                assert not is_running(pid)
            pid = await main_pid(manager)
            manager.run("reload", "pipeserve.service")
            manager.run("restart", "--no-block", "pipeserve.service")
            assert await ask(session, url) == 200
            await asyncio.to_thread(manager.run, "stop", "pipeserve.socket", "pipeserve.service")
            shown = manager.show("pipeserve.service", "ActiveState", "Result", "ExecMainStatus")
            assert shown == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
