"""Every way to be refused: OpenAI's error shape, the right status, a text that names the mend."""

from __future__ import annotations

import asyncio
import gzip
import threading
from dataclasses import replace

import openai
import pytest
from structlog.testing import capture_logs

from pipeserve.config import Config
from tests.server.conftest import Server, running_server
from tests.server.fakes import ByteTokenizer, text_answer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def _chat(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": MESSAGES, **fields}


def _text(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "hi", **fields}


def _error(answer: dict[str, object]) -> dict[str, object]:
    assert set(answer) == {"error"}
    error = answer["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    return error


TOOLS = [{"type": "function", "function": {"name": "f"}}]


def _named(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


WRONG_FIELDS = [
    (CHAT, {"messages": MESSAGES}, "model", "missing"),
    (CHAT, {"model": "tiny"}, "messages", "missing"),
    (CHAT, _chat(model=5), "model", "must be a string"),
    (CHAT, _chat(messages=[]), "messages", "at least 1"),
    (CHAT, _chat(messages="hi"), "messages", "must be a list"),
    (TEXT, _text(stop="x" * 501), "stop", "a string of at most 500 characters"),
    (TEXT, _text(stop=5), "stop", "stop is 5; it must be a string or a list"),
    (CHAT, _chat(messages=["hi"]), "messages[0]", "must be an object"),
    (CHAT, _chat(messages=[{"role": "user"}]), "messages[0].content", "missing"),
    (CHAT, _chat(messages=[{"role": "user", "content": None}]), "messages[0].content", "null"),
    (CHAT, _chat(messages=[{"role": "boss", "content": ""}]), "messages[0].role", "'system'"),
    (
        CHAT,
        _chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages[0].content[0].type",
        "must be 'text'",
    ),
    (
        CHAT,
        _chat(messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
        "messages[0].tool_calls[0].id",
        "missing",
    ),
    (CHAT, _chat(n=0), "n", "at least 1"),
    (CHAT, _chat(n=129), "n", "at most 128"),
    (CHAT, _chat(n=True), "n", "must be an integer"),
    (CHAT, _chat(n="2"), "n", "must be an integer"),
    (CHAT, _chat(stream="yes"), "stream", "true or false"),
    (CHAT, _chat(stream_options={"include_usage": True}), "stream_options", "set stream"),
    (CHAT, _chat(stream=True, stream_options=[]), "stream_options", "must be an object"),
    (CHAT, _chat(temperature="hot"), "temperature", "must be a number"),
    (CHAT, _chat(temperature=-1), "temperature", "between 0 and 100"),
    (CHAT, _chat(top_p=0), "top_p", "above 0"),
    (CHAT, _chat(top_p=1.5), "top_p", "at most 1"),
    (CHAT, _chat(top_k=-2), "top_k", "at least -1"),
    (CHAT, _chat(min_p=2), "min_p", "between 0 and 1"),
    (CHAT, _chat(presence_penalty=3), "presence_penalty", "between -2 and 2"),
    (CHAT, _chat(frequency_penalty=-3), "frequency_penalty", "between -2 and 2"),
    (CHAT, _chat(repetition_penalty=0), "repetition_penalty", "above 0"),
    (CHAT, _chat(max_tokens=0), "max_tokens", "at least 1"),
    (CHAT, _chat(max_tokens=1.5), "max_tokens", "must be an integer"),
    (CHAT, _chat(max_completion_tokens=-1), "max_completion_tokens", "at least 1"),
    (CHAT, _chat(max_tokens=2, min_tokens=3), "min_tokens", "between 0 and max_tokens"),
    (CHAT, _chat(seed="x"), "seed", "must be an integer"),
    (CHAT, _chat(seed=2**64), "seed", "at most"),
    (CHAT, _chat(stop=""), "stop", "at least 1 character"),
    (CHAT, _chat(stop=["a", 1]), "stop[1]", "must be a string"),
    (CHAT, _chat(stop=["a"] * 17), "stop", "at most 16"),
    (CHAT, _chat(stop_token_ids=[259]), "stop_token_ids", "from 0 to 258"),
    (CHAT, _chat(logit_bias={"word": 1}), "logit_bias", "must be token ids"),
    (CHAT, _chat(logit_bias={"259": 1}), "logit_bias", "from 0 to 258"),
    (CHAT, _chat(logit_bias={"5": 101}), "logit_bias.5", "at most 100"),
    (CHAT, _chat(logprobs=3), "logprobs", "true or false"),
    (CHAT, _chat(top_logprobs=3), "top_logprobs", "set logprobs to true"),
    (CHAT, _chat(logprobs=True, top_logprobs=21), "top_logprobs", "at most 20"),
    (CHAT, _chat(chat_template_kwargs=[]), "chat_template_kwargs", "must be an object"),
    (CHAT, _chat(tools=[{"type": "function"}]), "tools[0].function", "missing"),
    (CHAT, _chat(tools=[{"type": "custom", "custom": {}}]), "tools[0].type", "'function'"),
    (CHAT, _chat(tool_choice="auto"), "tool_choice", "send tools"),
    (CHAT, _chat(tools=TOOLS, tool_choice="sometimes"), "tool_choice", "'none', 'auto'"),
    (CHAT, _chat(tools=TOOLS, tool_choice=_named("g")), "tool_choice", "not among tools"),
    (CHAT, _chat(functions=[{}]), "functions", "send tools"),
    (CHAT, _chat(function_call="auto"), "function_call", "send tool_choice"),
    (CHAT, _chat(verbosity="low"), "verbosity", '"medium"'),
    (CHAT, _chat(audio={}), "audio", "leave it out"),
    (CHAT, _chat(modalities=["audio"]), "modalities", '["text"]'),
    (TEXT, {"model": "tiny"}, "prompt", "missing"),
    (TEXT, _text(prompt=5), "prompt", "prompt is 5; it must be a string or a list"),
    (TEXT, _text(prompt=[]), "prompt", "at least 1"),
    (TEXT, _text(prompt=[[]]), "prompt", "no tokens"),
    (TEXT, _text(prompt=["a", 1]), "prompt[1]", "must be a string"),
    (TEXT, _text(prompt=[1, "a"]), "prompt[1]", "must be an integer"),
    (TEXT, _text(prompt=[259]), "prompt", "from 0 to 258"),
    (TEXT, _text(prompt=[-1]), "prompt", "from 0 to 258"),
    (TEXT, _text(logprobs=21), "logprobs", "at most 20"),
    (TEXT, _text(logprobs=True), "logprobs", "must be an integer"),
    (TEXT, _text(prompt_logprobs=1), "prompt_logprobs", "send echo and logprobs"),
    (TEXT, _text(mirostat=1), "mirostat", "send 2"),
    (TEXT, _text(skip_special_tokens=False), "skip_special_tokens", "leave it out"),
    (TEXT, _text(max_tokens=0), "max_tokens", "set echo"),
    (TEXT, _text(echo=True, suffix="x"), "suffix", "leave one of them out"),
    (TEXT, _text(best_of=2), "best_of", "send 1"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "mend"),
    WRONG_FIELDS,
    ids=[f"{param}-{mend}" for _, _, param, mend in WRONG_FIELDS],
)
async def test_wrong_field(
    server: Server, path: str, body: dict[str, object], param: str, mend: str
) -> None:
    status, answer = await server.post(path, body)
    error = _error(answer)
    assert status == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert str(error["message"]).startswith(param.partition("[")[0].partition(".")[0])
    assert mend in str(error["message"])
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"modalities": ["text"], "store": False, "top_k": -1},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"},
        {"prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k"},
        {"safety_identifier": "s", "verbosity": "medium", "nobody knows": "this"},
    ],
)
async def test_unsupported_fields_that_ask_for_nothing_are_accepted(
    server: Server, fields: dict[str, object]
) -> None:
    status, answer = await server.post(CHAT, _chat(**fields))
    assert status == 200, answer


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (_chat(tempratur=1), "tempratur"),
        (_chat(messages=[{"role": "user", "content": "a", "colour": 1}]), "messages[0].colour"),
        (_chat(stream=True, stream_options={"usage": True}), "stream_options.usage"),
    ],
)
async def test_strict_fields_refuses_what_nobody_knows(body: dict[str, object], param: str) -> None:
    async with running_server(Config(strict_fields=True)) as server:
        server.state.ready(server.services)
        status, answer = await server.post(CHAT, body)
        assert (status, _error(answer)["param"]) == (400, param)
        known = _chat(user="me", tools=[{**TOOLS[0]}], parallel_tool_calls=True)
        assert (await server.post(CHAT, known))[0] == 200


