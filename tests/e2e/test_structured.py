"""The demo model held to forms, with the engine in the daemon's process and in one of its own."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from langchain_openai import ChatOpenAI

from tests.e2e.daemon_process import DaemonProcess, daemon

QUESTION: list[Any] = [{"role": "user", "content": "Describe the city of Paris, please."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


BEGINS_CALLS = dict.fromkeys(("39428", "1245", "1799"), 14)
"""A bias for the demo model's tokens {" and name and ": which calls begin with."""


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    country: str = pydantic.Field(max_length=20)
    inhabitants: int = pydantic.Field(ge=0, le=10**8)
    is_capital: bool


@pytest.fixture(scope="module", params=["one", "two"])
def served(request: pytest.FixtureRequest, demo_model_path: object) -> Iterator[DaemonProcess]:
    with daemon("--processes", request.param) as running:
        yield running


@pytest.fixture
def client(served: DaemonProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        yield client


def test_documents_are_parsed_into_models(client: openai.OpenAI) -> None:
    for temperature in (0.0, 1.5):
        answer = client.chat.completions.parse(
            model="demo",
            messages=QUESTION,
            response_format=City,
            temperature=temperature,
            seed=1,
            max_tokens=300,
        )
        assert isinstance(answer.choices[0].message.parsed, City)


def test_documents_are_valid_by_any_samplers(client: openai.OpenAI) -> None:
    """XTC would take what is likely, DRY and the penalties what a document repeats."""
    extra = {
        **{"xtc_probability": 1, "xtc_threshold": 0, "dry_multiplier": 5, "dry_allowed_length": 1},
        **{"repeat_penalty": 1.5, "top_n_sigma": 0.5, "typical_p": 0.5, "dynatemp_range": 1},
    }
    for body in ({"mirostat": 2}, extra):
        answer = client.chat.completions.parse(
            model="demo",
            messages=QUESTION,
            response_format=City,
            seed=1,
            max_tokens=300,
            extra_body=body,
        )
        assert isinstance(answer.choices[0].message.parsed, City)


def test_langchain_parses_them_too(served: DaemonProcess) -> None:
    model = ChatOpenAI(model="demo", base_url=f"{served.url}/v1", api_key="none", max_tokens=300)
    assert isinstance(model.with_structured_output(City).invoke(QUESTION), City)
    chunks = list(model.bind(max_tokens=8).stream(QUESTION))
    assert "".join(str(chunk.content) for chunk in chunks)


def test_a_demanded_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=100
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert list(json.loads(call.function.arguments)) == ["city"]


EARLIER: list[Any] = [
    {"role": "user", "content": "What is the weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "What is the weather in Oslo?"},
]


def test_a_call_that_the_model_makes_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=EARLIER, tools=[WEATHER], temperature=0.0, max_tokens=100
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}


async def test_calls_that_are_begun_are_valid_however_wild_the_model(
    served: DaemonProcess,
) -> None:
    """A bias makes it begin; beside others that it leaves alone."""
    search: Any = {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"enum": ["hotel", "café", "museum"]},
                    "most": {"type": "integer", "minimum": 1, "maximum": 20},
                },
                "required": ["place", "most"],
                "additionalProperties": False,
            },
        },
    }
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

        async def call(seed: int) -> Any:
            answer = await client.chat.completions.create(
                model="demo",
                messages=QUESTION,
                tools=[WEATHER, search],
                temperature=1.5,
                seed=seed,
                max_tokens=60,
                logit_bias=BEGINS_CALLS,
            )
            return answer.choices[0]

        async def write(seed: int) -> str:
            answer = await client.completions.create(
                model="demo", prompt=f"{seed}. Once", max_tokens=24, seed=seed
            )
            return answer.choices[0].text

        alone = [await write(seed) for seed in range(2)]
        choices = await asyncio.gather(*map(call, range(8)), *map(write, range(2)))
    assert choices[8:] == alone
    names = set()
    for choice in choices[:8]:
        for made in choice.message.tool_calls or ():
            names.add(made.function.name)
            if choice.finish_reason == "length":
                continue  # cut in the middle
            arguments = json.loads(made.function.arguments)
            if made.function.name == "search":
                assert set(arguments) == {"place", "most"}
                assert arguments["place"] in ("hotel", "café", "museum")
                assert 1 <= arguments["most"] <= 20
            else:
                assert list(arguments) == ["city"]
                assert len(arguments["city"]) <= 12
    assert names == {"get_weather", "search"}


def test_a_grammar_and_a_refusal(client: openai.OpenAI) -> None:
    body = {"grammar": 'root ::= [0-9]{3} "-" ("a" | "b")'}
    answer = client.completions.create(model="demo", prompt="x", max_tokens=30, extra_body=body)
    assert re.fullmatch(r"\d{3}-[ab]", answer.choices[0].text)
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.completions.create(
            model="demo", prompt="x", extra_body={"json_schema": {"uniqueItems": True}}
        )


async def test_free_rows_have_the_same_tokens_beside_constrained_ones(
    served: DaemonProcess,
) -> None:
    """Constrained by a grammar that is hard to follow, too."""
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

        async def write(seed: int, **extra: Any) -> str:
            answer = await client.completions.create(
                model="demo", prompt=f"{seed}. Once", max_tokens=24, seed=seed, extra_body=extra
            )
            return answer.choices[0].text

        alone = [await write(seed) for seed in range(4)]
        hard = 'start: s\ns: s s | "a" | s s s | "a" s "a"'
        constrained = [
            *(write(seed, structured_outputs={"grammar": hard}) for seed in range(4)),
            *(write(seed, structured_outputs={"regex": "[ab ]{3,9}"}) for seed in range(4)),
        ]
        free = [write(seed) for seed in range(4)]
        answers = await asyncio.gather(*constrained, *free)
    assert answers[8:] == alone
    for text in answers[:4]:
        assert re.fullmatch("a+", text)
    for text in answers[4:8]:
        assert re.fullmatch("[ab ]{3,9}", text)
