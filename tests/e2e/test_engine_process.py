"""The daemon when its engine process dies, hangs or cannot be started again, and when it dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import pytest
from aiohttp import ClientSession

from tests.e2e.daemon_process import FAKE_ENGINE_DAEMON, FAULTY_DAEMON, DaemonProcess, daemon
from tests.processes import is_running

pytestmark = pytest.mark.usefixtures("demo_model_path")

LONG = {"model": "demo", "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
SHORT = {"model": "demo", "prompt": "Once", "max_tokens": 3, "ignore_eos": True}


async def broken_stream(
    session: ClientSession, running: DaemonProcess, number: signal.Signals
) -> str:
    """Sends the engine process a signal in the middle of a stream; returns the stream's error."""
    last = ""
    async with session.post(f"{running.url}/v1/completions", json=LONG) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: "):
                if not last:
                    os.kill(running.engine_pid, number)
                last = line[6:].decode()
    return str(json.loads(last)["error"]["message"])


async def answer(session: ClientSession, running: DaemonProcess) -> tuple[int, dict[str, str]]:
    async with session.post(f"{running.url}/v1/completions", json=SHORT) as response:
        await response.read()
        return response.status, dict(response.headers)


async def health(session: ClientSession, running: DaemonProcess) -> tuple[int, str]:
    async with session.get(f"{running.url}/health") as response:
        return response.status, (await response.json())["reason"]


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while is_running(pid):
            await asyncio.sleep(0.02)


def maps_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


async def test_an_engine_that_dies_is_started_again() -> None:
    troubles = [
        (signal.SIGKILL, "killed by SIGKILL"),
        (signal.SIGUSR2, "no step came back for 2 s"),
    ]
    options = ("--processes", "two", "--stage-timeout-s", "2")
    with daemon(*options, command=[str(FAULTY_DAEMON)]) as running:
        assert not maps_torch(running.process.pid)
        assert maps_torch(running.engine_pid)
        async with ClientSession() as session, asyncio.timeout(100):
            for number, message in troubles:
                pid = running.engine_pid
                assert message in await broken_stream(session, running, number)
                assert (await answer(session, running))[0] == 503
                await asyncio.to_thread(running.wait_for, "ready")
                assert not is_running(pid)
                assert (await answer(session, running))[0] == 200
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0
        assert not is_running(running.engine_pid)


@pytest.mark.gpu
@pytest.mark.timeout(600)
async def test_on_a_gpu_the_engine_process_is_the_default_and_comes_back() -> None:
    options = ("--devices", "cuda:0", "--kv-cache-bytes", "256MiB", "--max-num-seqs", "4")
    with daemon(*options, wait_ready=False) as running:
        await asyncio.to_thread(running.wait_for, "ready", 300)  # kernels may have to be compiled
        assert not maps_torch(running.process.pid)
        async with ClientSession() as session, asyncio.timeout(400):
            assert (await answer(session, running))[0] == 200
            pid = running.engine_pid
            assert "SIGKILL" in await broken_stream(session, running, signal.SIGKILL)
            await asyncio.to_thread(running.wait_for, "ready", 300)
            assert not is_running(pid)
            assert (await answer(session, running))[0] == 200
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0
        assert not is_running(running.engine_pid)


def fake_engine(first: str, later: str, folder: Path) -> list[str]:
    """The program of a daemon whose first engine process does one thing and later ones another."""
    return [str(FAKE_ENGINE_DAEMON), first, later, str(folder / "marker")]


TWO = ("--processes", "two", "--stage-timeout-s", "1")


async def test_an_engine_that_answers_nothing_is_replaced(tmp_path: Path) -> None:
    with daemon(*TWO, command=fake_engine("serve", "serve", tmp_path)) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            pid = running.engine_pid
            error = await broken_stream(session, running, signal.SIGSTOP)
            assert "answered nothing for 1 s (stage_timeout_s)" in error
            await asyncio.to_thread(running.wait_for, "ready")
            assert not is_running(pid)
            assert (await answer(session, running))[0] == 200


async def test_while_it_restarts_the_daemon_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(address))
        command = fake_engine("serve", "slow", tmp_path)
        environ = {"NOTIFY_SOCKET": str(address)}
        with daemon(*TWO, command=command, environ=environ) as running:
            async with ClientSession() as session, asyncio.timeout(60):
                await broken_stream(session, running, signal.SIGKILL)
                await asyncio.to_thread(running.wait_for, "engine process started")
                assert await health(session, running) == (503, "restarting")
                status, headers = await answer(session, running)
                assert (status, int(headers["Retry-After"]) > 0) == (503, True)
            running.signal()
            assert await asyncio.to_thread(running.wait) == 0
            await gone(running.engine_pid)
        listener.setblocking(False)
        told = []
        while "restarting" not in "".join(told):
            told.append(listener.recv(4096).decode())
    assert any("STATUS=restarting the engine: " in message for message in told)


async def test_a_restart_that_fails_ends_the_daemon(tmp_path: Path) -> None:
    command = fake_engine("serve", "unsupported", tmp_path)
    with daemon(*TWO, command=command) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            await broken_stream(session, running, signal.SIGKILL)
        assert await asyncio.to_thread(running.wait) == 1
    errors = [line["error"] for line in running.lines if line["event"] == "engine failed"]
    assert "SIGKILL" in errors[0]
    assert "architecture 'gpt5' is not built in" in errors[-1]


@pytest.mark.parametrize(("first", "event"), [("serve", "ready"), ("slow", "loading weights")])
async def test_an_engine_process_does_not_outlive_the_daemon(
    first: str, event: str, tmp_path: Path
) -> None:
    command = fake_engine(first, "exit", tmp_path)
    with daemon(*TWO, command=command, wait_ready=False) as running:
        await asyncio.to_thread(running.wait_for, event)
        assert is_running(running.engine_pid)
        running.process.kill()
        await gone(running.engine_pid)
