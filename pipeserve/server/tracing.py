"""RequestTracer: OpenTelemetry spans of requests, from the times that a request's record holds.

The event loop hands an ended request over; spans are made on a thread, since OpenTelemetry locks.
It is an optional dependency, imported only where traces are asked for.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeserve import __version__
from pipeserve.errors import ConfigError
from pipeserve.server.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """A request that ended at `ended_at`, by time.perf_counter."""

    record: RequestRecord
    name: str
    traceparent: str | None
    status: int | None
    ended_at: float


class RequestTracer:
    """One span per request, a child of the client's where it sends a traceparent, with spans for
    text work, for the wait until the first token (queue and prefill) and for decoding."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create({"service.name": "pipeserve", "service.version": __version__})
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("pipeserve", __version__)
        # From time.perf_counter, which records count by, to Unix time.
        self._epoch_s = time.time() - time.perf_counter()
        self._ended: queue.SimpleQueue[_Ended | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()

    @classmethod
    def exporting_to(cls, endpoint: str) -> RequestTracer:
        """Send spans to an OTLP collector over HTTP, in batches.

        Raises:
            ConfigError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError(
                f"otlp_endpoint is {endpoint!r}, but OpenTelemetry is not installed: "
                "pip install 'pipeserve[tracing]', or leave otlp_endpoint out"
            ) from None
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def request_ended(
        self, record: RequestRecord, *, name: str, traceparent: str | None, status: int | None
    ) -> None:
        """On the event loop; the record does not change any more.

        name: method and route, which hold nothing of the request's own. status: None where no
        answer was completed.
        """
        self._ended.put(
            _Ended(
                record=record,
                name=name,
                traceparent=traceparent,
                status=status,
                ended_at=time.perf_counter(),
            )
        )

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            self._trace(ended)

    def _trace(self, ended: _Ended) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        record = ended.record
        carrier = {} if ended.traceparent is None else {"traceparent": ended.traceparent}
        span = self._tracer.start_span(
            ended.name,
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=self._unix_ns(record.started_at),
            attributes=_describe(record, ended.status),
        )
        if record.error is not None:
            span.set_status(trace.StatusCode.ERROR, record.error)
        self._add_parts(trace.set_span_in_context(span), record, ended.ended_at)
        span.end(self._unix_ns(ended.ended_at))

    def _add_parts(self, context: Context, record: RequestRecord, now: float) -> None:
        times = (
            ("text", record.started_at, record.submitted_at),
            ("first token", record.submitted_at, record.first_token_at),
            ("decode", record.first_token_at, record.last_token_at),
        )
        for name, start, end in times:
            if start is not None:
                part = self._tracer.start_span(
                    name, context=context, start_time=self._unix_ns(start)
                )
                part.end(self._unix_ns(now if end is None else end))
                if end is None:
                    return  # it was cut off here

    def close(self) -> None:
        """Send what is left; blocks until that is done or given up."""
        self._ended.put(None)
        self._thread.join()
        self._provider.shutdown()

    def _unix_ns(self, perf_counter_s: float) -> int:
        return int((perf_counter_s + self._epoch_s) * 1e9)


def _describe(record: RequestRecord, status: int | None) -> dict[str, str | int]:
    """By OpenTelemetry's conventions for HTTP servers and generative AI, where they have a name."""
    described: dict[str, str | int] = {
        "pipeserve.request_id": record.request_id,
        "pipeserve.key": record.key_label,
    }
    if status is not None:
        described["http.response.status_code"] = status
    if record.prompt_tokens:
        described |= {
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
        }
    return described
