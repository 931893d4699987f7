"""What processes hold, read from Linux's /proc: memory, threads, handles; and how it grows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process and all below it, together."""

    at_s: float
    """By time.monotonic."""
    memory_bytes: int
    """Resident."""
    threads: int
    handles: int
    """Open files, sockets among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """A line through samples: its ends, and the most that was seen."""

    first: float
    last: float
    highest: float

    @property
    def growth(self) -> float:
        return self.last - self.first


def take_sample(pid: int) -> Sample:
    """Raises OSError when the process is gone."""
    folders = [Path(f"/proc/{each}") for each in _family(pid)]
    statuses = [dict(_fields(folder / "status")) for folder in folders]
    return Sample(
        at_s=time.monotonic(),
        memory_bytes=sum(int(status["VmRSS"].split()[0]) for status in statuses) * 1024,
        threads=sum(int(status["Threads"]) for status in statuses),
        handles=sum(len(os.listdir(folder / "fd")) for folder in folders),
    )


def fit(times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """By least squares; needs two samples at different times."""
    mean_s, mean = sum(times_s) / len(times_s), sum(values) / len(values)
    covariance = sum((t - mean_s) * (v - mean) for t, v in zip(times_s, values, strict=True))
    slope = covariance / sum((t - mean_s) ** 2 for t in times_s)
    first, last = (mean + slope * (t - mean_s) for t in (times_s[0], times_s[-1]))
    return Trend(first=first, last=last, highest=max(values))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):  # the thread has ended
            for child in children.read_text().split():
                yield from _family(int(child))


def _fields(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        yield name, value.strip()
