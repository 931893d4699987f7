"""A closed loop of N streams against an OpenAI-compatible server: tokens/s, TTFT, ITL.

    python loadtest/streams.py --streams 8 --requests 64 --max-tokens 64

Every request generates exactly --max-tokens tokens (ignore_eos). With /metrics there, also the
share of the time that each pipeline stage was busy. One event loop, one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import aiohttp
from workloads import WORKLOADS

_STAGE_BUSY = re.compile(
    r'^pipeserve:stage_busy_seconds_total\{(replica="(?P<replica>\d+)",)?stage="(?P<stage>\d+)"\} '
    r"(?P<busy_s>\S+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to run, as the command line says it."""

    url: str
    model: str | None
    streams: int
    requests: int
    max_tokens: int
    workload: str
    temperature: float
    warmup: int
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """One request: when its pieces of text came, and what the server counted."""

    ttft_s: float
    itls_s: tuple[float, ...]
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. Times between pieces of text, which are tokens unless the server joined some."""

    num_streams: int
    num_requests: int
    num_failed: int
    wall_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    stage_busy_shares: tuple[float, ...]
    """Empty where the server tells nothing of stages."""


class StreamFailed(Exception):
    """The server refused a request or broke its stream off."""


def reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile: the smallest value that percent % do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


async def stream_once(session: aiohttp.ClientSession, load: Load, index: int) -> StreamResult:
    body = {
        "model": load.model,
        "messages": WORKLOADS[load.workload](index),
        "max_tokens": load.max_tokens,
        "ignore_eos": True,
        "temperature": load.temperature,
        "seed": index,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    times = []
    usage = None
    async with session.post("/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise StreamFailed(f"status {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise StreamFailed(event["error"]["message"])
            if any(choice["delta"].get("content") for choice in event["choices"]):
                times.append(time.perf_counter())
            usage = event.get("usage") or usage
    if usage is None or not times:
        raise StreamFailed("the stream ended without text or without usage")
    return StreamResult(
        ttft_s=times[0] - started,
        itls_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
        num_prompt_tokens=usage["prompt_tokens"],
        num_output_tokens=usage["completion_tokens"],
    )


async def worker(
    session: aiohttp.ClientSession,
    load: Load,
    indices: Iterator[int],
    results: list[StreamResult],
    failures: list[str],
) -> None:
    """One stream: take the next request as soon as the last one is done."""
    for index in indices:
        try:
            results.append(await stream_once(session, load, index))
        except (StreamFailed, aiohttp.ClientError, TimeoutError) as error:
            failures.append(f"request {index}: {reason(error)}")


async def stage_busy_s(session: aiohttp.ClientSession) -> dict[tuple[int, int], float]:
    """Seconds that each stage of each replica has been busy since its start; empty without such
    metrics."""
    async with session.get("/metrics") as response:
        text = await response.text() if response.status == 200 else ""
    return {
        (int(match["replica"] or 0), int(match["stage"])): float(match["busy_s"])
        for match in _STAGE_BUSY.finditer(text)
    }


async def served_model(session: aiohttp.ClientSession) -> str:
    async with session.get("/v1/models") as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


async def measure(load: Load) -> tuple[Report, list[str]]:
    """Warm up, then run all requests and put the figures together."""
    async with aiohttp.ClientSession(
        load.url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=load.timeout),
    ) as session:
        load = dataclasses.replace(load, model=load.model or await served_model(session))
        warm_up = range(load.requests, load.requests + load.warmup)
        await asyncio.gather(*(stream_once(session, load, index) for index in warm_up))
        results: list[StreamResult] = []
        failures: list[str] = []
        indices = iter(range(load.requests))
        busy_before_s = await stage_busy_s(session)
        started = time.perf_counter()
        await asyncio.gather(
            *(worker(session, load, indices, results, failures) for _ in range(load.streams))
        )
        wall_s = time.perf_counter() - started
        busy_after_s = await stage_busy_s(session)
    shares = tuple(
        (busy_after_s[stage] - busy_before_s.get(stage, 0.0)) / wall_s
        for stage in sorted(busy_after_s)
    )
    return summarise(load, results, len(failures), wall_s, shares), failures


def summarise(
    load: Load,
    results: Sequence[StreamResult],
    num_failed: int,
    wall_s: float,
    stage_busy_shares: tuple[float, ...],
) -> Report:
    ttfts_s = [result.ttft_s for result in results]
    itls_s = [itl_s for result in results for itl_s in result.itls_s]
    num_output_tokens = sum(result.num_output_tokens for result in results)
    return Report(
        num_streams=load.streams,
        num_requests=load.requests,
        num_failed=num_failed,
        wall_s=wall_s,
        num_prompt_tokens=sum(result.num_prompt_tokens for result in results),
        num_output_tokens=num_output_tokens,
        output_tokens_per_s=num_output_tokens / wall_s,
        ttft_p50_s=percentile(ttfts_s, 50),
        ttft_p99_s=percentile(ttfts_s, 99),
        itl_p50_s=percentile(itls_s, 50),
        itl_p99_s=percentile(itls_s, 99),
        stage_busy_shares=stage_busy_shares,
    )


def print_table(report: Report) -> None:
    def milliseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1000:.1f}"

    shares = " ".join(f"{share:.1%}" for share in report.stage_busy_shares) or "-"
    rows = (
        ("streams", str(report.num_streams)),
        ("requests (failed)", f"{report.num_requests} ({report.num_failed})"),
        ("wall time, s", f"{report.wall_s:.2f}"),
        ("prompt tokens", str(report.num_prompt_tokens)),
        ("output tokens", str(report.num_output_tokens)),
        ("output tokens/s", f"{report.output_tokens_per_s:.1f}"),
        ("TTFT p50, ms", milliseconds(report.ttft_p50_s)),
        ("TTFT p99, ms", milliseconds(report.ttft_p99_s)),
        ("ITL p50, ms", milliseconds(report.itl_p50_s)),
        ("ITL p99, ms", milliseconds(report.itl_p99_s)),
        ("busy share per stage", shares),
    )
    for name, value in rows:
        print(f"{name:<22}{value}")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--streams", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--requests", type=positive, default=32, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="chat")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: greedy")
    parser.add_argument("--warmup", type=int, default=1, help="requests before the clock starts")
    parser.add_argument("--timeout", type=float, default=600.0, help="of one request, in seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object, not a table")
    return parser.parse_args(argv)


def main() -> int:
    options = vars(parse_arguments())
    as_json = options.pop("json")
    load = Load(**options)
    try:
        report, failures = asyncio.run(measure(load))
    except (StreamFailed, aiohttp.ClientError, TimeoutError) as error:
        print(f"{load.url}: {reason(error)}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print_table(report)
    for failure in failures[:5]:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
