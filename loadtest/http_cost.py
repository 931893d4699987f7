"""What the HTTP half costs: processor time per streamed token, and how late tokens come.

    python loadtest/http_cost.py --streams 256 --step-ms 10

The real daemon with an engine that computes nothing: every --step-ms all streams get a token, one
event each. All processor time of the daemon's process counts while all streams run (of the engine
process, if there is one, none: it stands for the GPU half).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daemons import FAKE_ENGINE_DAEMON, running_daemon, wait_ready
from streams import percentile, positive
from workloads import chat

REQUEST = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\n\r\n{body}"
)
EVENT_WITH_TEXT = b'"delta":{"content":'
"""Only how a chunk of a token begins; the opening chunk has a role first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of the time in which all streams ran."""

    cpu_s: float
    wall_s: float
    tokens: int
    delays_s: Sequence[float]
    """From a step's end to the arrival of its tokens at the client, modulo the step."""
    tokens_per_read: float


class Stream(asyncio.Protocol):
    """One request on one connection; counts what arrives and does not parse it, to be fast."""

    def __init__(self, index: int, max_tokens: int, step_s: float) -> None:
        body = json.dumps(
            {
                "model": "demo",
                "messages": chat(index),
                "max_tokens": max_tokens,
                "stream": True,
            }
        )
        self._request = REQUEST.format(length=len(body), body=body).encode()
        self._step_s = step_s
        self.num_tokens = 0
        self.num_reads = 0
        self.delays_s: list[float] = []
        loop = asyncio.get_running_loop()
        self.began = loop.create_future()
        self.ended = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        count = data.count(EVENT_WITH_TEXT)
        if count:
            self.num_tokens += count
            self.num_reads += 1
            self.delays_s.append(time.monotonic() % self._step_s)
            if not self.began.done():
                self.began.set_result(None)
        if data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"cut off after {self.num_tokens} tokens"))


def cpu_s(pid: int) -> float:
    """Processor time of a process and its threads so far."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in files) / 1e9


async def measure(url: str, pid: int, num_streams: int, max_tokens: int, step_s: float) -> Cost:
    match = re.fullmatch(r"http://(.+):(\d+)", url)
    assert match is not None
    loop = asyncio.get_running_loop()
    streams = [Stream(index, max_tokens, step_s) for index in range(num_streams)]
    for stream in streams:
        await loop.create_connection(lambda each=stream: each, match[1], int(match[2]))
    await asyncio.gather(*(stream.began for stream in streams))
    started_s, cpu_before_s = time.monotonic(), cpu_s(pid)
    before = [(each.num_tokens, each.num_reads, len(each.delays_s)) for each in streams]
    ended = [stream.ended for stream in streams]
    await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
    wall_s, used_s = time.monotonic() - started_s, cpu_s(pid) - cpu_before_s
    tokens = sum(each.num_tokens for each in streams) - sum(each[0] for each in before)
    reads = sum(each.num_reads for each in streams) - sum(each[1] for each in before)
    delays_s = [
        delay_s
        for stream, (_, _, first) in zip(streams, before, strict=True)
        for delay_s in stream.delays_s[first:]
    ]
    await asyncio.gather(*ended)
    return Cost(
        cpu_s=used_s,
        wall_s=wall_s,
        tokens=tokens,
        delays_s=delays_s,
        tokens_per_read=tokens / reads,
    )


COLUMNS = (
    "us/token",
    "tokens/s per core",
    "tokens/s",
    "core used",
    "tokens/read",
    "step to client p50, ms",
    "p99, ms",
)


def print_row(cost: Cost) -> None:
    """One run under COLUMNS."""
    p50_s, p99_s = (percentile(cost.delays_s, percent) or 0.0 for percent in (50, 99))
    values = (
        f"{cost.cpu_s / cost.tokens * 1e6:.2f}",
        f"{cost.tokens / cost.cpu_s:.0f}",
        f"{cost.tokens / cost.wall_s:.0f}",
        f"{cost.cpu_s / cost.wall_s:.1%}",
        f"{cost.tokens_per_read:.2f}",
        f"{p50_s * 1e3:.2f}",
        f"{p99_s * 1e3:.2f}",
    )
    cells = zip(COLUMNS, values, strict=True)
    print("  ".join(value.rjust(len(column)) for column, value in cells), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=positive, default=256, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=positive, default=500, help="default: %(default)s")
    parser.add_argument("--step-ms", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--processes", choices=("one", "two"), default="two")
    parser.add_argument("--runs", type=positive, default=3, help="default: %(default)s")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    step_s = options.step_ms / 1e3
    serve = ["--devices", "cpu", "--processes", options.processes, "--max-num-seqs", "1024"]

    async def run(daemon: subprocess.Popen[bytes]) -> None:
        url = await wait_ready(daemon, log)
        print("  ".join(COLUMNS))
        for _ in range(options.runs):
            print_row(await measure(url, daemon.pid, options.streams, options.max_tokens, step_s))

    with (
        tempfile.NamedTemporaryFile(prefix="http-cost-", suffix=".log") as log,
        running_daemon([str(FAKE_ENGINE_DAEMON), str(step_s)], serve, log) as daemon,
    ):
        asyncio.run(run(daemon))
    return 0


if __name__ == "__main__":
    sys.exit(main())
