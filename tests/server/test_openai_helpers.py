"""What the openai package puts on top of the API: parsing, stream helpers, exceptions, retries, raw
answers, time-outs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from pipeserve.config import Config
from pipeserve.server.api_keys import ApiKeys
from pipeserve.server.responses import RETRY_AFTER_S
from pipeserve.text.chat_template import ChatTemplate
from tests.server.conftest import Server, running_server
from tests.server.fakes import text_answer
from tests.server.test_tools import HERMES_TEMPLATE
from tests.server.writing import writing_server

USER: Any = {"role": "user", "content": "hi"}
CHAT: Any = {"model": "tiny", "messages": [USER]}


class Weather(pydantic.BaseModel):
    city: Literal["Rome", "Köln"]


class Answer(pydantic.BaseModel):
    yes: bool
    why: Literal["so", "because"]


@pytest.fixture
async def hermes(server: Server) -> AsyncIterator[Server]:
    template = ChatTemplate(HERMES_TEMPLATE, bos_token="<|begin|>", eos_token="<|end|>")
    server.state.ready(replace(server.services, chat_template=template))
    yield server


@pytest.fixture
async def writing() -> AsyncIterator[Server]:
    async with writing_server() as server:
        yield server


async def test_events_of_the_stream_helper(server: Server) -> None:
    async with (
        server.async_openai() as client,
        client.chat.completions.stream(
            **CHAT, logprobs=True, stream_options={"include_usage": True}
        ) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    kinds = {event.type for event in events}
    assert kinds >= {"chunk", "content.delta", "content.done", "logprobs.content.delta"}
    snapshots = [event.snapshot for event in events if event.type == "content.delta"]
    assert snapshots[-1] == "Hello, world"
    (done,) = [event for event in events if event.type == "content.done"]
    assert done.content == "Hello, world"
    assert final.choices[0].message.content == "Hello, world"
    assert final.choices[0].logprobs is not None
    assert len(final.choices[0].logprobs.content or ()) == len("Hello, world")
    assert final.usage is not None
    assert final.usage.completion_tokens == len("Hello, world") + 1


def _sync_helpers(client: openai.OpenAI) -> tuple[str | None, list[str], list[str]]:
    with client.chat.completions.stream(**CHAT) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message.content
    with client.completions.create(model="tiny", prompt="a", stream=True) as pieces:
        texts = [piece.choices[0].text for piece in pieces]
    return final, deltas, texts


async def test_the_same_without_a_loop(server: Server) -> None:
    final, deltas, texts = await asyncio.to_thread(_sync_helpers, server.sync_openai())
    assert final == "".join(deltas) == "".join(texts) == "Hello, world"


async def test_calls_are_parsed_into_models(hermes: Server) -> None:
    hermes.engine.answer = text_answer(
        '<tool_call>\n{"name": "Weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    )
    tools = [openai.pydantic_function_tool(Weather)]
    async with hermes.async_openai() as client:
        answer = await client.chat.completions.parse(**CHAT, tools=tools)
        async with client.chat.completions.stream(**CHAT, tools=tools) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_completion()
    for completion in (answer, final):
        (call,) = completion.choices[0].message.tool_calls or ()
        assert call.function.parsed_arguments == Weather(city="Köln")
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert done.parsed_arguments == Weather(city="Köln")


async def test_a_demanded_call_always_parses(writing: Server) -> None:
    async with writing.async_openai() as client:
        for seed in range(6):
            answer = await client.chat.completions.parse(
                **CHAT,
                tools=[openai.pydantic_function_tool(Weather)],
                tool_choice={"type": "function", "function": {"name": "Weather"}},
                seed=seed,
                max_tokens=500,
            )
            (call,) = answer.choices[0].message.tool_calls or ()
            assert isinstance(call.function.parsed_arguments, Weather)


def _parse_without_a_loop(client: openai.OpenAI) -> Answer | None:
    answer = client.chat.completions.parse(**CHAT, response_format=Answer, max_tokens=500)
    with client.chat.completions.stream(**CHAT, response_format=Answer, max_tokens=500) as stream:
        for event in stream:
            if event.type == "content.done":
                assert isinstance(event.parsed, Answer)
    return answer.choices[0].message.parsed


async def test_parsing_without_a_loop(writing: Server) -> None:
    parsed = await asyncio.to_thread(_parse_without_a_loop, writing.sync_openai())
    assert isinstance(parsed, Answer)


async def test_an_answer_that_is_cut_is_said_to_be(writing: Server) -> None:
    async with writing.async_openai() as client:
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(**CHAT, response_format=Answer, max_tokens=2)


REFUSALS: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None]] = [
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"model": "other"}, openai.NotFoundError, "model"),
    ({"response_format": {"type": "x"}}, openai.BadRequestError, "response_format.type"),
]


@pytest.mark.parametrize(("fields", "kind", "param"), REFUSALS)
async def test_refusals_are_typed(
    server: Server, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    async with server.async_openai() as client:
        with pytest.raises(kind) as refusal:
            await client.chat.completions.create(**{**CHAT, **fields})
    assert refusal.value.param == param
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.request_id


async def test_what_is_not_served_is_not_found(server: Server) -> None:
    async with server.async_openai() as client:
        with pytest.raises(openai.NotFoundError) as refusal:
            await client.embeddings.create(model="tiny", input="a")
    assert refusal.value.code == "unknown_url"


async def test_too_large_a_body(server: Server) -> None:
    async with server.async_openai() as client:
        with pytest.raises(openai.APIStatusError) as refusal:
            await client.completions.create(model="tiny", prompt="x" * 70_000)
    assert refusal.value.status_code == 413


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text("me right-key-of-some-length\n")
    return ApiKeys.read(path)


async def test_a_wrong_key(keys: ApiKeys) -> None:
    async with running_server(Config(), keys) as server:
        server.state.ready(server.services)
        async with server.async_openai() as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(**CHAT)
            right = client.with_options(api_key="right-key-of-some-length")
            assert (await right.chat.completions.create(**CHAT)).choices


async def test_a_full_queue(server: Server) -> None:
    server.engine.answer = text_answer("a", ends=False)
    waiting = asyncio.create_task(
        server.post("/v1/completions", {"model": "tiny", "prompt": "a", "n": 8})
    )
    await server.engine.until(lambda: len(server.engine.submitted) == 8)
    async with server.async_openai() as client:
        with pytest.raises(openai.RateLimitError) as refusal:
            await client.chat.completions.create(**CHAT)
    assert refusal.value.code == "queue_full"
    waiting.cancel()
    await server.engine.until(lambda: len(server.engine.aborted) == 8)


async def test_the_package_comes_back_when_it_was_told_to(
    loading_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = loading_server
    waits_s: list[float] = []

    async def note(duration_s: float) -> None:
        waits_s.append(duration_s)
        if len(waits_s) == 2:
            server.state.ready(server.services)

    monkeypatch.setattr("openai._base_client.anyio.sleep", note)
    async with server.async_openai() as client:
        raw = await client.with_options(max_retries=4).chat.completions.with_raw_response.create(
            **CHAT
        )
    assert raw.parse().choices[0].message.content == "Hello, world"
    assert raw.retries_taken == 2
    assert waits_s == [RETRY_AFTER_S] * 2


async def test_while_it_is_loaded_one_try_is_a_server_error(loading_server: Server) -> None:
    async with loading_server.async_openai() as client:
        with pytest.raises(openai.InternalServerError) as refusal:
            await client.chat.completions.create(**CHAT)
    assert (refusal.value.status_code, refusal.value.code) == (503, "not_ready")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_does_not_wait_ends_its_sequence(
    server: Server, is_stream: bool
) -> None:
    server.engine.answer = lambda _: []
    async with server.async_openai() as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(**CHAT, stream=is_stream, timeout=0.2)
    await server.engine.until(lambda: server.engine.aborted == [0])


async def test_leaving_a_stream_ends_its_sequence(server: Server) -> None:
    server.engine.answer = text_answer("abc", ends=False)
    async with server.async_openai() as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content == "b":
                break
        await stream.close()
        await server.engine.until(lambda: server.engine.aborted == [0])


async def test_raw_answers(server: Server) -> None:
    async with server.async_openai() as client:
        raw = await client.chat.completions.with_raw_response.create(
            **CHAT, extra_headers={"X-Request-Id": "mine-1"}
        )
        assert raw.status_code == 200
        assert raw.headers["content-type"].startswith("application/json")
        assert raw.request_id == "mine-1"
        completion = raw.parse()
        assert completion.choices[0].message.content == "Hello, world"
        plain = await client.chat.completions.create(**CHAT)
        assert plain._request_id
        async with client.chat.completions.with_streaming_response.create(
            **CHAT, stream=True
        ) as response:
            lines = [line async for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(texts) == "Hello, world"
