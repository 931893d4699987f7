"""How long a kernel takes on a GPU, and what share of the card's limit that is."""

# torch.cuda has no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch

from pipeserve.bench.ceilings import Ceilings

BYTES_BEYOND_CACHE = 300_000_000
"""Inputs of so many bytes in turn do not stay in the second level cache of any card."""
_REPLAYS = 7


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a kernel must move and compute at least."""

    num_bytes: float = 0
    """Read plus written."""
    flops: float = 0

    def limit_us(self, ceilings: Ceilings) -> float:
        """At the measured copy speed or the bf16 matrix rate, whichever takes longer."""
        copy_s = self.num_bytes / ceilings.copy_bytes_per_s
        return 1e6 * max(copy_s, self.flops / ceilings.matmul_flops_per_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One line of the table."""

    group: str
    model: str
    kernel: str
    size: str
    us: float
    limit_us: float
    note: str = ""

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.limit_us / self.us


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time per call of a CUDA graph that makes all of them, which have different inputs."""
    torch.cuda.synchronize()  # inputs may be made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
        stream.synchronize()
        # Not `with torch.cuda.graph`, which collects garbage each time.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
        graph.replay()
        times_ms: list[float] = []
        for _ in range(_REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) * 1e3 / len(calls)


def num_sets(num_bytes: int, *, least: int = 1, most: int = 128) -> int:
    """How many inputs of so many bytes leave the cache when they are read in turn."""
    return min(most, max(least, BYTES_BEYOND_CACHE // max(1, num_bytes) + 1))


_TITLES = ("kernel", "size", "us", "limit", "share", "")


def table_lines(times: Iterable[KernelTime]) -> Iterable[str]:
    """One per kernel, under a heading per group and model; made as the times come."""
    heading = None
    for time in times:
        if (time.group, time.model) != heading:
            heading = (time.group, time.model)
            yield f"\n{time.group}, {time.model}"
            yield _line(*_TITLES)
        yield _line(
            time.kernel, time.size, f"{time.us:.1f}", f"{time.limit_us:.1f}", f"{time.share:.0%}",
            time.note,
        )  # fmt: skip


def _line(kernel: str, size: str, us: str, limit: str, share: str, note: str) -> str:
    return f"{kernel:32} {size:>20} {us:>9} {limit:>9} {share:>6}  {note}".rstrip()


def as_json(ceilings: Ceilings, times: Sequence[KernelTime]) -> str:
    """Every field under its name, and the shares."""
    rows = [dataclasses.asdict(time) | {"share": time.share} for time in times]
    return json.dumps({"ceilings": dataclasses.asdict(ceilings), "times": rows}, indent=1)
