"""A client that goes away frees its sequences at once; with the production runner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine

import pytest
import uvloop
from structlog.testing import capture_logs

from pipeserve.server.record import CLIENT_DISCONNECTED
from tests.server.conftest import Server, running_server
from tests.server.fakes import text_answer


async def _connect(server: Server, **fields: object) -> asyncio.StreamWriter:
    body = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
    ).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    writer.write(body)
    if fields.get("stream"):
        await reader.readuntil(b'"content":"a"')
    return writer


async def _leave_early(server: Server, *, is_stream: bool, num_choices: int) -> None:
    server.engine.answer = text_answer("a", ends=False)
    with capture_logs() as lines:
        writer = await _connect(server, stream=is_stream, n=num_choices)
        await server.engine.until(lambda: len(server.engine.submitted) == num_choices)
        writer.transport.abort()
        await server.engine.until(lambda: len(server.engine.aborted) == num_choices)
        await server.state.wait_idle()
        assert server.engine.client.num_live == 0
        server.engine.answer = text_answer("fine")
        status, _ = await server.post("/v1/completions", {"model": "tiny", "prompt": "a"})
        assert status == 200
    gone, fine = (line for line in lines if line["event"] == "request finished")
    assert gone["error"] == CLIENT_DISCONNECTED
    assert gone["finish_reason"] == "abort"
    assert gone["status"] is None
    assert "error" not in fine


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("num_choices", [1, 3])
async def test_sequences_are_aborted(server: Server, is_stream: bool, num_choices: int) -> None:
    await _leave_early(server, is_stream=is_stream, num_choices=num_choices)


@pytest.mark.parametrize("is_stream", [True, False])
def test_sequences_are_aborted_under_uvloop(is_stream: bool) -> None:
    async def run() -> None:
        async with running_server() as server:
            server.state.ready(server.services)
            await _leave_early(server, is_stream=is_stream, num_choices=2)

    uvloop.run(run())


async def test_clean_close_counts_as_gone_too(server: Server) -> None:
    server.engine.answer = text_answer("a", ends=False)
    writer = await _connect(server, stream=True)
    writer.close()
    await server.engine.until(lambda: server.engine.aborted == [0])


async def test_sixty_streams_of_which_every_third_leaves(server: Server) -> None:
    client = server.async_openai()

    async def stay() -> str:
        stream = await client.completions.create(
            model="tiny", prompt="stay", stream=True, max_tokens=100
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def leave() -> str:
        writer = await _connect(server, stream=True)
        writer.transport.abort()
        return ""

    long = text_answer("abc" * 20)
    endless = text_answer("a", ends=False)
    server.engine.answer = lambda submit: (
        long(submit) if bytes(submit.prompt_token_ids[1:]) == b"stay" else endless(submit)
    )
    gate = asyncio.Semaphore(6)

    async def within_capacity(visit: Callable[[], Coroutine[None, None, str]]) -> str:
        async with gate:
            return await visit()

    visits = [within_capacity(leave if index % 3 == 0 else stay) for index in range(60)]
    async with client:
        texts = await asyncio.gather(*visits)
    assert [text for text in texts if text] == ["abc" * 20] * 40
    await server.engine.until(lambda: len(server.engine.aborted) == 20)


async def test_client_that_does_not_read_does_not_hold_up_others(server: Server) -> None:
    server.engine.answer = text_answer("a" + "x" * 400, per_batch=50)
    writer = await _connect(server, stream=True, n=4)
    status, _ = await server.post("/v1/completions", {"model": "tiny", "prompt": "a"})
    assert status == 200
    writer.transport.abort()


async def test_requests_that_a_stopping_daemon_aborts_get_an_error(server: Server) -> None:
    server.engine.answer = text_answer("", ends=False)
    body = {"model": "tiny", "prompt": "a"}
    waiting = asyncio.create_task(server.post("/v1/completions", body))
    await server.engine.until(lambda: len(server.engine.submitted) == 1)
    server.engine.client.shut_down()
    status, answer = await waiting
    assert status == 503
    assert "stopping" in str(answer)