async def test_suffix_needs_a_model_that_fills_in(server: Server) -> None:
    server.services.tokenizer.infill = None  # type: ignore[misc]
    status, answer = await server.post(TEXT, _text(suffix="x"))
    assert (status, _error(answer)["param"]) == (400, "suffix")
    assert "'tiny' has not" in str(_error(answer)["message"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"model": "tiny",}',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\\udc00\\ud800"}',
        b"[" * 50_000,
        b'{"model": "tiny", "prompt": "a", "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 10_000 + b"}",
    ],
)
async def test_malformed_json(server: Server, body: bytes) -> None:
    status, answer = await server.post(TEXT, body)
    error = _error(answer)
    assert status == 400
    assert "not valid JSON" in str(error["message"])
    assert (await server.post(TEXT, _text()))[0] == 200


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"5"])
async def test_json_that_is_no_object(server: Server, body: bytes) -> None:
    status, answer = await server.post(TEXT, body)
    assert status == 400
    assert "not a JSON object" in str(_error(answer)["message"])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_none(server: Server, number: str) -> None:
    body = f'{{"model": "tiny", "prompt": "a", "temperature": {number}}}'.encode()
    status, answer = await server.post(TEXT, body)
    assert status == 400
    assert _error(answer)["param"] == "temperature"


