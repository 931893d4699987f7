"""Starts a daemon with a stage that is slow now and then, and loads it for minutes as a crowd does.

    python loadtest/soak.py --streams 500 --minutes 10 -- --devices cpu,cpu --max-num-seqs 512

What follows `--` goes to `pipeserve serve`. Of the requests, which stream chats, 10 % leave at a
random moment and 2 % are malformed. Ends with status 1 unless every answer was the expected one,
everything that requests held is free again, and memory, threads and handles have stayed flat.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any

import aiohttp
from daemons import SLOW_STAGE_DAEMON, log_lines, running_daemon, wait_ready
from resources import Sample, Trend, fit, take_sample
from streams import StreamFailed, percentile, positive, reason
from workloads import chat

MALFORMED_SHARE = 0.02
LEAVING_SHARE = 0.1
SETTLE_TIMEOUT_S = 120.0
"""For the last requests to end and the daemon to notice that all clients are gone."""
SAMPLE_INTERVAL_S = 2.0
LEARNING_SHARE = 0.25
"""Of the time: what processes take in it, such as memory for the first large batch, is no leak."""
URL = "/v1/chat/completions"

MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b'{"messages": [', 400),
    (b"\xff\xfe", 400),
    (b"[]", 400),
    (b'{"messages": []}', 400),
    (b'{"messages": "hello"}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 10000000}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "model": "nobody"}', 404),
)
"""Bodies, and the status of their answers."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What happened so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    itls_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    samples: list[Sample] = field(default_factory=list)


