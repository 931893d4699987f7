"""Answers held to a form: what each field means to the engine, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeserve.text.chat_template import ChatTemplate
from tests.server.conftest import Server
from tests.server.test_tools import HERMES_TEMPLATE, TOOLS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "go"}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = 'root ::= "yes" | "no" [0-9]{2}'


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [USER], **fields}


def matches(server: Server, text: str, *, at: int = -1) -> bool:
    """Whether the grammar that was submitted lets this be a whole answer."""
    submitted = server.engine.submitted[at]
    assert submitted.grammar is not None
    constraint = server.services.grammars.build(submitted.grammar)
    eos = next(iter(server.services.tokenizer.eos_token_ids))
    assert eos in submitted.sampling.stop_token_ids
    for token_id in (*text.encode(), eos):
        word = int(constraint.allowed()[token_id // 32])
        if not (word >> token_id % 32) & 1:
            return False
        constraint.accept(token_id)
    return True


FORMS: tuple[tuple[dict[str, Any], str, str], ...] = (
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "p", "schema": PERSON},
            }
        },
        '{"name": "Ann", "age": 3}',
        '{"name": "Ann"}',
    ),
    ({"response_format": {"type": "json_object"}}, '{"a": [1, null]}', "[1]"),
    ({"response_format": {"type": "json_object", "schema": PERSON}}, '{"name":"","age":0}', "{}"),
    ({"response_format": {"type": "json_schema", "schema": PERSON}}, '{"name":"","age":0}', "{}"),
    ({"structured_outputs": {"json": {"type": "integer"}}}, "17", "1.5"),
    ({"structured_outputs": {"json": '{"type": "integer"}'}}, "17", '"17"'),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": "[ab]+c"}}, "abac", "abacx"),
    ({"structured_outputs": {"choice": ["red", "güne\n"]}}, "güne\n", "re"),
    ({"structured_outputs": {"grammar": GBNF}}, "no42", "no4"),
    ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, "aab", "aa"),
    ({"json_schema": {"enum": [1, "x"]}}, '"x"', "2"),
    ({"grammar": GBNF}, "yes", "yes12"),
    ({"guided_json": {"type": "null"}}, "null", "nul"),
    ({"guided_json": '{"type": "null"}'}, "null", "0"),
    ({"guided_regex": "x{2,3}"}, "xxx", "x"),
    ({"guided_choice": ["a", "ab"]}, "ab", "b"),
    ({"guided_grammar": GBNF}, "yes", "y"),
    ({"response_format": {"type": "text"}, "guided_choice": ["a"], "ignore_eos": True}, "a", "b"),
)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("fields", "right", "wrong"), FORMS, ids=lambda each: str(each)[:40])
async def test_every_field_reaches_the_engine_as_a_grammar(
    fields: dict[str, Any], right: str, wrong: str, path: str, server: Server
) -> None:
    body = chat(**fields) if path == CHAT else {"model": "tiny", "prompt": "go", **fields}
    status, answer = await server.post(path, body)
    assert status == 200, answer
    assert matches(server, right)
    assert not matches(server, wrong)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}, "grammar": ""}])
async def test_without_a_form_nothing_is_constrained(
    fields: dict[str, Any], server: Server
) -> None:
    assert (await server.post(CHAT, chat(**fields)))[0] == 200
    assert server.engine.submitted[-1].grammar is None


REFUSED: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        "response_format.json_schema.schema",
        "an object",
    ),
    (
        {"response_format": {"type": "json_object", "schema": {"uniqueItems": True}}},
        "response_format",
        "uniqueItems",
    ),
    (
        {"json_schema": {"uniqueItems": True, "x-guidance": {"lenient": True}}},
        "json_schema",
        "uniqueItems",
    ),
    ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "json_schema", "greater"),
    ({"json_schema": {"oneOf": [{"type": "integer"}, {"minimum": 3}]}}, "json_schema", "oneOf"),
    ({"json_schema": {"$ref": "http://localhost/x"}}, "json_schema", "localhost"),
    ({"json_schema": {"pattern": "(?=a)b", "type": "string"}}, "json_schema", "look-ahead"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000}, "guided_json", "recursion"),
    ({"json_schema": {"items": {"pattern": r"\Aa"}}}, "json_schema", "ECMA-262 lacks"),
    ({"guided_json": 5}, "guided_json", "an object"),
    ({"guided_regex": "[a-"}, "guided_regex", "unclosed"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_choice": [1]}, "guided_choice[0]", "a string"),
    ({"grammar": "root ::= missing"}, "grammar", "'missing' not found"),
    ({"grammar": "no grammar"}, "grammar", "::="),
    ({"grammar": 'root ::= "\\'}, "grammar", "kept to"),
    ({"grammar": "start: MISSING"}, "grammar", "MISSING"),
    ({"grammar": "start: start"}, "grammar", "kept to"),
    ({"structured_outputs": {}}, "structured_outputs", "send one"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "send one"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "send"),
    ({"grammar": GBNF, "guided_regex": "a"}, "guided_regex", "leave one of them out"),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "leave one of them out"),
)


@pytest.mark.parametrize(("fields", "param", "mend"), REFUSED, ids=lambda each: str(each)[:50])
async def test_what_cannot_be_kept_to_is_refused_with_the_reason(
    fields: dict[str, Any], param: str, mend: str, server: Server
) -> None:
    status, answer = await server.post(CHAT, chat(**fields))
    assert status == 400, answer
    error: Any = answer["error"]
    assert error["param"] == param
    assert mend in error["message"]
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("thinks", "fields", "right", "wrong"),
    [
        (
            True,
            {"guided_choice": ["yes"]},
            ["hm</th</think>\n\nyes", "</think>yes"],
            ["yes", "</think>no"],
        ),
        (False, {"guided_choice": ["yes"]}, ["yes", "<think>no</think>yes"], ["<think>yes", "no"]),
        (True, {"guided_choice": ["yes"], "reasoning_format": "none"}, ["yes"], ["</think>yes"]),
        (
            False,
            {"tools": TOOLS, "tool_choice": "required"},
            ['<think>a</think>\n<tool_call>\n{"name": "time", "arguments": {"a":1}}\n</tool_call>'],
            ['<tool_call>\n{"name": "tim", "arguments": {}}\n</tool_call>', ""],
        ),
    ],
)
async def test_thoughts_come_before_what_is_held_to_a_form(
    thinks: bool, fields: dict[str, Any], right: list[str], wrong: list[str], server: Server
) -> None:
    template = ChatTemplate(HERMES_TEMPLATE, bos_token="<|begin|>", eos_token="<|end|>")
    server.state.ready(replace(server.services, chat_template=template))
    body = chat(**fields, chat_template_kwargs={"enable_thinking": thinks})
    status, answer = await server.post(CHAT, body)
    assert status == 200, answer
    assert [matches(server, each) for each in right] == [True] * len(right)
    assert [matches(server, each) for each in wrong] == [False] * len(wrong)


async def test_tools_and_a_form_contradict_each_other(server: Server) -> None:
    for extra in ({}, {"tool_choice": "required"}):
        body = chat(tools=TOOLS, guided_choice=["a"], **extra)
        status, answer = await server.post(CHAT, body)
        error: Any = answer["error"]
        assert (status, error["param"]) == (400, "guided_choice")
    status, _ = await server.post(CHAT, chat(tools=TOOLS, guided_choice=["a"], tool_choice="none"))
    assert status == 200
