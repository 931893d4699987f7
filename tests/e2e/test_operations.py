"""What an operator does to the daemon: real signals, a service manager's sockets, kill -9."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from aiohttp import ClientPayloadError, ClientSession

from tests.e2e.daemon_process import FAKE_ENGINE_DAEMON, WITH_SOCKET, DaemonProcess, daemon
from tests.e2e.notify_socket import notify_socket
from tests.processes import is_running

pytestmark = pytest.mark.usefixtures("demo_model_path")

SHORT = {"model": "demo", "prompt": "Once", "max_tokens": 3, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 1000, "stream": True}


def fake_engine(folder: Path, first: str = "serve", later: str = "serve") -> list[str]:
    return [str(FAKE_ENGINE_DAEMON), first, later, str(folder / "marker")]


async def ask(
    session: ClientSession, url: str, body: dict[str, object] = SHORT, key: str | None = None
) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        await response.read()
        return response.status


async def health(session: ClientSession, url: str) -> str:
    async with session.get(f"{url}/health") as response:
        return str((await response.json())["reason"])


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while is_running(pid):
            await asyncio.sleep(0.02)


async def test_drain_timeout_s_cuts_off_what_still_runs_and_exits_with_0(tmp_path: Path) -> None:
    options = ("--processes", "two", "--drain-timeout-s", "0.3")
    with daemon(*options, command=fake_engine(tmp_path)) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            async with session.post(f"{running.url}/v1/completions", json=LONG) as response:
                await response.content.readline()
                running.signal()
                rest = await response.content.read()
        assert b"the daemon is stopping" in rest
        assert await asyncio.to_thread(running.wait) == 0
        assert any(line["event"] == "requests cut off" for line in running.lines)


async def test_sighup_follows_the_configuration(tmp_path: Path) -> None:
    old_key, new_key = "old-key-0123456789", "new-key-0123456789"
    keys, config = tmp_path / "keys", tmp_path / "config.toml"
    keys.write_text(f"alice {old_key}\n")
    config.write_text(f"api_keys_file = {str(keys)!r}\nprocesses = 'two'\n")
    with (
        notify_socket(tmp_path) as notified,
        daemon(
            *("--config", str(config)),
            command=fake_engine(tmp_path),
            environ=notified.environ(),
        ) as running,
    ):

        async def reload(event: str) -> dict[str, object]:
            notified.read()
            notified.messages.clear()
            before_us = time.monotonic_ns() // 1000
            running.signal(signal.SIGHUP)
            line = await asyncio.to_thread(running.wait_for, event)
            await asyncio.to_thread(notified.until, lambda message: "READY" in message)
            told = notified.read()
            assert told[0]["RELOADING"] == "1"
            assert before_us <= int(told[0]["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
            assert told[-1]["STATUS"] == "serving demo"
            return line

        async with ClientSession() as session, asyncio.timeout(60):
            assert await ask(session, running.url, key=old_key) == 200
            async with session.get(f"{running.url}/metrics") as response:
                assert 'queue_wait_seconds_count{key="alice"} 1.0' in await response.text()
            keys.write_text(f"bob {new_key}\n")
            config.write_text(
                f"api_keys_file = {str(keys)!r}\nprocesses = 'two'\nmax_body_bytes = 1024\n"
                "log_level = 'warning'\nblock_size = 8\n"
            )
            assert (await reload("reloaded"))["need_restart"] == ["block_size"]
            assert await ask(session, running.url, key=old_key) == 401
            assert await ask(session, running.url, key=new_key) == 200
            assert await ask(session, running.url, {"prompt": "x" * 2000}, key=new_key) == 413
            asked = [line for line in running.lines if line["event"] == "request finished"]
            assert [line.get("key") for line in asked] == ["alice"]  # later ones are below warning
            config.write_text(
                f"api_keys_file = {str(keys)!r}\nprocesses = 'two'\nmax_body_bytes = 1024\n"
                "log_level = 'debug'\n"
            )
            await reload("reloaded")
            await asyncio.to_thread(running.wait_for, "engine process: log level")
            os.kill(running.engine_pid, signal.SIGKILL)  # the next one is told as well
            await asyncio.to_thread(running.wait_for, "engine process: log level")
            await asyncio.to_thread(running.wait_for, "ready")
            config.write_text("max_body_bytes = 'many'\n")
            assert "max_body_bytes" in str(
                (await reload("reload failed, the options stay as they were"))["error"]
            )
            assert await ask(session, running.url, key=new_key) == 200
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0


async def test_an_unused_model_is_unloaded_and_the_next_request_brings_it_back(
    tmp_path: Path,
) -> None:
    with daemon("--idle-unload-s", "0.3", command=fake_engine(tmp_path)) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            for _ in range(2):
                pid = running.engine_pid
                await asyncio.to_thread(running.wait_for, "unloading")
                await gone(pid)
                assert await health(session, running.url) == "unloaded"
                answers = [ask(session, running.url) for _ in range(3)]
                assert await asyncio.gather(*answers) == [200] * 3
                assert running.engine_pid != pid
            await asyncio.to_thread(running.wait_for, "unloading")
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0


@pytest.mark.gpu
@pytest.mark.timeout(600)
async def test_a_gpu_is_given_back_while_nobody_asks() -> None:
    options = ("--devices", "cuda:0", "--kv-cache-bytes", "256MiB", "--max-num-seqs", "4")
    with daemon(*options, "--idle-unload-s", "1", wait_ready=False) as running:
        await asyncio.to_thread(running.wait_for, "unloading", 300)  # kernels may be compiled
        pid = running.engine_pid
        await gone(pid)  # and with it, all that it had on the card
        async with ClientSession() as session, asyncio.timeout(300):
            assert await ask(session, running.url) == 200
        assert running.engine_pid != pid
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0


async def test_a_model_that_does_not_come_back_fails_the_request(tmp_path: Path) -> None:
    command = fake_engine(tmp_path, "serve", "unsupported")
    with daemon("--idle-unload-s", "0.3", command=command) as running:
        await asyncio.to_thread(running.wait_for, "unloading")
        async with ClientSession() as session, asyncio.timeout(60):
            assert await ask(session, running.url) == 503
        assert await asyncio.to_thread(running.wait) == 1


@pytest.mark.parametrize(
    ("first", "event"),
    [
        ("serve", "listening"),
        ("serve", "engine process started"),
        ("slow", "loading weights"),
        ("serve", "ready"),
        ("serve", "draining"),
    ],
)
async def test_after_kill_9_the_next_start_is_clean(first: str, event: str, tmp_path: Path) -> None:
    options = ("--processes", "two")
    with daemon(*options, command=fake_engine(tmp_path, first), wait_ready=False) as running:
        if event == "draining":
            await asyncio.to_thread(running.wait_for, "ready")
            await kill_while_it_drains(running)
        else:
            if event != "listening":  # which the context has waited for
                await asyncio.to_thread(running.wait_for, event)
            running.process.kill()
        port = int(running.url.rpartition(":")[2])
        if any(line["event"] == "engine process started" for line in running.lines):
            await gone(running.engine_pid)
    with daemon(*options, command=fake_engine(tmp_path), port=port) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            assert await ask(session, running.url) == 200


async def kill_while_it_drains(running: DaemonProcess) -> None:
    """In the middle of a stream, too."""
    async with (
        ClientSession() as session,
        session.post(f"{running.url}/v1/completions", json=LONG) as response,
    ):
        await response.content.readline()
        running.signal()
        await asyncio.to_thread(running.wait_for, "draining")
        running.process.kill()
        with pytest.raises(ClientPayloadError):
            await response.content.read()


def test_the_service_manager_is_told_of_every_phase(tmp_path: Path) -> None:
    with notify_socket(tmp_path) as notified:
        environ = notified.environ(WATCHDOG_USEC="400000")
        options = ("--processes", "two", "--drain-timeout-s", "7")
        command = fake_engine(tmp_path)
        with daemon(*options, command=command, environ=environ) as running:
            notified.until(lambda message: "WATCHDOG" in message)
            running.signal()
            assert running.wait() == 0
        statuses = notified.values("STATUS")
        assert [status.split(",")[0] for status in statuses] == [
            "fetching demo",
            "loading stage 1 of 1",
            "serving demo",
            "draining 0 requests",
        ]
        extended_us = [int(value) for value in notified.values("EXTEND_TIMEOUT_USEC")]
        assert extended_us[0] == 60_000_000  # while it loads
        assert extended_us[-1] > 7_000_000  # while it drains
        order = [name for message in notified.read() for name in message]
        assert order.index("READY") < order.index("STOPPING")


async def test_connections_to_an_inherited_socket_wait_for_the_next_daemon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as held:
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        command = [str(WITH_SOCKET), str(held.fileno()), *fake_engine(tmp_path)]
        options = ("--processes", "two")
        async with ClientSession() as session, asyncio.timeout(100):
            early = asyncio.create_task(ask(session, url))
            with daemon(*options, command=command, pass_fds=[held.fileno()]) as running:
                assert await early == 200
                late = await stop_in_a_stream(running, session, url)
            assert not late.done()
            with daemon(*options, command=command, pass_fds=[held.fileno()]):
                assert await late == 200


async def stop_in_a_stream(
    running: DaemonProcess, session: ClientSession, url: str
) -> asyncio.Task[int]:
    """SIGTERM while a stream runs: the stream ends well. The request comes after the signal."""
    body = {**LONG, "max_tokens": 150}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        await response.content.readline()
        running.signal()
        await asyncio.to_thread(running.wait_for, "draining")
        late = asyncio.create_task(ask(session, url))
        events = (await response.content.read()).decode().split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert json.loads(events[-3][6:])["choices"][0]["finish_reason"] == "length"
    assert await asyncio.to_thread(running.wait) == 0
    return late


@pytest.mark.parametrize(
    ("text", "status"), [("some words, ", 200), ("a", 400)], ids=["words", "no cut"]
)
async def test_abandoned_calls_with_long_texts_disturb_nobody(
    text: str, status: int, tmp_path: Path
) -> None:
    """More of them than threads may be lost; the daemon's own tokenizer is at work."""
    body = json.dumps({"content": text * (7_500_000 // len(text))}).encode()
    with daemon("--processes", "two", command=fake_engine(tmp_path)) as running:
        async with ClientSession() as session, asyncio.timeout(60):
            for _ in range(16):
                _, writer = await asyncio.open_connection(*running.url[7:].split(":"))
                head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n"
                writer.write(head.format(len(body)).encode() + body)
                await writer.drain()
                await asyncio.sleep(0.2)  # a thread is at work on it, as a rule
                writer.transport.abort()
                assert await health(session, running.url) == "ready"
            assert await ask(session, running.url) == 200
            assert await health(session, running.url) == "ready"
            async with session.post(f"{running.url}/tokenize", data=io.BytesIO(body)) as response:
                await response.read()
                assert response.status == status
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0


def test_sockets_of_another_process_are_left_alone() -> None:
    from pipeserve.notify import take_inherited_sockets

    environ = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDNAMES": "http"}
    assert take_inherited_sockets(environ) == []
    assert environ == {}
