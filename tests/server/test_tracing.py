"""Spans of requests, as an exporter gets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from pipeserve.config import Config
from pipeserve.errors import ConfigError
from pipeserve.server.app import build_app, make_runner
from pipeserve.server.options import LiveOptions
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
    tracer = await asyncio.to_thread(RequestTracer, SimpleSpanProcessor(exporter))
    state, options, engine, pool = AppState(), LiveOptions(Config()), ScriptedEngine(), TextPool(1)
    engine.answer = text_answer("abc")
    runner = make_runner(build_app(state, options, tracer), options, shutdown_timeout_s=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    state.ready(make_services(engine, pool))
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}", exporter
    await runner.cleanup()
    pool.close()
    await asyncio.to_thread(tracer.close)


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
        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert f"{root.context.trace_id:032x}" == TRACE_ID
        assert root.parent is not None
        assert f"{root.parent.span_id:016x}" == PARENT_ID
        assert root.attributes is not None
        assert root.attributes["http.response.status_code"] == 200
        assert root.attributes["pipeserve.request_id"] == "job-7"
        assert root.attributes["gen_ai.usage.output_tokens"] == 4
        parts = [spans[name] for name in ("text", "first token", "decode")]
        times = [root.start_time]
        for part in parts:
            assert part.parent is not None
            assert part.parent.span_id == root.context.span_id
            assert part.start_time == times[-1] or part is parts[0]
            times.append(part.end_time)
        assert times == sorted(time for time in times if time is not None)
        assert times[-1] <= root.end_time
        assert "secret" not in "".join(span.to_json() for span in spans.values())


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
