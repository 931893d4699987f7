"""Request ids, the log line of a request, and the metrics."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from pipeserve.engine.stats import EngineStats, total_stats
from pipeserve.server import handlers
from tests.server.conftest import Server
from tests.server.fakes import text_answer

BODY = {"model": "tiny", "prompt": "secret words"}


async def _metrics(server: Server) -> dict[str, float]:
    """Samples by name, with their labels behind it."""
    async with server.http.get(f"{server.url}/metrics") as response:
        assert response.status == 200
        text = await response.text()
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sample.labels.items()): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_one_line_per_request_without_the_prompt(server: Server) -> None:
    with capture_logs() as lines:
        await server.post("/v1/completions", {**BODY, "n": 2, "seed": 1})
        await server.post("/v1/completions", {**BODY, "temperature": "secret"})
        await server.http.get(f"{server.url}/health")
    answered, refused, health = lines
    assert answered["event"] == "request finished"
    assert answered["log_level"] == "info"
    assert (answered["method"], answered["route"]) == ("POST", "/v1/completions")
    assert answered["status"] == 200
    assert answered["prompt_tokens"] == len("secret words") + 1
    assert answered["output_tokens"] == 2 * (len("Hello, world") + 1)
    assert answered["finish_reason"] == "stop"
    assert 0 < answered["ttft_s"] <= answered["duration_s"]
    assert answered["tokens_per_s"] > 0
    assert (refused["status"], refused["error"]) == (400, "invalid_request_error")
    assert health["log_level"] == "debug"
    assert "secret" not in str(lines)


async def test_request_id_is_taken_over_or_made(server: Server) -> None:
    url = f"{server.url}/v1/completions"
    headers = {"X-Request-Id": "job-7:a"}
    with capture_logs() as lines:
        async with server.http.post(url, json=BODY, headers=headers) as response:
            assert response.headers["X-Request-Id"] == "job-7:a"
        async with server.http.post(url, json={**BODY, "stream": True}) as response:
            made = response.headers["X-Request-Id"]
            await response.read()
    assert made.startswith("req-")
    assert [line["request_id"] for line in lines] == ["job-7:a", made]


async def test_metrics_of_requests(server: Server) -> None:
    before = await _metrics(server)
    server.engine.answer = text_answer("abc")
    await server.post("/v1/completions", BODY)
    await server.post("/v1/completions", {**BODY, "max_tokens": 2, "n": 2})
    after = await _metrics(server)
    gained = {name: after[name] - before[name] for name in after}
    assert gained["pipeserve:request_success_total finished_reason=stop"] == 1
    assert gained["pipeserve:request_success_total finished_reason=length"] == 2
    assert gained["pipeserve:request_success_total finished_reason=abort"] == 0
    assert gained["pipeserve:time_to_first_token_seconds_count"] == 2
    assert gained["pipeserve:e2e_request_latency_seconds_count"] == 2
    assert gained["pipeserve:inter_token_latency_seconds_count"] == 3 + 2 * 1
    assert gained["pipeserve:inter_token_latency_seconds_bucket le=+Inf"] == 5
    assert gained["pipeserve:inter_token_latency_seconds_sum"] > 0


async def test_metrics_of_the_engine(server: Server) -> None:
    metrics = await _metrics(server)
    assert metrics["pipeserve:num_requests_running"] == 0
    assert metrics["pipeserve:num_requests_waiting"] == 1
    assert metrics["pipeserve:kv_cache_usage_perc"] == 0.25
    assert metrics["pipeserve:num_preemptions_total"] == 2
    assert metrics["pipeserve:prompt_tokens_total"] == 100
    assert metrics["pipeserve:generation_tokens_total"] == 50
    assert metrics["pipeserve:stage_busy_seconds_total stage=0"] == 1.5
    assert metrics["pipeserve:stage_busy_seconds_total stage=1"] == 2.5


async def test_metrics_of_replicas_name_each_one_of_their_stages(server: Server) -> None:
    stats = EngineStats.of_nothing(2)
    stats = dataclasses.replace(stats, num_blocks=1, stage_busy_s=(1.0, 2.0), num_live_replicas=1)
    gone = dataclasses.replace(stats, stage_busy_s=(3.0, 4.0), num_live_replicas=0)
    server.engine.stats = total_stats([stats, gone])
    metrics = await _metrics(server)
    busy_s = [
        metrics[f"pipeserve:stage_busy_seconds_total replica={replica} stage={stage}"]
        for replica in range(2)
        for stage in range(2)
    ]
    assert busy_s == [1.0, 2.0, 3.0, 4.0]
    assert metrics["pipeserve:num_replicas_running"] == 1


async def test_metrics_outlive_an_engine_that_is_stuck_or_dead(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "STATS_TIMEOUT_S", 0.01)
    server.engine.answers_stats = False
    assert "pipeserve:num_requests_running" not in await _metrics(server)
    server.engine.answers_stats = True
    assert "pipeserve:num_requests_running" in await _metrics(server)
    server.engine.fail("stage 1 raised")
    metrics = await _metrics(server)
    assert "pipeserve:num_requests_running" not in metrics
    assert "pipeserve:e2e_request_latency_seconds_count" in metrics


async def test_tokens_that_are_ready_together_are_one_write(server: Server) -> None:
    """Counts HTTP chunks, which are what aiohttp makes of each write."""
    server.engine.answer = text_answer("abcdefgh", per_batch=4)
    reader, writer = await asyncio.open_connection(server.host, server.port)
    body = b'{"model": "tiny", "prompt": "a", "stream": true}'
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    writer.write(body)
    answer = await reader.read()
    writer.close()
    events = answer.count(b"data: ")
    chunk_sizes = [line for line in answer.split(b"\r\n") if line and b":" not in line][1:]
    sizes = [int(line, 16) for line in chunk_sizes if line.strip(b"0123456789abcdef") == b""]
    assert events == 8 + 1 + 1
    assert len([size for size in sizes if size]) == 2 + 1 + 1  # the end token came on its own
