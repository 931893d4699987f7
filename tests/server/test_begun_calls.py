"""Calls that a model begins itself, and thoughts that end at a limit: from the openai package
through HTTP, engine and grammar to a model that says what a test tells it, then anything."""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from pipeserve.core.sampling import SamplingParams
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.grammar import GrammarCompiler
from tests.engine.running import running_engine
from tests.fakes import facts
from tests.server.conftest import TEMPLATE, Server, running_server
from tests.server.fakes import EOS, ByteTokenizer, text_answer
from tests.server.test_tools import HERMES_TEMPLATE, TOOLS, USER, prompt_text

VOCAB_SIZE = ByteTokenizer.vocab_size
CLOSING = frozenset({EOS, *b'"}]'})
BEGINS_ANSWER = b"assistant:"
STRICT: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Päris"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "time",
            "strict": False,
            "parameters": {"type": "object", "additionalProperties": False},
        },
    },
]


def speaker(script: str) -> Callable[[Sequence[int], SamplingParams], int]:
    """Says the script, then letters, and now and then that it has done."""
    wanted = script.encode()

    def next_token(token_ids: Sequence[int], sampling: SamplingParams) -> int:
        said = bytes(each for each in token_ids if each < 256).rpartition(BEGINS_ANSWER)[2]
        said = said.removeprefix(b"<think>\n")  # the prompt's
        if len(said) < len(wanted):
            return wanted[len(said)]
        number = zlib.crc32(bytes(str(token_ids), "ascii"), sampling.seed & 0xFFFFFFFF)
        return EOS if number % 16 == 0 else ord("a") + number % 26

    return next_token