async def test_unknown_model(server: Server) -> None:
    async with server.async_openai() as client:
        with pytest.raises(openai.NotFoundError) as refusal:
            await client.chat.completions.create(model="other", messages=MESSAGES)
    assert refusal.value.code == "model_not_found"
    assert refusal.value.param == "model"
    assert "'tiny'" in refusal.value.message


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "numbers"),
    [(512, 1, ("512",)), (600, 1, ("600", "512")), (500, 13, ("500", "13", "513", "512", "12"))],
)
async def test_prompt_over_the_context(
    server: Server, prompt_tokens: int, max_tokens: int, numbers: tuple[str, ...]
) -> None:
    body = _text(prompt=[1] * prompt_tokens, max_tokens=max_tokens)
    status, answer = await server.post(TEXT, body)
    error = _error(answer)
    assert status == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert all(number in str(error["message"]) for number in numbers)
    assert (await server.post(TEXT, _text(prompt=[1] * 500, max_tokens=12)))[0] == 200


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object, **__: object) -> list[int]:
        raise AssertionError("tokenised in vain")

    monkeypatch.setattr(server.services.tokenizer, "encode", encode)
    status, answer = await server.post(TEXT, _text(prompt="x" * 10_000))
    assert (status, _error(answer)["code"]) == (400, "context_length_exceeded")


async def test_chat_over_the_context(server: Server) -> None:
    body = _chat(messages=[{"role": "user", "content": "x" * 600}])
    status, answer = await server.post(CHAT, body)
    assert status == 400
    assert _error(answer)["code"] == "context_length_exceeded"
    assert _error(answer)["param"] == "messages"


async def test_template_refusal_is_told(server: Server) -> None:
    body = _chat(messages=[{"role": "user", "content": "refuse"}])
    status, answer = await server.post(CHAT, body)
    assert status == 400
    assert _error(answer)["code"] == "chat_template_error"
    assert "I refuse" in str(_error(answer)["message"])


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_body_over_the_limit(server: Server, is_chunked: bool) -> None:
    async def pieces():  # type: ignore[no-untyped-def]
        for _ in range(20):
            yield b" " * 8192

    body = pieces() if is_chunked else b" " * (65 * 1024)
    async with server.http.post(f"{server.url}{TEXT}", data=body) as response:
        error = _error(await response.json())
        assert response.status == 413
    assert error["code"] == "body_too_large"
    assert "65536" in str(error["message"])
    assert (await server.post(TEXT, _text()))[0] == 200


async def test_compressed_body_is_measured_unpacked(server: Server) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    headers = {"Content-Encoding": "gzip"}
    async with server.http.post(f"{server.url}{TEXT}", data=bomb, headers=headers) as response:
        assert response.status == 413
        _error(await response.json())


