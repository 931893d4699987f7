"""LangChain's chat and text models against the server: chat, streams, tools, structured output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Literal

import openai
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from pipeserve.text.chat_template import ChatTemplate
from tests.server.conftest import Server
from tests.server.fakes import text_answer
from tests.server.test_tools import HERMES_TEMPLATE, prompt_text
from tests.server.writing import writing_server


@tool
def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
    """The weather of a city."""
    return f"20 {unit} in {city}"


class Point(pydantic.BaseModel):
    """A place on a plane."""

    x: int = pydantic.Field(ge=-9, le=9)
    label: Literal["a", "b"]


@pytest.fixture
async def hermes(server: Server) -> AsyncIterator[Server]:
    template = ChatTemplate(HERMES_TEMPLATE, bos_token="<|begin|>", eos_token="<|end|>")
    server.state.ready(replace(server.services, chat_template=template))
    yield server


@pytest.fixture
async def writing() -> AsyncIterator[Server]:
    async with writing_server() as server:
        yield server


def chat_model(server: Server, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", max_retries=0, **fields
    )


async def test_chat(server: Server) -> None:
    model = chat_model(server, temperature=0.5, seed=3, logprobs=True, top_logprobs=2)
    answer = await model.ainvoke([("system", "be brief"), ("user", "hi")])
    assert answer.content == "Hello, world"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == len("Hello, world") + 1
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == "tiny"
    tokens = answer.response_metadata["logprobs"]["content"]
    assert [token["token"] for token in tokens] == list("Hello, world")
    assert prompt_text(server) == "system:be brief\nuser:hi\nassistant:"


async def test_chat_without_a_loop_and_a_batch(server: Server) -> None:
    model = chat_model(server, stop=["wor"])
    assert (await asyncio.to_thread(model.invoke, "hi")).content == "Hello, "
    answers = await model.abatch(["one", "two", "three"])
    assert [answer.content for answer in answers] == ["Hello, "] * 3


async def test_stream_with_usage(server: Server) -> None:
    chunks = [chunk async for chunk in chat_model(server, stream_usage=True).astream("hi")]
    texts = [chunk.content for chunk in chunks if chunk.content]
    assert texts == list("Hello, world")
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == len("Hello, world") + 1


async def test_a_tool_is_called_and_answered(hermes: Server) -> None:
    hermes.engine.answer = text_answer(
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    )
    model = chat_model(hermes).bind_tools([weather])
    asked = HumanMessage("How is the weather in Köln?")
    answer = await model.ainvoke([asked])
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Köln"})
    result = await weather.ainvoke(call)
    assert isinstance(result, ToolMessage)
    hermes.engine.answer = text_answer("20 degrees.")
    final = await model.ainvoke([asked, answer, result])
    assert final.content == "20 degrees."
    history = prompt_text(hermes)
    assert '<tool_call>weather {"city": "Köln"}</tool_call>' in history
    assert "tool:20 C in Köln" in history


async def test_streamed_calls(hermes: Server) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
    hermes.engine.answer = text_answer(f"{call % 'Rome'}\n{call % 'Oslo'}")
    whole: Any = None
    async for chunk in chat_model(hermes).bind_tools([weather]).astream("where?"):
        whole = chunk if whole is None else whole + chunk
    assert [call["args"] for call in whole.tool_calls] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert whole.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output(writing: Server, method: Any) -> None:
    model = chat_model(writing, max_tokens=600).with_structured_output(
        Point, method=method, include_raw=True
    )
    num_parsed = 0
    for _ in range(8):
        found: Any = await model.ainvoke("go")
        assert isinstance(found["raw"], AIMessage)
        if found["raw"].response_metadata["finish_reason"] == "length":
            continue
        assert isinstance(found["parsed"], Point), found
        num_parsed += 1
    assert num_parsed > 0


async def test_structured_output_of_a_schema_and_of_json_mode(writing: Server) -> None:
    schema = {
        "title": "answer",
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    model = chat_model(writing, max_tokens=600)
    found: Any = await model.with_structured_output(schema, method="json_schema").ainvoke("go")
    assert set(found) == {"yes"}
    loose: Any = await model.with_structured_output(
        None, method="json_mode", include_raw=True
    ).ainvoke("go")
    is_cut = loose["raw"].response_metadata["finish_reason"] == "length"
    assert is_cut or isinstance(loose["parsed"], dict)


async def test_text_model(server: Server) -> None:
    model = OpenAI(
        model="tiny",
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        max_tokens=5,
        n=2,
        temperature=0.7,
    )
    found = await model.agenerate(["one", "two"])
    texts = [[each.text for each in generations] for generations in found.generations]
    assert texts == [["Hello", "Hello"]] * 2
    single = model.model_copy(update={"n": 1})
    assert "".join([chunk async for chunk in single.astream("one")]) == "Hello"


async def test_a_refusal_is_openais_exception(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="top_logprobs is 99"):
        await chat_model(server, logprobs=True, top_logprobs=99).ainvoke("hi")
