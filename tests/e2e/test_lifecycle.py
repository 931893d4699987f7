"""Start, drain, stop and failure of the daemon as a process, with real signals and sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import ClientSession

from pipeserve.notify import ServiceNotifier
from tests.e2e.daemon_process import FAULTY_DAEMON, daemon

pytestmark = pytest.mark.usefixtures("demo_model_path")

LONG = {"model": "demo", "prompt": "Once", "max_tokens": 150, "ignore_eos": True, "stream": True}


async def read_stream(session: ClientSession, url: str, started: asyncio.Event) -> list[str]:
    """The data of every event of one long stream."""
    events = []
    async with session.post(f"{url}/v1/completions", json=LONG) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: "):
                events.append(line[6:].decode().strip())
                started.set()
    return events


async def health(session: ClientSession, url: str) -> tuple[int, str]:
    async with session.get(f"{url}/health") as response:
        return response.status, (await response.json())["reason"]


in_one_or_two_processes = pytest.mark.parametrize("processes", ["one", "two"])


@in_one_or_two_processes
async def test_sigterm_drains_then_stops(processes: str) -> None:
    with daemon("--processes", processes, "--drain-timeout-s", "90") as running:
        async with ClientSession() as session, asyncio.timeout(100):
            started = asyncio.Event()
            stream = asyncio.create_task(read_stream(session, running.url, started))
            await started.wait()
            running.signal()
            await asyncio.to_thread(running.wait_for, "draining")
            assert await health(session, running.url) == (503, "draining")
            async with session.post(f"{running.url}/v1/completions", json=LONG) as refused:
                assert refused.status == 503
                assert int(refused.headers["Retry-After"]) > 0
            events = await stream
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert await asyncio.to_thread(running.wait) == 0


async def test_a_second_sigterm_stops_now() -> None:
    with daemon() as running:
        async with ClientSession() as session, asyncio.timeout(60):
            started = asyncio.Event()
            stream = asyncio.create_task(read_stream(session, running.url, started))
            await started.wait()
            running.signal()
            await asyncio.to_thread(running.wait_for, "draining")
            running.signal()
            status = await asyncio.to_thread(running.wait)
            events = await stream
        assert "stopping" in json.loads(events[-1])["error"]["message"]
        assert status == 0
        assert any(line["event"] == "requests cut off" for line in running.lines)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (signal.SIGUSR1, "stage 1 failed: RuntimeError: told to fail"),
        (signal.SIGUSR2, "no step came back for 2 s"),
    ],
    ids=["raises", "blocks"],
)
async def test_a_stage_that_fails_ends_the_daemon_with_errors_for_its_requests(
    trouble: signal.Signals, message: str
) -> None:
    command = [str(FAULTY_DAEMON)]
    options = ("--stage-timeout-s", "2", "--processes", "one")
    with daemon(*options, command=command) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            started = asyncio.Event()
            stream = asyncio.create_task(read_stream(session, running.url, started))
            await started.wait()
            running.signal(trouble)
            events = await stream
            assert message in json.loads(events[-1])["error"]["message"]
        assert await asyncio.to_thread(running.wait) == 1
    (line,) = [line for line in running.lines if line["event"] == "engine failed"]
    assert message in line["error"]


async def test_health_says_loading_until_the_model_is_there(tmp_path: Path) -> None:
    with daemon(wait_ready=False) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            assert await health(session, running.url) == (503, "loading")
            async with session.post(f"{running.url}/v1/completions", json=LONG) as refused:
                assert refused.status == 503
            await asyncio.to_thread(running.wait_for, "ready")
            assert await health(session, running.url) == (200, "ready")


@in_one_or_two_processes
async def test_sigterm_while_loading_stops_at_once(processes: str) -> None:
    with daemon("--processes", processes, wait_ready=False) as running:
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0


def test_a_service_manager_that_does_not_read_holds_nothing_up(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.connect(address)
            with pytest.raises(BlockingIOError):
                while True:
                    sender.send(b"filler")
        ServiceNotifier({"NOTIFY_SOCKET": address}).status("lost, but not waited for")


def failed_start(*arguments: str) -> str:
    """What `pipeserve serve` writes when it does not start, without log lines."""
    command = [sys.executable, "-m", "pipeserve", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("pipeserve: ")]
    return message


def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path, demo_model_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_model_path.read_bytes()[:50_000_000])
    assert str(cut) in failed_start("--model", str(cut))
    assert "no such file" in failed_start("--model", "nothing.gguf")
    split = ("--devices", "cpu,cpu", "--layer-split", "10,10")
    assert "layer_split" in failed_start(*split, "--processes", "one")
    assert "layer_split" in failed_start(*split, "--processes", "two")


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in failed_start("--port", str(port))
