"""Bytes that are no proper HTTP, over a raw socket: a clean answer or a close, and life goes on."""

from __future__ import annotations

import asyncio
import json

import pytest
from structlog.testing import capture_logs

from tests.server.conftest import Server

BODY = b'{"model": "tiny", "prompt": "hi"}'


def _post(body: bytes, headers: bytes = b"") -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\n" + headers + b"\r\n" + body
    )


async def _send(server: Server, data: bytes) -> bytes:
    """What the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(data)
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


async def _works(server: Server) -> bool:
    status, answer = await server.post("/v1/completions", json.loads(BODY))
    return status == 200 and answer["choices"][0]["text"] == "Hello, world"  # type: ignore[index]


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"hello there\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Request-Id: a\x0bb\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 1000 + b"\r\n",
        _post(BODY, b"Content-Length: -5\r\n"),
        _post(BODY, b"Content-Length: many\r\n"),
        _post(BODY, b"Content-Length: 5\r\nContent-Length: 6\r\n"),
        _post(b"ZZ\r\nrubbish\r\n0\r\n\r\n", b"Transfer-Encoding: chunked\r\n"),
        _post(b"5\r\nhello!!!\r\n0\r\n\r\n", b"Transfer-Encoding: chunked\r\n"),
        _post(b"this is not gzip", b"Content-Encoding: gzip\r\nContent-Length: 16\r\n"),
    ],
)
async def test_rubbish_gets_a_400_and_nothing_reaches_the_engine(
    server: Server, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await _send(server, data)
    assert not any(record.exc_info for record in caplog.records)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 ")), answer
    assert b"Traceback" not in answer
    assert server.engine.submitted == []
    assert await _works(server)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /v1/comp",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-",
        _post(BODY[:10], b"Content-Length: 33\r\n"),
        _post(b"21\r\n" + BODY[:10], b"Transfer-Encoding: chunked\r\n"),
    ],
)
async def test_half_a_request_then_gone(server: Server, data: bytes) -> None:
    _, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(data)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert await _works(server)
    assert len(server.engine.submitted) == 1


async def test_chunked_body_byte_by_byte(server: Server) -> None:
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    answer = await _send(server, _post(body, b"Transfer-Encoding: chunked\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_two_requests_in_one_packet(server: Server) -> None:
    request = b"GET /v1/models/tiny HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await _send(server, request + last)
    assert answer.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("given", [b"a b", b"x" * 129, b"\xff", b"<script>", b""], ids=repr)
async def test_request_id_that_is_not_sane_is_replaced(server: Server, given: bytes) -> None:
    headers = b"Content-Length: 33\r\nX-Request-Id: " + given + b"\r\n"
    answer = await _send(server, _post(BODY, headers))
    assert b"X-Request-Id: req-" in answer


async def test_control_characters_of_a_path_do_not_reach_the_log(server: Server) -> None:
    with capture_logs() as lines:
        answer = await _send(
            server, b"GET /a%0Ab%1B[31m HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert [line["route"] for line in lines] == ["/a%0Ab%1B[31m"]
