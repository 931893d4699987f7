"""What a client can hold up or use up, and where that ends."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from pipeserve.config import Config
from pipeserve.errors import ConfigError
from pipeserve.server.api_keys import ApiKeys
from pipeserve.server.chat_messages import MAX_MESSAGES
from pipeserve.server.connection import Connection
from pipeserve.server.incoming import MAX_JSON_VALUES, PROGRESS_BYTES
from pipeserve.server.text_pool import MAX_LOST, TextPool
from pipeserve.server.tools import MAX_TOOLS
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.long_texts import PART_LENGTH, byte_level_cutter
from pipeserve.text.tokenizer import Tokenizer
from tests.server.conftest import Server, running_server
from tests.server.fakes import text_answer

BODY = b'{"model": "tiny", "prompt": "hi"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}

# An endless program in few characters: every level multiplies the rounds by 10,000.
ENDLESS = "{% for a in range(10000) %}" * 8 + "{% endfor %}" * 8


@pytest.mark.parametrize(
    "data", [b"", b"POST /v1/comp", HEAD[:-2]], ids=["nothing", "line", "head"]
)
async def test_a_head_that_does_not_come_ends_the_connection(data: bytes) -> None:
    async with running_server(Config(client_timeout_s=0.2)) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(data)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_a_body_that_does_not_come_gets_408() -> None:
    async with running_server(Config(client_timeout_s=0.2)) as server:
        server.state.ready(server.services)
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(HEAD + BODY[:5])
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"}}")
        writer.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert (
            "client_timeout_s" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        )
        assert server.engine.submitted == []


async def test_a_body_that_comes_slowly_but_steadily_is_taken() -> None:
    """Longer than the timeout in all; each piece is what its clock begins anew with."""
    async with running_server(Config(client_timeout_s=0.5)) as server:
        server.state.ready(server.services)
        body = b'{"model": "tiny", "prompt": "hi"' + b" " * 5 * PROGRESS_BYTES + b"}"
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(HEAD.replace(b"%d" % len(BODY), b"%d" % len(body)))
        for first in range(0, len(body), PROGRESS_BYTES + 1):
            writer.write(body[first : first + PROGRESS_BYTES + 1])
            await asyncio.sleep(0.2)
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n")
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 ")


class HalfReadTransport(asyncio.Transport):
    """A socket whose client reads when the test says so."""

    num_unread = 1000
    is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.num_unread

    def abort(self) -> None:
        self.is_aborted = True


async def test_a_long_answer_is_not_cut_off_while_it_is_read() -> None:
    connection = Connection.__new__(Connection)  # only what waits for the client to read
    transport = HalfReadTransport()
    connection._loop, connection.transport = asyncio.get_running_loop(), transport
    connection._paused = False
    connection._limits = SimpleNamespace(patience_s=0.1)  # type: ignore[assignment]
    connection.pause_writing()
    for _ in range(10):
        await asyncio.sleep(0.03)
        transport.num_unread -= 10
    assert not transport.is_aborted
    async with asyncio.timeout(10):
        while not transport.is_aborted:  # it reads no more
            await asyncio.sleep(0.01)


async def test_a_client_that_does_not_read_is_cut_off_and_its_sequence_aborted() -> None:
    async with running_server(Config(client_timeout_s=0.2)) as server:
        server.engine.answer = lambda _: ([ord("a")] * 500 for _ in range(100_000))
        server.engine.client.facts = replace(server.engine.client.facts, context_length=10**9)
        server.state.ready(server.services)
        _, writer = await asyncio.open_connection(server.host, server.port, limit=1024)
        body = b'{"model": "tiny", "prompt": "a", "stream": true, "max_tokens": 50000000}'
        writer.write(HEAD.replace(b"%d" % len(BODY), b"%d" % len(body)) + body)
        await server.engine.until(lambda: server.engine.aborted == [0])
        writer.close()


async def test_further_connections_are_closed() -> None:
    async with running_server(Config(max_connections=2)) as server:
        held = [await asyncio.open_connection(server.host, server.port) for _ in range(2)]
        reader, writer = await asyncio.open_connection(server.host, server.port)
        async with asyncio.timeout(10):
            assert await _read_or_reset(reader) == b""
        writer.close()
        for _, other in held:
            other.close()
            await other.wait_closed()
        async with server.http.get(f"{server.url}/health") as response:
            assert response.status == 503


async def _read_or_reset(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def test_a_body_that_unpacks_to_more_than_the_limit_is_refused(server: Server) -> None:
    packed = gzip.compress(b" " * 50_000_000 + BODY)
    headers = {"Content-Encoding": "gzip"}
    url = f"{server.url}/v1/completions"
    async with server.http.post(url, data=packed, headers=headers) as response:
        assert response.status == 413
        assert "max_body_bytes" in (await response.json())["error"]["message"]


async def test_a_json_bomb_is_refused() -> None:
    async with running_server(Config()) as server:
        server.state.ready(server.services)
        bomb = b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
        status, answer = await server.post("/v1/completions", bomb)
        assert status == 400
        assert "recursion" in str(answer)
        bomb = b'{"model": "tiny", "prompt": [' + b"[]," * MAX_JSON_VALUES + b"[]]}"
        url = f"{server.url}/v1/completions"
        async with server.http.post(url, data=io.BytesIO(bomb)) as response:
            assert response.status == 400
            assert "commas and brackets" in await response.text()


@pytest.mark.parametrize(
    ("path", "field", "value", "most"),
    [
        ("/v1/chat/completions", "messages", CHAT["messages"] * (MAX_MESSAGES + 1), MAX_MESSAGES),
        ("/tokenize", "messages", CHAT["messages"] * (MAX_MESSAGES + 1), MAX_MESSAGES),
        ("/apply-template", "tools", [TOOL] * (MAX_TOOLS + 1), MAX_TOOLS),
        (
            "/apply-template",
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": ""}] * (MAX_MESSAGES + 1)}],
            MAX_MESSAGES,
        ),
    ],
    ids=["chat", "tokenize", "tools", "parts"],
)
async def test_lists_of_objects_are_bounded(
    path: str, field: str, value: object, most: int
) -> None:
    async with running_server() as server:
        server.state.ready(server.services)
        status, answer = await server.post(path, {**CHAT, field: value})
        assert status == 400
        assert f"a list of at most {most}" in str(answer)


async def test_what_is_no_http_gets_json(server: Server) -> None:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"hello there\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "bad_http")
    assert "\n" not in error["message"]


SECRET = "0123456789abcdef"


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\nalice {SECRET}\n\nfedcba9876543210  # without a label\n")
    return ApiKeys.read(path)


def test_a_key_without_a_label_is_named_by_its_hash(keys: ApiKeys) -> None:
    label = keys.label_of("Bearer fedcba9876543210")
    assert label.startswith("key-")
    assert "fedcba" not in label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("alice short", "line 1: the key has 5 characters; take at least 16"),
        (f"a b {SECRET}", "line 1: write `label key`"),
        (f"al/ice {SECRET}", "line 1: a label has"),
    ],
)
def test_a_wrong_keys_file_is_named_without_its_keys(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.read(path)
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ApiKeys.read(tmp_path / "absent")


async def test_only_known_keys_are_let_in_and_never_logged(keys: ApiKeys) -> None:
    async with running_server(keys=keys) as server:
        server.state.ready(server.services)
        url = f"{server.url}/v1/completions"
        cases = [
            ({}, 401),
            ({"Authorization": "Basic x"}, 401),
            ({"Authorization": "Bearer wrong-wrong-wrong"}, 401),
            ({"Authorization": f"bearer {SECRET}"}, 200),
        ]
        with capture_logs() as lines:
            for headers, status in cases:
                async with server.http.post(url, data=BODY, headers=headers) as response:
                    assert response.status == status
                    if status == 401:
                        assert response.headers["WWW-Authenticate"] == "Bearer"
                        assert (await response.json())["error"]["code"] == "invalid_api_key"
            for path in ("/health", "/metrics"):
                async with server.http.get(f"{server.url}{path}") as response:
                    assert response.status == 200
            async with server.http.get(f"{server.url}/v1/models") as response:
                assert response.status == 401
        assert [line.get("key") for line in lines][:4] == [None, None, None, "alice"]
        assert SECRET not in str(lines)


@pytest.mark.parametrize("path", ["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "a%00b"])
async def test_a_path_as_model_name_reads_no_file(server: Server, path: str) -> None:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(f"GET /v1/models/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))
    assert b"root:" not in answer


async def test_endless_templates_do_not_stop_other_text_work() -> None:
    async with running_server(Config(text_timeout_s=0.2)) as server:
        endless = ChatTemplate(ENDLESS, bos_token="", eos_token="")
        server.state.ready(replace(server.services, chat_template=endless))
        before = threading.active_count()
        posts = (server.post("/v1/chat/completions", CHAT) for _ in range(6))
        answers = await asyncio.gather(*posts)
        assert {status for status, _ in answers} == {503}
        server.state.ready(server.services)
        assert (await server.post("/v1/chat/completions", CHAT))[0] == 200
        assert (await _health(server)) == (200, "ready")
        async with asyncio.timeout(10):  # the threads of those jobs are gone
            while threading.active_count() > before + 2:
                await asyncio.sleep(0.02)


async def test_a_client_that_leaves_takes_its_text_work_along() -> None:
    async with running_server(Config(text_timeout_s=60)) as server:
        endless = ChatTemplate(ENDLESS, bos_token="", eos_token="")
        server.state.ready(replace(server.services, chat_template=endless))
        post = asyncio.create_task(server.post("/v1/chat/completions", CHAT))
        await asyncio.sleep(0.2)
        working = [thread for thread in threading.enumerate() if thread.name == "text"]
        post.cancel()
        async with asyncio.timeout(10):
            while all(thread.is_alive() for thread in working):
                await asyncio.sleep(0.02)
        server.state.ready(server.services)
        assert (await server.post("/v1/chat/completions", CHAT))[0] == 200


async def test_text_work_that_nothing_can_end_shows_in_health() -> None:
    release = threading.Event()  # stands for a call that never comes back to Python
    async with running_server() as server:
        pool = TextPool(2, stuck_after_s=0.1)
        server.state.ready(replace(server.services, text_pool=pool))
        for _ in range(MAX_LOST + 2):
            with pytest.raises(TimeoutError):
                await pool.run(0.02, release.wait)
        async with asyncio.timeout(10):
            while await _health(server) != (503, "failed"):
                await asyncio.sleep(0.02)
        release.set()
        async with asyncio.timeout(10):
            while await _health(server) != (200, "ready"):
                await asyncio.sleep(0.02)
        assert await pool.run(10, sum, (1, 2)) == 3
        pool.close()


async def test_jobs_wait_for_threads_that_take_long_to_end() -> None:
    """Without anybody else asking meanwhile, and with health as it was."""
    release = threading.Event()
    pool = TextPool(2)
    for _ in range(MAX_LOST + 2):
        with pytest.raises(TimeoutError):
            await pool.run(0.02, release.wait)
    job = asyncio.create_task(pool.run(20, int, "7"))
    await asyncio.sleep(0.05)
    assert not job.done()
    assert not pool.is_stuck
    release.set()
    assert await job == 7
    pool.close()


async def test_abandoned_tokenising_ends_between_parts_and_disturbs_nobody() -> None:
    """More calls than threads may be lost, each of a text that would take for ever."""
    started = threading.Semaphore(0)
    part_over = threading.Event()
    lengths: list[int] = []

    class SlowBackend:
        def encode_batch_fast(self, texts: list[str], **options: object) -> list[SimpleNamespace]:
            lengths.append(len(texts[0]))
            started.release()
            part_over.wait(0.2)  # nothing ends a call before it returns
            return [SimpleNamespace(ids=[0])]

    tokenizer = Tokenizer.__new__(Tokenizer)  # only what cuts and encodes
    tokenizer._cutter = byte_level_cutter(())
    tokenizer._backend = SlowBackend()  # type: ignore[assignment]
    endless = "words and " * 700_000
    async with running_server() as server:
        server.state.ready(server.services)
        pool = server.services.text_pool
        before = threading.active_count()
        for _ in range(2 * MAX_LOST):
            encode = partial(tokenizer.encode, endless, add_special_tokens=False)
            call = asyncio.create_task(pool.run(60, encode))
            await asyncio.to_thread(started.acquire)
            call.cancel()
            assert await _health(server) == (200, "ready")
        assert (await server.post("/v1/chat/completions", CHAT))[0] == 200
        part_over.set()
        async with asyncio.timeout(10):
            while threading.active_count() > before + 4:  # text and the test's own
                await asyncio.sleep(0.02)
        assert len(lengths) == 2 * MAX_LOST  # each ended after its first part
        assert max(lengths) < 2 * PART_LENGTH


async def test_a_pool_hands_on_results_and_errors_and_survives_late_ones() -> None:
    pool = TextPool(1)
    assert await pool.run(10, int, "7") == 7
    with pytest.raises(ValueError, match="invalid literal"):
        await pool.run(10, int, "x")
    for _ in range(20):  # the deadline meets the end of the job
        try:
            await pool.run(0.005, time.sleep, 0.005)
        except TimeoutError:
            continue
    assert await pool.run(10, int, "7") == 7
    pool.close()


async def test_a_request_waits_for_a_model_that_was_unloaded(server: Server) -> None:
    server.engine.answer = text_answer("back")
    server.state.unload()
    assert await _health(server) == (200, "unloaded")
    post = asyncio.create_task(server.post("/v1/completions", json.loads(BODY)))
    async with asyncio.timeout(10):
        await server.state.wait_wanted()
    assert not post.done()
    server.state.ready(server.services)
    status, answer = await post
    assert (status, answer["choices"][0]["text"]) == (200, "back")  # type: ignore[index]


async def test_a_stop_ends_the_wait_for_an_unloaded_model(server: Server) -> None:
    server.state.unload()
    post = asyncio.create_task(server.post("/v1/completions", json.loads(BODY)))
    async with asyncio.timeout(10):
        await server.state.wait_wanted()
    server.state.drain()
    assert (await post)[0] == 503
    await server.state.wait_idle()


async def test_unused_is_counted_from_the_last_request(server: Server) -> None:
    server.engine.answer = text_answer("", ends=False)
    post = asyncio.create_task(server.post("/v1/completions", json.loads(BODY)))
    await server.engine.until(lambda: len(server.engine.submitted) == 1)
    unused = asyncio.create_task(server.state.wait_unused(0.05))
    await asyncio.sleep(0.1)
    assert not unused.done()
    server.engine.send(0, ord("a"), is_last=True)
    await post
    async with asyncio.timeout(10):
        await unused


async def _health(server: Server) -> tuple[int, str]:
    async with server.http.get(f"{server.url}/health") as response:
        return response.status, (await response.json())["reason"]
