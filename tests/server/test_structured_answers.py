"""From the openai package through HTTP, engine and grammar to a model that knows nothing, and back:
what is complete is valid."""

from __future__ import annotations

import enum
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.server.conftest import Server
from tests.server.test_tools import TOOLS
from tests.server.writing import writing_server

USER: Any = {"role": "user", "content": "go"}
MOST_TOKENS = 600
SEEDS = range(12)


@pytest.fixture
async def writing() -> AsyncIterator[Server]:
    async with writing_server() as server:
        yield server


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Point(pydantic.BaseModel):
    x: int
    y: float


class Circle(pydantic.BaseModel):
    kind: Literal["circle"]
    radius: int = pydantic.Field(ge=1, le=99)


class Line(pydantic.BaseModel):
    kind: Literal["line"]
    ends: list[Point] = pydantic.Field(min_length=2, max_length=2)


class Drawing(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=8)
    colour: Colour
    shapes: list[Circle | Line] = pydantic.Field(max_length=3)
    note: str | None


async def test_pydantic_models_are_parsed(writing: Server) -> None:
    num_parsed = 0
    async with writing.async_openai() as client:
        for seed in SEEDS:
            try:
                answer = await client.chat.completions.parse(
                    model="tiny",
                    messages=[USER],
                    response_format=Drawing,
                    seed=seed,
                    max_tokens=MOST_TOKENS,
                )
            except openai.LengthFinishReasonError:
                continue
            assert isinstance(answer.choices[0].message.parsed, Drawing)
            num_parsed += 1
    assert num_parsed >= len(SEEDS) // 2


async def test_a_streamed_model_is_parsed(writing: Server) -> None:
    async with (
        writing.async_openai() as client,
        client.chat.completions.stream(
            model="tiny", messages=[USER], response_format=Point, seed=3, max_tokens=MOST_TOKENS
        ) as stream,
    ):
        completion = await stream.get_final_completion()
    assert isinstance(completion.choices[0].message.parsed, Point)


async def test_several_choices_are_each_valid(writing: Server) -> None:
    async with writing.async_openai() as client:
        answer = await client.completions.create(
            model="tiny",
            prompt="go",
            n=8,
            seed=5,
            max_tokens=60,
            logprobs=1,
            extra_body={"structured_outputs": {"regex": "(yes|no){2,3}!"}, "ignore_eos": True},
        )
    texts = {choice.text for choice in answer.choices}
    assert len(texts) > 1
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    for text in texts:
        assert text.replace("yes", "no") in ("nono!", "nonono!")


CALLS = [
    ("required", None, {"weather", "time"}),
    ("required", False, {"weather", "time"}),
    ({"type": "function", "function": {"name": "time"}}, None, {"time"}),
]


@pytest.mark.parametrize(("choice", "parallel", "names"), CALLS, ids=["any", "one", "named"])
async def test_a_demanded_call_comes_with_valid_arguments(
    writing: Server, choice: Any, parallel: bool | None, names: set[str]
) -> None:
    closed = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Päris"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools: list[Any] = json.loads(json.dumps(TOOLS))
    tools[0]["function"]["parameters"] = closed
    tools[1]["function"]["parameters"] = {"type": "object", "additionalProperties": False}
    extra: dict[str, Any] = {} if parallel is None else {"parallel_tool_calls": parallel}
    seen = set()
    async with writing.async_openai() as client:
        for seed in SEEDS:
            answer = await client.chat.completions.create(
                model="tiny",
                messages=[USER],
                tools=tools,
                tool_choice=choice,
                seed=seed,
                max_tokens=MOST_TOKENS,
                **extra,
            )
            (found,) = answer.choices
            calls: Any = found.message.tool_calls
            if found.finish_reason == "length":
                continue  # calls without end
            assert not found.message.content
            assert len(calls) == 1 or choice == "required"
            assert parallel is None or len(calls) == 1
            for call in calls:
                seen.add(call.function.name)
                arguments = json.loads(call.function.arguments)
                cities = ("Rome", "Päris")
                is_weather = call.function.name == "weather"
                assert arguments.get("city") in cities if is_weather else arguments == {}
    assert seen == names


async def test_a_schema_for_a_forced_call_is_refused_by_name(writing: Server) -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": {"uniqueItems": True}}}}
    body = {
        "model": "tiny",
        "messages": [USER],
        "tools": [TOOLS[1], {"type": "function", "function": tool}],
        "tool_choice": "required",
    }
    status, answer = await writing.post("/v1/chat/completions", body)
    error: Any = answer["error"]
    assert (status, error["param"]) == (400, "tools[1].function.parameters")
    assert "uniqueItems" in error["message"]
