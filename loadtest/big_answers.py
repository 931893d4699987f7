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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

import aiohttp
from daemons import FAKE_ENGINE_DAEMON, running_daemon, wait_ready
from workloads import chat

NUM_STREAMS = 8
WARM_UP_S = 1.0
BIG_TIMEOUT_S = 120.0
WORDS = "some words and more of them, "


SCORED = {"echo": True, "logprobs": 20, "max_tokens": 1, "ignore_eos": True}

READER = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], open(sys.argv[2], "rb").read())
print(len(urllib.request.urlopen(request).read()))
"""


def big_requests(share: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, path and body; share: of the full sizes."""
    text, shorter = WORDS * int(260_000 * share), WORDS * int(100_000 * share)
    prompt = {"model": "demo", "prompt": [500] * int(32_000 * share), **SCORED}
    yield "nothing", "", {}
    yield "/tokenize", "/tokenize", {"content": text}
    yield "/tokenize with_pieces", "/tokenize", {"content": shorter, "with_pieces": True}
    messages = [{"role": "user", "content": text}]
    yield "/apply-template", "/apply-template", {"messages": messages}
    yield "echo with 20 logprobs", "/v1/completions", prompt
    yield "the same as a stream", "/v1/completions", {**prompt, "stream": True}


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
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", READER, url + path, file.name, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), BIG_TIMEOUT_S)
        if process.returncode != 0:
            raise RuntimeError(f"{path} failed")
        return int(output)


async def measure(url: str, share: float) -> None:
    gaps = Gaps()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        tasks = [
            asyncio.create_task(stream_for_ever(session, index, gaps))
            for index in range(NUM_STREAMS)
        ]
        tasks.append(asyncio.create_task(ask_health_for_ever(session, gaps)))
        await asyncio.sleep(WARM_UP_S)
        for name, path, body in big_requests(share):
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
    parser.add_argument("--share", type=float, default=1.0, help="of the full sizes")
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="of pipeserve serve, after --")
    options = parser.parse_args()
    program = [str(FAKE_ENGINE_DAEMON), str(options.step_ms / 1e3)]
    with tempfile.NamedTemporaryFile(prefix="big-answers-", suffix=".log") as log:
        with running_daemon(program, ["--devices", "cpu", *options.serve], log) as daemon:
            asyncio.run(_measure_when_ready(daemon, log, options.share))


async def _measure_when_ready(
    daemon: subprocess.Popen[bytes], log: IO[bytes], share: float
) -> None:
    await measure(await wait_ready(daemon, log), share)


if __name__ == "__main__":
    sys.exit(main())