class Client:
    """One of the crowd: sends one request after another until the time is over."""

    def __init__(self, session: aiohttp.ClientSession, tally: Tally, seed: int) -> None:
        self._session = session
        self._tally = tally
        self._rng = random.Random(seed)
        self._indices = itertools.count(seed * 100_000)

    async def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            draw = self._rng.random()
            try:
                if draw < MALFORMED_SHARE:
                    outcome = await self._send_malformed()
                elif draw < MALFORMED_SHARE + LEAVING_SHARE:
                    outcome = await self._leave()
                else:
                    outcome = await self.ask()
            except (StreamFailed, aiohttp.ClientError, TimeoutError) as error:
                outcome = "unexpected"
                self._tally.surprises.append(reason(error))
            self._tally.outcomes[outcome] += 1

    async def _send_malformed(self) -> str:
        body, status = self._rng.choice(MALFORMED)
        async with self._session.post(URL, data=body) as response:
            answer = await response.json()
            if response.status != status or not answer["error"]["message"]:
                raise StreamFailed(f"{body!r} got {response.status}: {answer}")
        return "malformed"

    async def _leave(self) -> str:
        """Before the answer begins, or after some tokens of it; the connection is closed."""
        if self._rng.random() < 0.3:
            with_limit = asyncio.timeout(self._rng.uniform(0.0, 1.0))
            try:
                async with with_limit:
                    await self.ask()
            except TimeoutError:
                return "left"
            return "complete"
        await self.ask(leaves_after=self._rng.randint(1, 12))
        return "left"

    async def ask(self, *, leaves_after: int | None = None) -> str:
        """A streamed chat; read to its end, which is checked, or left after so many tokens."""
        max_tokens = self._rng.randint(16, 64)
        times = [time.perf_counter()]
        events: list[dict[str, Any]] = []
        async with self._session.post(URL, json=self._body(max_tokens)) as response:
            if response.status != 200:
                raise StreamFailed(f"status {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                events.append(json.loads(line[len(b"data: ") :]))
                if any(choice["delta"].get("content") for choice in events[-1].get("choices", ())):
                    times.append(time.perf_counter())
                if leaves_after is not None and len(times) > leaves_after:
                    response.close()
                    return "left"
        check_answer(events, max_tokens)
        self._note(times, max_tokens)
        return "complete"

    def _body(self, max_tokens: int) -> dict[str, Any]:
        return {
            "model": "demo",
            "messages": chat(next(self._indices)),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _note(self, times: list[float], num_tokens: int) -> None:
        self._tally.output_tokens += num_tokens
        if len(times) > 1:
            self._tally.ttfts_s.append(times[1] - times[0])
        self._tally.itls_s += (b - a for a, b in itertools.pairwise(times[1:]))


def check_answer(events: list[dict[str, Any]], max_tokens: int) -> None:
    """Raises StreamFailed unless a stream is whole."""
    errors = [event["error"]["message"] for event in events if "error" in event]
    if errors:
        raise StreamFailed(f"an error in mid-stream: {errors[0]}")
    reasons = [each["finish_reason"] for event in events for each in event.get("choices", ())]
    if not events or reasons[-1:] != ["length"] or reasons.count(None) != len(reasons) - 1:
        raise StreamFailed(f"a stream of {len(events)} events was cut off")
    usage = events[-1].get("usage")
    if not usage or usage["completion_tokens"] != max_tokens:
        raise StreamFailed(f"asked for {max_tokens} tokens, got {usage}")


async def metrics(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def make_session(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=SETTLE_TIMEOUT_S),
    )


async def sample_for_ever(pid: int, tally: Tally) -> None:
    while True:
        tally.samples.append(take_sample(pid))
        await asyncio.sleep(SAMPLE_INTERVAL_S)


async def load(url: str, pid: int, streams: int, seconds: float, tally: Tally) -> Sample:
    """All clients until the time is over and their last answers are complete; returns what the
    daemon held before the crowd came, but after a first request."""
    async with make_session(url) as session:
        await Client(session, Tally(), seed=0).ask()
    await asyncio.sleep(1.0)  # the daemon closes its end
    before = take_sample(pid)
    until_s = time.monotonic() + seconds
    async with make_session(url) as session:
        sampler = asyncio.create_task(sample_for_ever(pid, tally))
        clients = (Client(session, tally, seed) for seed in range(1, streams + 1))
        await asyncio.gather(*(client.run(until_s) for client in clients))
        if sampler.done():
            sampler.result()  # the daemon is gone
        sampler.cancel()
    tally.samples = [each for each in tally.samples if each.at_s <= until_s]
    return before


async def settled(url: str, pid: int, before: Sample) -> tuple[dict[str, float], Sample]:
    """Metrics and resources, once nothing is held any more or the patience is over."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        async with make_session(url) as session:
            values = await metrics(session)
        await asyncio.sleep(0.5)
        after = take_sample(pid)
        is_free = after.handles <= before.handles and not any(held(values).values())
        if is_free or time.monotonic() > deadline_s:
            return values, after


def held(values: dict[str, float]) -> dict[str, float]:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: values[f"pipeserve:{name}"] for name in names}


def trends(samples: list[Sample]) -> dict[str, Trend]:
    """Of memory in MB, threads and handles, from when the daemon has met its load."""
    kept = samples[int(len(samples) * LEARNING_SHARE) :]
    times_s = [each.at_s for each in kept]
    return {
        "memory, MB": fit(times_s, [each.memory_bytes / 1e6 for each in kept]),
        "threads": fit(times_s, [each.threads for each in kept]),
        "handles": fit(times_s, [each.handles for each in kept]),
    }


def verdicts(
    tally: Tally,
    values: dict[str, float],
    before: Sample,
    after: Sample,
    log: IO[bytes],
    max_growth: float,
) -> dict[str, bool]:
    grown = trends(tally.samples)
    refused = sum(
        int(value) for name, value in values.items() if name.startswith("pipeserve:http_errors_t")
    )
    return {
        "every answer as expected": not tally.surprises and tally.outcomes["complete"] > 0,
        "errors counted = malformed sent": refused == tally.outcomes["malformed"],
        "no line of level error in the log": not any(
            line.get("level") in ("error", "critical", "not JSON") for line in log_lines(log)
        ),
        "nothing runs, waits or holds a block": not any(held(values).values()),
        f"memory grows by at most {max_growth:.0%}": grown["memory, MB"].growth
        <= max_growth * grown["memory, MB"].first,
        "threads do not grow": after.threads <= before.threads and grown["threads"].growth < 1,
        "handles do not grow": after.handles <= before.handles,
    }


def print_report(tally: Tally, seconds: float, before: Sample, after: Sample) -> None:
    def quantiles(values: list[float]) -> str:
        found = (percentile(values, percent) for percent in (50, 90, 99, 100))
        return " / ".join("-" if each is None else f"{each:.2f}" for each in found)

    print("requests:", ", ".join(f"{n} {name}" for name, n in sorted(tally.outcomes.items())))
    print(f"output tokens of complete answers: {tally.output_tokens}")
    print(f"TTFT p50 / p90 / p99 / most, s: {quantiles(tally.ttfts_s)}")
    print(f"ITL p50 / p90 / p99 / most, s: {quantiles(tally.itls_s)}")
    learning_s = seconds * LEARNING_SHARE
    for name, trend in trends(tally.samples).items():
        print(
            f"{name}: {trend.first:.1f} after {learning_s:.0f} s, {trend.last:.1f} after "
            f"{seconds:.0f} s by the fitted line ({trend.growth:+.1f}), most {trend.highest:.1f}"
        )
    tenth = max(1, len(tally.samples) // 10)
    series = (f"{each.memory_bytes / 1e6:.0f}" for each in tally.samples[::tenth])
    print("memory, MB, every tenth of the time:", " ".join(series))
    print(f"threads before and after: {before.threads}, {after.threads}")
    print(f"handles before and after: {before.handles}, {after.handles}")
    for surprise, count in Counter(tally.surprises).most_common(10):
        print(f"unexpected, {count} times: {surprise}")


async def soak(
    options: argparse.Namespace, daemon: subprocess.Popen[bytes], log: IO[bytes]
) -> bool:
    tally, seconds = Tally(), options.minutes * 60
    url = await wait_ready(daemon, log)
    before = await load(url, daemon.pid, options.streams, seconds, tally)
    values, after = await settled(url, daemon.pid, before)
    print_report(tally, seconds, before, after)
    found = verdicts(tally, values, before, after, log, options.max_memory_growth)
    for fact, holds in found.items():
        print(f"{'yes' if holds else 'NO '}  {fact}")
    return all(found.values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=positive, default=500, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument(
        "--delay", type=float, default=0.2, help="most that a step of a slow stage takes longer, s"
    )
    parser.add_argument(
        "--max-memory-growth", type=float, default=0.05, help="as a share; default: %(default)s"
    )
    parser.add_argument("serve", nargs="*", metavar="OPTION", help="of pipeserve serve, after --")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    program = [str(SLOW_STAGE_DAEMON), str(options.delay)]
    with tempfile.NamedTemporaryFile(prefix="soak-", suffix=".log", delete=False) as log:
        print(f"the daemon's log: {log.name}", flush=True)
        with running_daemon(program, options.serve, log) as daemon:
            is_good = asyncio.run(soak(options, daemon, log))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
