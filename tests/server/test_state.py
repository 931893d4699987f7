"""Loading, ready, draining, failed: what /health says and which requests are taken."""

from __future__ import annotations

import asyncio
import dataclasses

from pipeserve.engine.messages import EngineFailed, ReplicasChanged, SequencesFailed
from tests.server.conftest import Server
from tests.server.fakes import ScriptedEngine, text_answer

BODY = {"model": "tiny", "prompt": "hi"}


async def _health(server: Server) -> tuple[int, str]:
    async with server.http.get(f"{server.url}/health") as response:
        body = await response.json()
        assert body["detail"]
        return response.status, body["reason"]


async def _refusal(server: Server) -> str:
    async with server.http.post(f"{server.url}/v1/completions", json=BODY) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("server_error", "not_ready")
        return str(error["message"])


async def test_loading_then_ready(loading_server: Server) -> None:
    server = loading_server
    assert await _health(server) == (503, "loading")
    assert "loading" in await _refusal(server)
    async with server.http.get(f"{server.url}/v1/models") as response:
        assert response.status == 503
    async with server.http.get(f"{server.url}/metrics") as response:
        assert response.status == 200
    server.state.ready(server.services)
    assert await _health(server) == (200, "ready")
    assert (await server.post("/v1/completions", BODY))[0] == 200


async def test_draining_finishes_what_runs_and_takes_nothing_new(server: Server) -> None:
    server.engine.answer = text_answer("", ends=False)
    running = asyncio.create_task(server.post("/v1/completions", {**BODY, "stop": "never"}))
    await server.engine.until(lambda: len(server.engine.submitted) == 1)
    server.state.drain()
    assert await _health(server) == (503, "draining")
    assert "draining" in await _refusal(server)
    assert server.state.num_requests == 1
    idle = asyncio.create_task(server.state.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    server.engine.send(0, ord("a"), is_last=True)
    status, answer = await running
    assert status == 200
    assert answer["choices"][0]["text"] == "a"  # type: ignore[index]
    await idle


async def test_a_model_that_is_loaded_after_the_stop_is_not_served(loading_server: Server) -> None:
    loading_server.state.drain()
    loading_server.state.ready(loading_server.services)
    assert await _health(loading_server) == (503, "draining")


async def test_engine_failure_shows_in_health(server: Server) -> None:
    server.engine.fail("stage 0 raised: boom")
    assert await _health(server) == (503, "failed")
    assert "boom" in await _refusal(server)


async def test_an_engine_that_is_started_again_takes_requests_again(server: Server) -> None:
    server.engine.fail("the engine process was killed by SIGKILL")
    server.state.restart("after a failure: killed by SIGKILL")
    assert await _health(server) == (503, "restarting")
    assert "restarting: after a failure" in await _refusal(server)
    engine = ScriptedEngine()
    server.state.ready(dataclasses.replace(server.services, engine=engine.client))
    assert await _health(server) == (200, "ready")
    assert (await server.post("/v1/completions", BODY))[0] == 200
    assert len(engine.submitted) == 1
    engine.client.shut_down()


async def test_an_engine_that_misses_a_replica_is_degraded_and_takes_requests(
    server: Server,
) -> None:
    reason = "1 of 2 replicas take requests: replica 0 is gone (killed by SIGKILL)"
    server.engine.client.deliver(ReplicasChanged(degradation=reason))
    async with server.http.get(f"{server.url}/health") as response:
        assert response.status == 200
        assert await response.json() == {
            "status": "degraded",
            "reason": "degraded",
            "detail": reason,
        }
    assert (await server.post("/v1/completions", BODY))[0] == 200
    server.engine.client.deliver(ReplicasChanged(degradation=None))
    assert await _health(server) == (200, "ready")


async def test_a_failed_replica_fails_its_own_requests(server: Server) -> None:
    server.engine.answer = text_answer("", ends=False)
    running = [asyncio.create_task(server.post("/v1/completions", BODY)) for _ in range(2)]
    await server.engine.until(lambda: len(server.engine.submitted) == 2)
    cause = EngineFailed(error="replica 0: killed by SIGKILL", stalled=False)
    server.engine.client.deliver(SequencesFailed(seq_ids=(0,), cause=cause))
    server.engine.send(1, ord("a"), is_last=True)
    (status, answer), (other_status, _) = sorted(
        await asyncio.gather(*running), key=lambda each: -each[0]
    )
    assert (status, other_status) == (500, 200)
    assert "replica 0: killed by SIGKILL" in str(answer)
    assert server.engine.aborted == []


async def test_a_restart_does_not_undo_a_stop(server: Server) -> None:
    server.state.drain()
    server.state.restart("after a failure")
    assert await _health(server) == (503, "draining")
