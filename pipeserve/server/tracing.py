"""RequestTracer: OpenTelemetry spans of requests and, by the times that the engine tells, of their
sequences: queue, prefill, decode, and what each stage did in the latter two.

The event loop begins a request's span; all others are made on a thread, which also ends them.
OpenTelemetry is an optional dependency, imported only where traces are asked for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeserve import __version__
from pipeserve.engine.messages import SequenceTimes, StageWork
from pipeserve.errors import ConfigError
from pipeserve.server.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

Attributes = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """A request that ended at `ended_s`."""

    span: Span
    record: RequestRecord
    status: int | None
    ended_s: float


class RequestTracer:
    """One span per request, a child of the client's where it sends a traceparent. Below it one for
    text work and, for every sequence, queue, prefill and decode; below the last two, one for each
    stage, from its first step for the sequence to its last. Times by time.monotonic."""

    def __init__(self, make_processor: Callable[[], SpanProcessor]) -> None:
        """make_processor: may start threads, for which nobody has to wait after `close`."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        resource = Resource.create({"service.name": "pipeserve", "service.version": __version__})
        others = frozenset(threading.enumerate())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(make_processor())
        self._tracer = self._provider.get_tracer("pipeserve", __version__)
        self._unix_s = time.time() - time.monotonic()
        """Unix time of the clock's zero."""
        self._ended: queue.SimpleQueue[_Ended | SequenceTimes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()
        self.threads = frozenset(threading.enumerate()) - others
        """That it started."""

    @classmethod
    def exporting_to(cls, endpoint: str) -> RequestTracer:
        """Send spans to an OTLP collector over HTTP, in batches; those that it does not take in
        time are dropped.

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
        return cls(lambda: BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def request_began(
        self, record: RequestRecord, *, name: str, client_traceparent: str | None
    ) -> Span | None:
        """The request's span, which request_ended ends; None where it is not to be recorded."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            name,
            context=_context(client_traceparent),
            kind=SpanKind.SERVER,
            start_time=self._unix_ns(record.started_at),
        )
        if not span.is_recording():
            return None
        own = span.get_span_context()
        record.traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-01"
        return span

    def request_ended(self, span: Span, record: RequestRecord, *, status: int | None) -> None:
        """On the event loop; the record does not change any more.

        status: None where no answer was completed.
        """
        ended = _Ended(span=span, record=record, status=status, ended_s=time.monotonic())
        self._ended.put(ended)

    def sequence_ended(self, times: SequenceTimes) -> None:
        """On the event loop; before or after its request has ended."""
        self._ended.put(times)

    def close(self, timeout_s: float) -> bool:
        """Send what is left; blocks until that is done. False where it was not in time: then it
        goes on, and ends with the process at the latest."""
        self._ended.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            if isinstance(ended, SequenceTimes):
                self._trace_sequence(ended)
            else:
                self._trace_request(ended)
        self._provider.shutdown()

    def _trace_request(self, ended: _Ended) -> None:
        from opentelemetry.trace import StatusCode

        span, record = ended.span, ended.record
        span.set_attributes(_describe(record, ended.status))
        if record.error is not None:
            span.set_status(StatusCode.ERROR, record.error)
        text_end_s = ended.ended_s if record.submitted_at is None else record.submitted_at
        self._add("text", _context(record.traceparent), record.started_at, text_end_s)
        span.end(self._unix_ns(ended.ended_s))

    def _trace_sequence(self, times: SequenceTimes) -> None:
        parent, mark = _context(times.mark.parent), times.mark
        choice = {"pipeserve.choice": mark.choice}
        begin_s = times.prefill[0].start_s if times.prefill else times.ended_s
        self._add("queue", parent, mark.submitted_s, begin_s, choice)
        for name, works in (("prefill", times.prefill), ("decode", times.decode)):
            if works:
                end_s = works[-1].end_s
                attributes = {**choice, "pipeserve.replica": times.replica, **_steps(works[0])}
                phase = self._add(name, parent, begin_s, end_s, attributes)
                self._add_stages(phase, works)
                begin_s = end_s

    def _add_stages(self, parent: Context, works: Sequence[StageWork]) -> None:
        for stage, work in enumerate(works):
            attributes = {"pipeserve.stage": stage, "pipeserve.busy_s": work.busy_s, **_steps(work)}
            self._add(f"stage {stage}", parent, work.start_s, work.end_s, attributes)

    def _add(
        self,
        name: str,
        parent: Context,
        start_s: float,
        end_s: float,
        attributes: Attributes | None = None,
    ) -> Context:
        """Returns what its own children take for a parent."""
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(
            name, context=parent, start_time=self._unix_ns(start_s), attributes=attributes
        )
        span.end(self._unix_ns(end_s))
        return set_span_in_context(span)

    def _unix_ns(self, time_s: float) -> int:
        return int((time_s + self._unix_s) * 1e9)


def _context(traceparent: str | None) -> Context:
    """Empty where there is none, or where a client sent what is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {} if traceparent is None else {"traceparent": traceparent}
    return TraceContextTextMapPropagator().extract(carrier, context=Context())


def _steps(work: StageWork) -> dict[str, int]:
    return {"pipeserve.steps": work.num_steps}


def _describe(record: RequestRecord, status: int | None) -> Attributes:
    """By OpenTelemetry's conventions for HTTP servers and generative AI, where they have a name."""
    described: dict[str, str | int | float] = {
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
    if record.ttft_s is not None:
        described["pipeserve.time_to_first_token_s"] = record.ttft_s
    return described