def willing(number: int, allowed: Sequence[int]) -> int:
    """What it would say where it may; else something that is allowed."""
    if number in allowed:
        return number
    closing = [each for each in allowed if each in CLOSING]
    chosen = closing if closing and number % 3 == 0 else allowed
    return chosen[number // 3 % len(chosen)]


@asynccontextmanager
async def speaking(script: str, template: str = HERMES_TEMPLATE) -> AsyncIterator[Server]:
    compiler = GrammarCompiler(ByteTokenizer, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    pipeline = facts(context_length=2048, num_blocks=4096, vocab_size=VOCAB_SIZE)
    async with (
        running_server() as server,
        running_engine(
            pipeline_facts=pipeline,
            constraints=compiler.build,
            next_token=speaker(script),
            pick=willing,
        ) as running,
    ):
        chat_template = ChatTemplate(template, bos_token="<|begin|>", eos_token="<|end|>")
        server.state.ready(
            replace(server.services, engine=running.client, chat_template=chat_template)
        )
        yield server


async def ask(server: Server, **fields: Any) -> Any:
    async with server.async_openai() as client:
        values = {"model": "tiny", "messages": [USER], "max_tokens": 300, **fields}
        return (await client.chat.completions.create(**values)).choices[0]


def assert_valid(calls: Sequence[Any]) -> None:
    for call in calls:
        arguments = json.loads(call.function.arguments)
        is_weather = call.function.name == "weather"
        assert arguments.get("city") in ("Rome", "Päris") if is_weather else arguments == {}


SCRIPTS = [
    ("Let me see.<tool_call>", HERMES_TEMPLATE, "Let me see."),
    ('<tool_call>{"name": "clock', HERMES_TEMPLATE, None),
    ('hm</think>x<tool_call>[{"name": "', HERMES_TEMPLATE.replace("think>", "thought>"), None),
    ('{"name": "', TEMPLATE, None),
    ('[{"name": "time", "arguments": {"zone": "CET"', TEMPLATE, None),
]


@pytest.mark.parametrize(
    ("script", "template", "content"), SCRIPTS, ids=lambda each: str(each)[:20]
)
async def test_a_call_that_the_model_begins_is_valid(
    script: str, template: str, content: str | None
) -> None:
    names = set()
    async with speaking(script, template) as server:
        for seed in range(12):
            choice = await ask(server, tools=STRICT, seed=seed)
            if choice.finish_reason == "length":
                continue
            calls = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls"
            assert_valid(calls)
            names |= {call.function.name for call in calls}
            if content is not None:
                assert (choice.message.content or "").startswith(content)
    assert names


async def test_parallel_calls_are_each_valid_and_streamed() -> None:
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    async with (
        speaking(f'{call}\n{call} and <tool_call>{{"name": "weather", "arguments": {{"') as server,
        server.async_openai() as client,
        client.chat.completions.stream(
            model="tiny", messages=[USER], tools=STRICT, max_tokens=300, seed=2
        ) as stream,
    ):
        choice = (await stream.get_final_completion()).choices[0]
    calls = choice.message.tool_calls or []
    assert [each.function.name for each in calls][:3] == ["time", "time", "weather"]
    assert_valid(calls)


async def test_text_stays_text() -> None:
    text = "a < b, <b>bold</b>, <tools> and <tool_cal"
    async with speaking(text) as server:
        for seed in range(4):
            message = (await ask(server, tools=STRICT, seed=seed)).message
            assert message.content.startswith(text[:-9])
            assert not message.tool_calls


async def test_schemas_that_cannot_be_kept_to() -> None:
    """Of a strict tool an error; of another as much of it as can be."""
    odd: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": odd}}
    async with speaking("<tool_call>") as server:
        for seed in range(6):
            choice = await ask(server, tools=[tool], seed=seed)
            if choice.finish_reason == "tool_calls":
                (arguments,) = (c.function.arguments for c in choice.message.tool_calls)
                assert all(isinstance(each, int) for each in json.loads(arguments)["a"])
        tool["function"]["strict"] = True
        body = {"model": "tiny", "messages": [USER], "tools": [TOOLS[1], tool]}
        status, answer = await server.post("/v1/chat/completions", body)
    error: Any = answer["error"]
    assert (status, error["param"]) == (400, "tools[1].function.parameters")
    assert "uniqueItems" in error["message"]


async def test_a_pattern_that_is_none_is_ignored_unless_strict() -> None:
    """Nothing else of the schema is."""
    texts = {"a": {"type": "string", "pattern": "("}, "b": {"const": 5}}
    broken = {"type": "object", "properties": texts, "required": ["a", "b"]}
    function: dict[str, Any] = {"name": "f", "parameters": broken}
    async with speaking("<tool_call>") as server:
        tool = {"type": "function", "function": function}
        calls = [
            call.function.arguments
            for seed in range(6)
            for call in (await ask(server, tools=[tool], seed=seed)).message.tool_calls or ()
        ]
        assert all('"b"' in each for each in calls if each.endswith("}"))
        function["strict"] = True
        body = {
            "model": "tiny",
            "messages": [USER],
            "tools": [{"type": "function", "function": function}],
        }
        status, answer = await server.post("/v1/chat/completions", body)
    error: Any = answer["error"]
    assert (status, error["param"]) == (400, "tools[0].function.parameters")


THOUGHTS = "I wonder what this may be, and why, and whether I should answer at all. "


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("name", ["thinking_token_budget", "thinking_budget"])
async def test_thoughts_end_at_their_limit(is_open: bool, name: str) -> None:
    script = THOUGHTS if is_open else f"<think>{THOUGHTS}"
    template = HERMES_TEMPLATE if is_open else HERMES_TEMPLATE.replace("enable_thinking", "false")
    extra: dict[str, Any] = {name: 20, "chat_template_kwargs": {"enable_thinking": True}}
    async with speaking(script, template) as server, server.async_openai() as client:
        for is_stream in (False, True):
            answer: Any = await client.chat.completions.create(
                model="tiny",
                messages=[USER],  # type: ignore[list-item]
                max_tokens=200,
                seed=1,
                stream=is_stream,
                extra_body=extra,
                **({"stream_options": {"include_usage": True}} if is_stream else {}),  # type: ignore[call-overload]
            )
            thoughts, usage = await thoughts_of(answer) if is_stream else whole(answer)
            assert thoughts == THOUGHTS[:20]
            details = usage.completion_tokens_details
            assert details.reasoning_tokens == 20 + len("</think>")
            assert usage.completion_tokens > details.reasoning_tokens


def whole(answer: Any) -> tuple[str, Any]:
    return answer.choices[0].message.reasoning_content, answer.usage


async def thoughts_of(chunks: Any) -> tuple[str, Any]:
    thoughts, usage = "", None
    async for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            thoughts += getattr(choice.delta, "reasoning_content", None) or ""
    return thoughts, usage


THINKING = {"chat_template_kwargs": {"enable_thinking": True}}


async def test_a_form_and_calls_come_behind_limited_thoughts() -> None:
    async with speaking(THOUGHTS) as server:
        extra: dict[str, Any] = {"thinking_budget_tokens": 7, **THINKING}
        chosen = {**extra, "structured_outputs": {"choice": ["yes", "no"]}}
        message = (await ask(server, extra_body=chosen)).message
        assert message.reasoning_content == THOUGHTS[:7].rstrip()
        assert message.content in ("yes", "no")
        choice = await ask(server, extra_body=extra, tools=STRICT, tool_choice="required", seed=3)
        assert choice.message.reasoning_content == THOUGHTS[:7].rstrip()
        assert_valid(choice.message.tool_calls)
    async with speaking(f"{THOUGHTS[:7]}</think>\n<tool_call>") as server:
        choice = await ask(server, extra_body=extra, tools=STRICT, seed=3)
        assert choice.message.reasoning_content == THOUGHTS[:7].rstrip()
        assert_valid(choice.message.tool_calls)


async def test_calls_in_thoughts_are_none() -> None:
    thoughts = 'perhaps <tool_call>{"name": 1} so'
    async with speaking(f"{thoughts}</think>No.") as server:
        message = (await ask(server, extra_body=THINKING, tools=STRICT)).message
        assert message.reasoning_content == thoughts
        assert message.content.startswith("No.")


async def test_no_budget_is_no_thoughts(server: Server) -> None:
    async with speaking("<think>well then") as talking:
        extra = {"reasoning_budget": 0, "chat_template_kwargs": {}}
        message = (await ask(talking, extra_body=extra)).message
        assert getattr(message, "reasoning_content", None) is None
        assert message.content
    template = ChatTemplate(
        HERMES_TEMPLATE.replace(
            "{% if enable_thinking %}", "{% if enable_thinking is not false %}"
        ),
        bos_token="<|begin|>",
        eos_token="<|end|>",
    )
    server.state.ready(replace(server.services, chat_template=template))
    for budget, end in ((0, "assistant:"), (-1, "<think>\n"), (5, "<think>\n")):
        await ask(server, extra_body={"thinking_budget": budget})
        assert prompt_text(server).endswith(end)
        grammar = server.engine.submitted[-1].grammar
        assert (grammar is None) == (budget == -1)


async def test_of_several_budgets_the_smallest_holds() -> None:
    async with speaking(THOUGHTS) as server:
        extra = {"thinking_budget": 30, "reasoning_budget": 4, "thinking_token_budget": -1}
        message = (await ask(server, extra_body={**extra, **THINKING})).message
        assert message.reasoning_content == THOUGHTS[:4].rstrip()


REFUSED = (
    ({"thinking_budget": -2}, "thinking_budget", "at least -1"),
    ({"thinking_token_budget": "many"}, "thinking_token_budget", "an integer"),
)


@pytest.mark.parametrize(("fields", "param", "mend"), REFUSED)
async def test_budgets_that_are_refused(
    server: Server, fields: dict[str, Any], param: str, mend: str
) -> None:
    body = {"model": "tiny", "messages": [USER], **fields}
    status, answer = await server.post("/v1/chat/completions", body)
    error: Any = answer["error"]
    assert (status, error["param"]) == (400, param)
    assert mend in error["message"]


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}assistant:"
)
"""As Gemma's."""


