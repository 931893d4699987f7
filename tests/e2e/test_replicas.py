"""Two replicas behind one endpoint, as real processes: both work, and one's death is its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.e2e.daemon_process import FAKE_ENGINE_DAEMON, DaemonProcess, daemon
from tests.processes import is_running

pytestmark = pytest.mark.usefixtures("demo_model_path")

OPTIONS = ("--layout", "replicas", "--processes", "two", "--max-num-seqs", "4")


def engine_pids(running: DaemonProcess) -> list[int]:
    return [line["pid"] for line in running.lines if line["event"] == "engine process started"]


class Chat:
    """A chat that is streamed; `began` once its first text is there."""

    def __init__(self, session: ClientSession, url: str, number: int, max_tokens: int) -> None:
        self.began = asyncio.Event()
        self.error: str | None = None
        self.num_tokens = 0
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": f"Tell me of the number {number}."}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self.task = asyncio.create_task(self._read(session, url, body))

    async def _read(self, session: ClientSession, url: str, body: dict[str, Any]) -> None:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.error = event["error"]["message"]
                    return
                if event.get("usage"):
                    self.num_tokens = event["usage"]["completion_tokens"]
                elif event["choices"][0]["delta"].get("content"):
                    self.began.set()


async def converse(
    session: ClientSession, running: DaemonProcess, *, max_tokens: int
) -> list[Chat]:
    """Four chats at once, all of which are answering."""
    chats = [Chat(session, running.url, number, max_tokens) for number in range(4)]
    await asyncio.gather(*(chat.began.wait() for chat in chats))
    return chats


async def finish(chats: Sequence[Chat]) -> None:
    await asyncio.gather(*(chat.task for chat in chats))


async def metrics(session: ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("pipeserve:"): float(value) for name, value in pairs}


async def health(session: ClientSession, url: str) -> tuple[int, str]:
    async with session.get(f"{url}/health") as response:
        return response.status, (await response.json())["reason"]


async def lose_one_and_get_it_back(
    running: DaemonProcess, *, num_tokens: int, start_s: float
) -> None:
    """num_tokens: of chats that last until one of their replicas is killed."""
    async with ClientSession() as session, asyncio.timeout(2 * start_s):
        chats = await converse(session, running, max_tokens=num_tokens)
        now = await metrics(session, running.url)
        assert now["num_requests_running"] == 4
        assert now["num_replicas_running"] == 2
        for replica in range(2):
            assert now[f'stage_busy_seconds_total{{replica="{replica}",stage="0"}}'] > 0
        pid = engine_pids(running)[0]
        os.kill(pid, signal.SIGKILL)
        await finish(chats)
        failed = [chat for chat in chats if chat.error is not None]
        assert len(failed) == 2
        assert all("was killed by SIGKILL" in str(chat.error) for chat in failed)
        assert [chat.num_tokens for chat in chats if chat.error is None] == [num_tokens] * 2
        await asyncio.to_thread(running.wait_for, "replica ready", start_s)
        assert await health(session, running.url) == (200, "ready")
        assert not is_running(pid)
        chats = await converse(session, running, max_tokens=20)
        await finish(chats)
        assert [chat.num_tokens for chat in chats] == [20] * 4
    running.signal()
    assert await asyncio.to_thread(running.wait) == 0
    assert not any(map(is_running, engine_pids(running)))


async def test_a_killed_replica_fails_its_own_requests_and_comes_back() -> None:
    with daemon(*OPTIONS) as running:
        await lose_one_and_get_it_back(running, num_tokens=80, start_s=60)


async def test_in_one_process_two_replicas_take_turns() -> None:
    with daemon("--layout", "replicas", "--processes", "one", "--max-num-seqs", "4") as running:
        async with ClientSession() as session, asyncio.timeout(60):
            chats = await converse(session, running, max_tokens=20)
            await finish(chats)
            assert [chat.num_tokens for chat in chats] == [20] * 4
            now = await metrics(session, running.url)
            assert now["num_replicas_running"] == 2
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0
    assert engine_pids(running) == []


async def test_auto_surveys_the_gpus_and_says_why_it_took_replicas(tmp_path: Path) -> None:
    """With an engine half that stands for two GPUs which do more apart."""
    command = [str(FAKE_ENGINE_DAEMON), "serve", "serve", str(tmp_path / "marker")]
    with daemon("--devices", "cuda:0,cuda:1", command=command, wait_ready=False) as running:
        layout = await asyncio.to_thread(running.wait_for, "layout")
        assert layout["replicas"] == 2
        assert "pipeline of 2 stages: 1000 output tokens/s" in layout["reason"]
        assert "2 replicas: 1200 output tokens/s" in layout["reason"]
        ready = await asyncio.to_thread(running.wait_for, "ready")
        assert (ready["replicas"], ready["stages"]) == (2, 4)
        surveyor, *engines = engine_pids(running)
        assert not is_running(surveyor)
        assert len(engines) == 2
        running.signal()
        assert await asyncio.to_thread(running.wait) == 0
        assert not any(map(is_running, engines))


@pytest.mark.gpu
@pytest.mark.timeout(600)
async def test_two_replicas_on_a_gpu() -> None:
    options = (*OPTIONS, "--devices", "cuda:0,cuda:0", "--kv-cache-bytes", "256MiB")
    with daemon(*options, wait_ready=False) as running:
        await asyncio.to_thread(running.wait_for, "ready", 300)  # kernels may have to be compiled
        await lose_one_and_get_it_back(running, num_tokens=4000, start_s=200)