async def test_full_queue_takes_all_choices_or_none(server: Server) -> None:
    server.engine.answer = text_answer("a", ends=False)
    waiting = asyncio.create_task(server.post(TEXT, _text(n=6)))
    await server.engine.until(lambda: len(server.engine.submitted) == 6)
    async with server.http.post(f"{server.url}{TEXT}", json=_text(n=3)) as response:
        error = _error(await response.json())
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert len(server.engine.submitted) == 6
    waiting.cancel()
    await server.engine.until(lambda: len(server.engine.aborted) == 6)


@pytest.mark.parametrize(
    ("change", "param"), [({"n": 9}, "n"), ({"n": 3, "prompt": ["a", "b", "c"]}, "prompt")]
)
async def test_more_sequences_than_could_ever_wait_are_no_reason_to_come_back(
    server: Server, change: dict[str, object], param: str
) -> None:
    status, answer = await server.post(TEXT, _text(**change))
    error = _error(answer)
    assert (status, error["param"]) == (400, param)
    assert "9 sequences; at most 8" in str(error["message"])


async def test_a_long_model_name_is_cut_in_the_message(server: Server) -> None:
    status, answer = await server.post(TEXT, _text(model="x" * 5000))
    assert status == 404
    assert len(str(_error(answer)["message"])) < 200


async def test_template_or_tokeniser_that_takes_too_long() -> None:
    release = threading.Event()

    class SlowTokenizer(ByteTokenizer):
        def encode(
            self, text: str, *, add_special_tokens: bool, parse_special: bool = True
        ) -> list[int]:
            release.wait()
            return [1]

    async with running_server(Config(text_timeout_s=0.05)) as server:
        server.state.ready(replace(server.services, tokenizer=SlowTokenizer()))
        async with server.http.post(f"{server.url}{TEXT}", json=_text()) as response:
            error = _error(await response.json())
            assert response.status == 503
            assert "Retry-After" in response.headers
        release.set()
    assert error["code"] == "text_timeout"
    assert "text_timeout_s" in str(error["message"])


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/embeddings", "/v1/models/"])
async def test_unknown_path(server: Server, path: str) -> None:
    async with server.http.get(f"{server.url}{path}") as response:
        assert response.status == 404
        assert _error(await response.json())["code"] == "unknown_url"


async def test_wrong_method(server: Server) -> None:
    async with server.http.get(f"{server.url}{CHAT}") as response:
        error = _error(await response.json())
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
    assert "use POST" in str(error["message"])


@pytest.mark.parametrize("is_stalled", [False, True])
async def test_engine_that_dies_under_a_request(server: Server, is_stalled: bool) -> None:
    server.engine.answer = text_answer("", ends=False)
    waiting = asyncio.create_task(server.post(CHAT, _chat(stream=True)))
    await server.engine.until(lambda: len(server.engine.submitted) == 1)
    server.engine.fail("stage 1 raised: out of memory", stalled=is_stalled)
    status, answer = await waiting
    error = _error(answer)
    assert status == 500
    assert error["type"] == "server_error"
    assert error["code"] == ("stage_stalled" if is_stalled else "stage_failed")
    assert "out of memory" in str(error["message"])
    status, answer = await server.post(CHAT, _chat())
    assert status == 503
    assert "out of memory" in str(_error(answer)["message"])


async def test_engine_that_dies_in_mid_stream(server: Server) -> None:
    server.engine.answer = text_answer("ab", ends=False)
    async with server.async_openai() as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, n=2
        )
        with pytest.raises(openai.APIError, match="stage 0 raised"):
            async for chunk in stream:
                if chunk.choices[0].delta.content == "b":
                    server.engine.fail("stage 0 raised")


async def test_fault_of_our_own_is_a_500_that_leads_to_the_log(server: Server) -> None:
    server.engine.answer = lambda _: [[10_000]]  # no byte: the tokenizer raises ValueError
    with capture_logs() as lines:
        status, answer = await server.post(TEXT, _text())
    failure = next(line for line in lines if line["event"] == "request failed")
    assert failure["exc_info"]
    assert status == 500
    assert _error(answer)["type"] == "server_error"
    assert str(failure["request_id"]) in str(_error(answer)["message"])
    assert server.engine.aborted == [0]
    server.engine.answer = text_answer("fine")
    assert (await server.post(TEXT, _text()))[0] == 200
