"""How long answers of megabytes hold up everybody else: the daemon's event loop, and streams.

    python loadtest/big_answers.py

The real daemon with an engine that computes nothing (http_cost.py's). Some chats stream a token
every --step-ms and /health is asked without a pause, before and during each of the big requests:
what is reported is the longest gap of any stream and the longest wait for /health.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
from daemons import FAKE_ENGINE_DAEMON, running_daemon, wait_ready
from workloads import chat

NUM_STREAMS = 8
WARM_UP_S = 1.0
BIG_TIMEOUT_S = 120.0
WORDS = "some words and more of them, "


def big_requests() -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "nothing", "", {}
    yield "/tokenize, 7.5 MB", "/tokenize", {"content": WORDS * 260_000}
    yield (
        "/tokenize with_pieces, 3 MB",
        "/tokenize",
        {"content": WORDS * 100_000, "with_pieces": True},
    )
    yield "/apply-template, 7.5 MB", "/apply-template", {"messages": [_user(WORDS * 260_000)]}
    prompt = {"model": "demo", "prompt": [500] * 32_000, "max_tokens": 1, "ignore_eos": True}
    yield "echo of 32,000 tokens, 20 logprobs", "/v1/completions", {**prompt, **SCORED}
    yield (
        "the same as a stream",
        "/v1/completions",
        {**prompt, **SCORED, "stream": True},
    )


SCORED = {"echo": True, "logprobs": 20}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Gaps:
    """The longest time between two events of any stream, and for an answer of /health."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.stream_s = 0.0
        self.health_s = 0.0


async def stream_for_ever(session: aiohttp.ClientSession, index: int, gaps: Gaps) -> None:
    body = {"model": "demo", "messages": chat(index), "max_tokens": 100_000, "stream": True}
    async with session.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        last_s = None
        async for line in response.content:
            if line.startswith(b"data: "):
                now_s = time.monotonic()
                if last_s is not None:
                    gaps.stream_s = max(gaps.stream_s, now_s - last_s)
                last_s = now_s
    raise RuntimeError("a stream has ended")


async def ask_health_for_ever(session: aiohttp.ClientSession, gaps: Gaps) -> None:
    while True:
        begin_s = time.monotonic()
        async with session.get("/health") as response:
            response.raise_for_status()
            await response.read()
        gaps.health_s = max(gaps.health_s, time.monotonic() - begin_s)
        await asyncio.sleep(0.002)


async def ask(url: str, path: str, body: dict[str, Any]) -> int:
    """Bytes of the answer. From a process of its own, whose reading holds nobody up."""
    if not path:
        await asyncio.sleep(2.0)
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(body, file)
        file.flush()
        command = ["curl", "-sS", "--fail-with-body", "-o", "/dev/null", "-w", "%{size_download}"]
        process = await asyncio.create_subprocess_exec(
            *command, "-d", f"@{file.name}", url + path, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), BIG_TIMEOUT_S)
        if process.returncode != 0:
            raise RuntimeError(f"{path} failed: {output.decode()}")
        return int(output)


async def measure(url: str) -> None:
    gaps = Gaps()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        tasks = [
            asyncio.create_task(stream_for_ever(session, index, gaps))
            for index in range(NUM_STREAMS)
        ]
        tasks.append(asyncio.create_task(ask_health_for_ever(session, gaps)))
        await asyncio.sleep(WARM_UP_S)
        for name, path, body in big_requests():
            gaps.begin()
            begin_s = time.monotonic()
            num_bytes = await ask(url, path, body)
            print(
                f"{name}: {num_bytes / 1e6:.1f} MB in {time.monotonic() - begin_s:.1f} s; longest "
                f"gap of a stream {gaps.stream_s * 1e3:.0f} ms, wait for /health "
                f"{gaps.health_s * 1e3:.0f} ms",
                flush=True,
            )
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--step-ms", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="of pipeserve serve, after --")
    options = parser.parse_args()
    program = [str(FAKE_ENGINE_DAEMON), str(options.step_ms / 1e3)]
    with tempfile.NamedTemporaryFile(prefix="big-answers-", suffix=".log") as log:
        with running_daemon(program, ["--devices", "cpu", *options.serve], log) as daemon:
            asyncio.run(_measure_when_ready(daemon, log))


async def _measure_when_ready(daemon: Any, log: Any) -> None:
    await measure(await wait_ready(daemon, log))


if __name__ == "__main__":
    sys.exit(main())
