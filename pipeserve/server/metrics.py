"""Prometheus metrics: what requests observed, and the engine's counters at the time of a scrape.

Runs on the event loop, which is why nothing here locks. Names follow vLLM's metrics where both
have the same thing, so that dashboards carry over.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from pipeserve.engine.messages import FinishReason
from pipeserve.engine.stats import EngineStats
from pipeserve.engine.step_figures import ROW_BOUNDS, StepFigures
from pipeserve.server.api_keys import ANYBODY

_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0),
)


class _Histogram:
    """Counts seconds in buckets; one addition per observation, since one comes with every token."""

    __slots__ = ("_counts", "_name", "_sum_s", "_title")

    def __init__(self, name: str, title: str) -> None:
        self._name = name
        self._title = title
        self._counts = [0] * (len(_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect_left(_BUCKETS_S, seconds)] += times
        self._sum_s += seconds * times

    def family(self) -> HistogramMetricFamily:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*_BUCKETS_S, math.inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == math.inf else str(bound), total))
        return HistogramMetricFamily(
            self._name, self._title, buckets=buckets, sum_value=self._sum_s
        )


class Metrics(Collector):
    """All metrics of one daemon, in a registry of its own."""

    def __init__(self) -> None:
        self._time_to_first_token = _Histogram(
            "pipeserve:time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._inter_token_latency = _Histogram(
            "pipeserve:inter_token_latency_seconds", "Between two tokens of one sequence."
        )
        self._request_latency = _Histogram(
            "pipeserve:e2e_request_latency_seconds", "From a request's arrival to its last byte."
        )
        self._finished: Counter[FinishReason] = Counter(dict.fromkeys(FinishReason, 0))
        self._http_errors: Counter[int] = Counter()
        self._engine_stats: EngineStats | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def first_token(self, ttft_s: float) -> None:
        self._time_to_first_token.observe(ttft_s)

    def next_tokens(self, num_tokens: int, elapsed_s: float) -> None:
        """Tokens that arrived together count as spread evenly over the time since the last."""
        self._inter_token_latency.observe(elapsed_s / num_tokens, num_tokens)

    def sequence_finished(self, reason: FinishReason) -> None:
        self._finished[reason] += 1

    def request_finished(self, latency_s: float) -> None:
        self._request_latency.observe(latency_s)

    def request_refused(self, status: int) -> None:
        self._http_errors[status] += 1

    def render(self, engine_stats: EngineStats | None) -> bytes:
        """The text that Prometheus scrapes; without engine_stats the engine's part is left out."""
        self._engine_stats = engine_stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield self._time_to_first_token.family()
        yield self._inter_token_latency.family()
        yield self._request_latency.family()
        finished = CounterMetricFamily(
            "pipeserve:request_success", "Sequences that ended.", labels=["finished_reason"]
        )
        for reason, count in self._finished.items():
            finished.add_metric([reason.value], count)
        yield finished
        errors = CounterMetricFamily(
            "pipeserve:http_errors", "Requests answered with an error.", labels=["status"]
        )
        for status, count in self._http_errors.items():
            errors.add_metric([str(status)], count)
        yield errors
        yield GaugeMetricFamily(
            "pipeserve:engine_up",
            "1 while the engine answers; 0 while it is loaded, unloaded, stuck or dead.",
            value=self._engine_stats is not None,
        )
        if self._engine_stats is not None:
            yield from _engine_families(self._engine_stats)


def _engine_families(stats: EngineStats) -> Iterator[Metric]:
    gauges = (
        ("num_requests_running", "Sequences that hold a row.", stats.num_running),
        ("num_requests_waiting", "Sequences that wait for a row.", stats.num_waiting),
        ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", stats.kv_usage),
    )
    counters = (
        ("prefix_cache_queries", "Prompt tokens looked up.", stats.num_prefix_queries),
        ("prefix_cache_hits", "Of them, those found computed.", stats.num_prefix_hits),
        ("num_preemptions", "Sequences that gave up their blocks.", stats.num_preemptions),
        ("prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens),
        ("generation_tokens", "Tokens generated.", stats.num_generated_tokens),
    )
    for name, title, value in gauges:
        yield GaugeMetricFamily(f"pipeserve:{name}", title, value=value)
    for name, title, count in counters:
        yield CounterMetricFamily(f"pipeserve:{name}", title, value=count)
    yield from _stage_families(stats)
    yield _rows_family(stats.figures)
    yield _waits_family(stats.figures)
    if stats.num_replicas > 1:
        yield GaugeMetricFamily(
            "pipeserve:num_replicas_running",
            "Replicas that take sequences.",
            value=stats.num_live_replicas,
        )


def _stage_families(stats: EngineStats) -> Iterator[Metric]:
    """Their rates are shares of the time: what is neither busy nor a bubble had nothing to do."""
    figures = stats.figures
    families = (
        ("busy", "Seconds that a stage worked.", stats.stage_busy_s),
        ("bubble", "Seconds that it idled with work in flight.", figures.stage_bubble_s),
        ("hand_off", "Seconds that it was free for a step on its way.", figures.stage_hand_off_s),
    )
    labels = ["replica", "stage"] if stats.num_replicas > 1 else ["stage"]
    for name, title, seconds in families:
        family = CounterMetricFamily(f"pipeserve:stage_{name}_seconds", title, labels=labels)
        for index, value in enumerate(seconds):
            replica_and_stage = divmod(index, stats.stages_per_replica)
            family.add_metric([str(each) for each in replica_and_stage][-len(labels) :], value)
        yield family


def _rows_family(figures: StepFigures) -> Metric:
    totals = accumulate(figures.row_counts)
    bounds = [*map(str, ROW_BOUNDS), "+Inf"]
    return HistogramMetricFamily(
        "pipeserve:micro_batch_rows",
        "Sequences in one micro-batch.",
        buckets=list(zip(bounds, totals, strict=True)),
        sum_value=figures.num_rows,
    )


def _waits_family(figures: StepFigures) -> Metric:
    family = SummaryMetricFamily(
        "pipeserve:queue_wait_seconds",
        "From a sequence's arrival at the engine to its first row, by the label of its API key.",
        labels=["key"],
    )
    for account, wait in figures.waits.items():
        family.add_metric([account or ANYBODY], count_value=wait.count, sum_value=wait.sum_s)
    return family