async def test_a_template_without_system_messages_tells_the_user_of_tools(server: Server) -> None:
    template = ChatTemplate(NO_SYSTEM, bos_token="<|begin|>", eos_token="<|end|>")
    assert not template.takes_system_messages
    server.state.ready(replace(server.services, chat_template=template))
    server.engine.client.facts = replace(server.engine.client.facts, context_length=4096)
    server.engine.answer = text_answer('{"name": "time", "arguments": {}}')
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    for history in (messages[:1], messages):
        message = (await ask(server, messages=history, tools=TOOLS)).message
        assert message.tool_calls[0].function.name == "time"
        prompt = prompt_text(server)
        assert prompt.startswith("<user>You can call these functions")
        assert "\n\nhi" in prompt
        assert prompt.count("<user>") == (1 if len(history) == 1 else 2)
    assert prompt.endswith("<user>Result of time: noonassistant:")


@pytest.mark.parametrize(
    ("mark", "status"), [("<tool_call>", 200), ("[TOOL_CALLS]", 400), ("<|python_tag|>", 400)]
)
async def test_an_answer_that_ends_with_its_calls_has_no_least_length(
    server: Server, mark: str, status: int
) -> None:
    source = f"{TEMPLATE}{{# {mark} #}}{{% if tools %}}{{% endif %}}"
    template = ChatTemplate(source, bos_token="<|begin|>", eos_token="<|end|>")
    server.state.ready(replace(server.services, chat_template=template))
    body = {"model": "tiny", "messages": [USER], "tools": TOOLS, "min_tokens": 3, "max_tokens": 5}
    found, answer = await server.post("/v1/chat/completions", body)
    assert found == status
    error: Any = answer.get("error") or {}
    assert error.get("param") == (None if status == 200 else "min_tokens")
