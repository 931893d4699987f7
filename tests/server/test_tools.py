"""Tools and thoughts through the real openai package: offered, called, answered, streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pipeserve.text.chat_template import ChatTemplate
from tests.server.conftest import TEMPLATE, Server
from tests.server.fakes import BOS, text_answer

HERMES_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}[{{ tool | tojson }}]{% endfor %}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
    "{% if enable_thinking %}<think>\n{% endif %}"
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
USER = {"role": "user", "content": "hi"}
CALLS = (
    'Let me see.<tool_call>\n{"name": "weather", "arguments": {"city": "Pa\u00e9ris"}}\n'
    "</tool_call>\n"
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
async def hermes(server: Server) -> AsyncIterator[Server]:
    template = ChatTemplate(HERMES_TEMPLATE, bos_token="<|begin|>", eos_token="<|end|>")
    server.state.ready(replace(server.services, chat_template=template))
    yield server


def prompt_text(server: Server, index: int = -1) -> str:
    ids = server.engine.submitted[index].prompt_token_ids
    return bytes(token_id for token_id in ids if token_id != BOS).decode()


async def ask(server: Server, **fields: Any) -> Any:
    async with server.async_openai() as client:
        values = {"model": "tiny", "messages": [USER], **fields}
        answer = await client.chat.completions.create(**values)
        return [chunk async for chunk in answer] if fields.get("stream") else answer


async def test_calls_whole(hermes: Server) -> None:
    hermes.engine.answer = text_answer(CALLS)
    answer = await ask(hermes, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [
        ("function", "weather"),
        ("function", "time"),
    ]
    assert json.loads(calls[0].function.arguments) == {"city": "Pa\u00e9ris"}
    assert calls[1].function.arguments == "{}"
    assert len({call.id for call in calls}) == 2
    assert prompt_text(hermes).startswith(f"[{json.dumps(TOOLS[0])}][{json.dumps(TOOLS[1])}]")


async def test_calls_streamed_with_arguments_as_they_come(hermes: Server) -> None:
    hermes.engine.answer = text_answer(CALLS)
    async with hermes.async_openai() as client:
        async with client.chat.completions.stream(
            model="tiny", messages=[USER], tools=TOOLS
        ) as stream:
            events = [event async for event in stream]
            final = (await stream.get_final_completion()).choices[0]
    deltas = [
        event.arguments_delta
        for event in events
        if event.type == "tool_calls.function.arguments.delta" and event.name == "weather"
    ]
    assert "".join(deltas) == '{"city": "Pa\u00e9ris"}'
    assert len([delta for delta in deltas if delta]) > 10
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Let me see."
    assert [call.function.name for call in final.message.tool_calls or []] == ["weather", "time"]


async def test_only_calls_leave_no_content(hermes: Server) -> None:
    hermes.engine.answer = text_answer('<tool_call>{"name": "time"}</tool_call>')
    answer = await ask(hermes, tools=TOOLS)
    assert answer.choices[0].message.content is None


async def test_without_parallel_calls_the_answer_ends_with_the_first(hermes: Server) -> None:
    hermes.engine.answer = text_answer(CALLS, ends=False)
    answer = await ask(hermes, tools=TOOLS, parallel_tool_calls=False)
    (choice,) = answer.choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
    assert choice.finish_reason == "tool_calls"
    assert hermes.engine.finished == [0]


async def test_a_call_that_is_cut_off_ends_with_length(hermes: Server) -> None:
    hermes.engine.answer = text_answer(CALLS)
    answer = await ask(hermes, tools=TOOLS, max_tokens=70)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"city')


@pytest.mark.parametrize(
    ("choice", "offered"),
    [
        ("auto", ["weather", "time"]),
        ("none", []),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "time"}}],
                },
            },
            ["time"],
        ),
    ],
)
async def test_tool_choice_decides_what_is_offered(
    hermes: Server, choice: Any, offered: list[str]
) -> None:
    hermes.engine.answer = text_answer('<tool_call>{"name": "time"}</tool_call>')
    answer = await ask(hermes, tools=TOOLS, tool_choice=choice)
    prompt = prompt_text(hermes)
    assert [name for name in ("weather", "time") if f'"{name}"' in prompt] == offered
    assert bool(answer.choices[0].message.tool_calls) == bool(offered)


HISTORY = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
            },
            {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
]


async def test_history_by_the_models_own_template(hermes: Server) -> None:
    await ask(hermes, messages=HISTORY, tools=TOOLS)
    assert prompt_text(hermes).endswith(
        'user:hi;assistant:<tool_call>weather {"city": "Rome"}</tool_call>'
        "<tool_call>time {}</tool_call>;tool:sunny;tool:noon;assistant:"
    )


async def test_history_and_tools_for_a_template_that_knows_none(server: Server) -> None:
    server.engine.answer = text_answer('{"name": "time", "arguments": {"zone": "CET"}}')
    server.engine.client.facts = replace(server.engine.client.facts, context_length=4096)
    answer = await ask(server, messages=HISTORY, tools=TOOLS)
    prompt = prompt_text(server)
    assert prompt.startswith("system:You can call these functions")
    assert '"description": "of a city"' in prompt
    assert prompt.endswith(
        'assistant:{"name": "weather", "arguments": {"city": "Rome"}}\n'
        '{"name": "time", "arguments": {}}\n'
        "user:Result of weather: sunny\nResult of time: noon\nassistant:"
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("time", '{"zone": "CET"}')


async def test_ids_of_calls_suit_the_template(server: Server) -> None:
    source = TEMPLATE + "{# [TOOL_CALLS] #}{% if tools %}{% endif %}"
    template = ChatTemplate(source, bos_token="<|begin|>", eos_token="<|end|>")
    server.state.ready(replace(server.services, chat_template=template))
    server.engine.answer = text_answer('[TOOL_CALLS]time[ARGS]{"zone": 1}')
    answer = await ask(server, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls
    assert len(call.id) == 9
    assert call.id.isalnum()


async def test_calls_with_logprobs_lose_no_token(hermes: Server) -> None:
    answer_text = '<tool_call>{"name": "time"}</tool_call>'
    hermes.engine.answer = text_answer(answer_text)
    chunks = await ask(hermes, tools=TOOLS, logprobs=True, stream=True)
    tokens = [
        token.token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert "".join(tokens) == answer_text


THOUGHTS = "<think>\nhm, well\n</think>\n\nYes."


@pytest.mark.parametrize("is_stream", [False, True])
async def test_thoughts_are_told_from_the_answer(hermes: Server, is_stream: bool) -> None:
    hermes.engine.answer = text_answer(THOUGHTS)
    answer = await ask(hermes, stream=is_stream)
    if is_stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        text = "".join(delta.content or "" for delta in deltas)
    else:
        message = answer.choices[0].message
        thoughts, text = message.reasoning_content, message.content
        details = answer.usage.completion_tokens_details
        assert len("hm, well") <= details.reasoning_tokens <= len(THOUGHTS)
    assert (thoughts, text) == ("hm, well", "Yes.")


async def test_a_prompt_that_opens_the_thoughts(hermes: Server) -> None:
    hermes.engine.answer = text_answer("hm\n</think>\nYes.")
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    message = (await ask(hermes, extra_body=extra)).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "Yes.")


async def test_no_effort_switches_thinking_off(hermes: Server) -> None:
    await ask(hermes, reasoning_effort="none")
    assert prompt_text(hermes).endswith("assistant:")


@pytest.mark.parametrize(
    ("extra", "thoughts", "text"),
    [
        ({"reasoning_format": "none"}, None, THOUGHTS),
        ({"include_reasoning": False}, None, "Yes."),
    ],
)
async def test_thoughts_in_the_text_or_left_out(
    hermes: Server, extra: dict[str, Any], thoughts: str | None, text: str
) -> None:
    hermes.engine.answer = text_answer(THOUGHTS)
    message = (await ask(hermes, extra_body=extra)).choices[0].message
    assert getattr(message, "reasoning_content", None) == thoughts
    assert message.content == text


async def test_thoughts_then_calls(hermes: Server) -> None:
    hermes.engine.answer = text_answer("<think>time?</think>\n\n" + CALLS)
    message = (await ask(hermes, tools=TOOLS)).choices[0].message
    assert message.reasoning_content == "time?"
    assert message.content == "Let me see."
    assert len(message.tool_calls) == 2
