"""Traces of a real daemon, at a collector that takes them and at one that never answers."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from aiohttp import ClientSession, web

from tests.e2e.daemon_process import FAKE_ENGINE_DAEMON, daemon

pytest.importorskip("opentelemetry.proto")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

pytestmark = pytest.mark.usefixtures("demo_model_path")

SHORT = {"model": "demo", "prompt": "Once", "max_tokens": 3, "ignore_eos": True}


def fake_engine(folder: Path) -> list[str]:
    return [str(FAKE_ENGINE_DAEMON), "serve", "serve", str(folder / "marker")]


async def ask(url: str) -> None:
    async with (
        ClientSession() as session,
        session.post(f"{url}/v1/completions", json=SHORT) as response,
    ):
        assert response.status == 200
        await response.read()


async def test_spans_of_queue_phases_and_stages_reach_the_collector(tmp_path: Path) -> None:
    spans: list[Span] = []

    async def take(request: web.Request) -> web.Response:
        batch = ExportTraceServiceRequest.FromString(await request.read())
        for resource in batch.resource_spans:
            for scope in resource.scope_spans:
                spans.extend(scope.spans)
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = "http://{}:{}/v1/traces".format(*runner.addresses[0])
    options = ("--processes", "two", "--otlp-endpoint", endpoint)
    with daemon(*options, command=fake_engine(tmp_path)) as running:
        await ask(running.url)
        running.signal()  # what has not been sent by then is sent now
        assert await asyncio.to_thread(running.wait) == 0
    await runner.cleanup()
    (root,) = [span for span in spans if span.name == "POST /v1/completions"]
    below = {span.name: span for span in spans if span.parent_span_id == root.span_id}
    assert set(below) == {"text", "queue", "prefill", "decode"}
    for phase in ("prefill", "decode"):
        stages = [span.name for span in spans if span.parent_span_id == below[phase].span_id]
        assert stages == ["stage 0", "stage 1"]


async def test_a_collector_that_never_answers_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        options = ("--processes", "two", "--otlp-endpoint", endpoint)
        with daemon(*options, command=fake_engine(tmp_path)) as running:
            await ask(running.url)
            running.signal()
            assert await asyncio.to_thread(running.wait) == 0
    events = [line["event"] for line in running.lines]
    assert "the collector takes no traces, the last are lost" in events
    assert events[-1] == "stopped"
