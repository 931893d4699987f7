"""Spans of requests, as an exporter gets them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from pipeserve.config import Config
from pipeserve.errors import ConfigError
from pipeserve.server.app import build_app, make_runner
from pipeserve.server.metrics import Metrics
from pipeserve.server.options import LiveOptions
from pipeserve.server.record import RequestRecord
from pipeserve.server.state import AppState
from pipeserve.server.text_pool import TextPool
from pipeserve.server.tracing import RequestTracer
from tests.server.conftest import make_services
from tests.server.fakes import ScriptedEngine, text_answer

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"model": "tiny", "prompt": "secret words"}


@asynccontextmanager
async def traced_server() -> AsyncIterator[tuple[str, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    tracer = await asyncio.to_thread(RequestTracer, lambda: SimpleSpanProcessor(exporter))
    state, options, engine, pool = AppState(), LiveOptions(Config()), ScriptedEngine(), TextPool(1)
    engine.answer = text_answer("abc")
    engine.take_times = tracer.sequence_ended
    runner = make_runner(build_app(state, options, tracer), options, shutdown_timeout_s=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    state.ready(make_services(engine, pool))
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}", exporter
    await runner.cleanup()
    pool.close()
    assert await asyncio.to_thread(tracer.close, 10.0)


async def ended(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    async with asyncio.timeout(10):
        while True:
            for span in exporter.get_finished_spans():
                if span.name == name:
                    return span
            await asyncio.sleep(0.01)


async def test_a_request_is_a_span_with_its_parts_under_the_clients() -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "job-7"}
    async with traced_server() as (url, exporter), aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v1/completions", json=BODY, headers=headers) as response:
            assert response.status == 200
        root = await ended(exporter, "POST /v1/completions")
        await ended(exporter, "decode")
        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert f"{root.context.trace_id:032x}" == TRACE_ID
        assert root.parent is not None
        assert f"{root.parent.span_id:016x}" == PARENT_ID
        assert root.attributes is not None
        assert root.attributes["http.response.status_code"] == 200
        assert root.attributes["pipeserve.request_id"] == "job-7"
        assert root.attributes["gen_ai.usage.output_tokens"] == 4
        check_parts([spans[name] for name in ("text", "queue", "prefill", "decode")], root)
        for phase in (spans["prefill"], spans["decode"]):
            stages = [
                span
                for span in exporter.get_finished_spans()
                if span.parent is not None and span.parent.span_id == phase.context.span_id
            ]
            assert [stage.name for stage in stages] == ["stage 0", "stage 1"]
            for stage in stages:
                assert stage.attributes is not None
                assert stage.attributes["pipeserve.steps"] == 1
                assert phase.start_time <= stage.start_time <= stage.end_time <= phase.end_time
        assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())


def check_parts(parts: list[ReadableSpan], root: ReadableSpan) -> None:
    """They follow each other below the request's span."""
    times = [root.start_time]
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == root.context.span_id
        times += [part.start_time, part.end_time]
    # Some microseconds between the clock's readings for text and for the queue.
    assert times == sorted(time for time in times if time is not None)
    assert times[-1] <= root.end_time


async def test_every_choice_has_its_own_spans() -> None:
    async with traced_server() as (url, exporter), aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v1/completions", json={**BODY, "n": 3}) as response:
            assert response.status == 200
        await ended(exporter, "POST /v1/completions")
        choices = [
            span.attributes["pipeserve.choice"]
            for span in exporter.get_finished_spans()
            if span.name == "queue" and span.attributes is not None
        ]
        assert sorted(choices) == [0, 1, 2]


async def test_what_the_client_does_not_sample_is_not_traced() -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    async with traced_server() as (url, exporter), aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v1/completions", json=BODY, headers=headers) as response:
            assert response.status == 200
        async with http.post(f"{url}/v1/completions", json=BODY) as response:
            assert response.status == 200
        root = await ended(exporter, "POST /v1/completions")
        spans = exporter.get_finished_spans()
        assert {span.context.trace_id for span in spans} == {root.context.trace_id}
        assert f"{root.context.trace_id:032x}" != TRACE_ID


def test_a_collector_that_never_answers_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as collector:
        port = collector.getsockname()[1]
        tracer = RequestTracer.exporting_to(f"http://127.0.0.1:{port}/v1/traces")
        record = RequestRecord(request_id="job-7", metrics=Metrics())
        span = tracer.request_began(record, name="POST /x", client_traceparent=None)
        assert span is not None
        tracer.request_ended(span, record, status=200)
        assert not tracer.close(0.2)
        assert {thread.name for thread in tracer.threads if thread.is_alive()} >= {"tracer"}
        held, _ = collector.accept()  # it was asked
    held.close()  # now it fails
    for thread in tracer.threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in tracer.threads)


async def test_a_refused_request_is_an_error_and_polls_are_not_traced() -> None:
    async with traced_server() as (url, exporter), aiohttp.ClientSession() as http:
        for path in ("/health", "/metrics", "/nothing"):
            await http.get(f"{url}{path}")
        async with http.post(f"{url}/v1/completions", json={"model": "tiny"}) as response:
            assert response.status == 400
        root = await ended(exporter, "POST /v1/completions")
        assert not root.status.is_ok
        assert [span.name for span in exporter.get_finished_spans()] == [
            "text",
            "POST /v1/completions",
        ]


def test_traces_without_opentelemetry_name_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'pipeserve\[tracing\]'"):
        RequestTracer.exporting_to("http://localhost:4318/v1/traces")
