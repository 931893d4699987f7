"""Profile: what a trace of a GPU says about decode steps. Pure arithmetic over kernels' times."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WAIT_US = 5.0
"""Gaps from here on are waits for the host: a graph's kernels follow each other more closely."""
NAME_LENGTH = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One kernel or copy on a card."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShare:
    """All runs of one kernel."""

    name: str
    us_per_step: float
    share: float
    """Of the time of all kernels, which may overlap."""
    count_per_step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CardProfile:
    """One card in a steady decode."""

    device: str
    num_concurrent: int
    """Sequences that decode in every step."""
    num_steps: int
    step_us: float
    """The length of the traced window per step."""
    idle_share: float
    """Of the window, in which no kernel and no copy runs."""
    wait_share: float
    """Of the window, in gaps of WAIT_US and more."""
    kernels: tuple[KernelShare, ...]
    """Those that take longest first."""


def make_profile(
    intervals: Iterable[Interval],
    *,
    device: str,
    num_concurrent: int,
    num_steps: int,
    window_us: tuple[float, float],
) -> CardProfile:
    """What lies in the window; kernels that reach beyond it count as far as they lie in it."""
    begin_us, end_us = window_us
    inside = [clipped for one in intervals if (clipped := _clip(one, begin_us, end_us))]
    gaps_us = _gaps(inside, begin_us, end_us)
    length_us = end_us - begin_us
    return CardProfile(
        device=device,
        num_concurrent=num_concurrent,
        num_steps=num_steps,
        step_us=length_us / num_steps,
        idle_share=sum(gaps_us) / length_us,
        wait_share=sum(gap for gap in gaps_us if gap >= WAIT_US) / length_us,
        kernels=_shares(inside, num_steps),
    )


def short_name(name: str) -> str:
    """A C++ kernel without return type, namespaces and arguments; a Triton kernel as it is."""
    if "(" not in name and "<" not in name:
        return name[:NAME_LENGTH]
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    head = re.split(r"[<(]", plain, maxsplit=1)[0]
    base = head.rsplit("::", 1)[-1].strip()
    # What an elementwise kernel of torch computes is named by its arguments alone.
    functors = re.findall(r"(\w+)(?:Functor|_kernel_cuda|_kernel_impl)\b", plain[len(head) :])
    detail = f" {functors[0]}" if functors else ""
    return f"{base}{detail}"[:NAME_LENGTH]


def _clip(interval: Interval, begin_us: float, end_us: float) -> Interval | None:
    start_us, stop_us = max(interval.start_us, begin_us), min(interval.end_us, end_us)
    if start_us >= stop_us:
        return None
    return Interval(name=interval.name, start_us=start_us, end_us=stop_us)


def _gaps(intervals: Iterable[Interval], begin_us: float, end_us: float) -> list[float]:
    """Lengths of the stretches that no interval covers."""
    gaps, covered_us = [], begin_us
    for interval in sorted(intervals, key=lambda interval: interval.start_us):
        if interval.start_us > covered_us:
            gaps.append(interval.start_us - covered_us)
        covered_us = max(covered_us, interval.end_us)
    return [*gaps, end_us - covered_us] if covered_us < end_us else gaps


def _shares(intervals: Sequence[Interval], num_steps: int) -> tuple[KernelShare, ...]:
    durations: defaultdict[str, list[float]] = defaultdict(list)
    for interval in intervals:
        durations[short_name(interval.name)].append(interval.end_us - interval.start_us)
    total_us = sum(map(sum, durations.values()))
    shares = [
        KernelShare(
            name=name,
            us_per_step=sum(of_one) / num_steps,
            share=sum(of_one) / total_us,
            count_per_step=len(of_one) / num_steps,
        )
        for name, of_one in durations.items()
    ]
    return tuple(sorted(shares, key=lambda share: share.us_per_step, reverse=True))
