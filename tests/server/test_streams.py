"""Streams as bytes: framing by HTTP version, and clients that read slowly."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace

import pytest

from pipeserve.config import Config
from pipeserve.server.connection import Connection
from tests.server.conftest import Server, running_server
from tests.server.fakes import text_answer


def request(version: str, **fields: object) -> bytes:
    body = json.dumps({"model": "tiny", "prompt": "hi", "stream": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def text_of(events: bytes) -> str:
    """Of the events of one stream, which must all be whole."""
    lines = [line for line in events.split(b"\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines.pop() == b"data: [DONE]"
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def unchunked(data: bytes) -> bytes:
    """The body of a chunked message; asserts that the framing is whole."""
    body = b""
    while True:
        length, _, data = data.partition(b"\r\n")
        size = int(length, 16)
        chunk, data = data[:size], data[size:]
        assert data.startswith(b"\r\n")
        data = data[2:]
        if size == 0:
            assert data == b""
            return body
        body += chunk


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_streams_are_framed_as_the_http_version_asks(server: Server, version: str) -> None:
    server.engine.answer = text_answer("one token per step")
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(request(version, max_tokens=64))
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    assert is_chunked == (version == "1.1")
    assert text_of(unchunked(body) if is_chunked else body) == "one token per step"


async def test_a_client_that_reads_slowly_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "abcdefghij" * 4000
    is_paused, pause_writing = asyncio.Event(), Connection.pause_writing

    def note_pause(connection: Connection) -> None:
        is_paused.set()
        pause_writing(connection)

    monkeypatch.setattr(Connection, "pause_writing", note_pause)
    async with running_server(Config(client_timeout_s=30)) as server:
        server.engine.answer = text_answer(text)
        server.engine.client.facts = replace(server.engine.client.facts, context_length=10**6)
        server.state.ready(server.services)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
        writer.write(request("1.0", max_tokens=50_000))
        async with asyncio.timeout(60):
            await is_paused.wait()
            _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert text_of(body) == text
