"""Tool calls in what models write: every format, however the text is cut, and what is none."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeserve.text.tool_calls import (
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    NEMOTRON,
    PHI4,
    ToolCallFormat,
    ToolCallParser,
    find_format,
)

NAMES = ("weather", "time")

Calls = list[tuple[str, str]]


def parse(form: ToolCallFormat, *parts: str) -> tuple[str, Calls]:
    """The text and the calls, put together from what came."""
    parser = ToolCallParser(form, tool_names=NAMES)
    text, calls = "", []
    for part in parts:
        new_text, deltas = parser.push(part)
        text += new_text
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append((delta.name, ""))
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.arguments)
    return text + parser.finish(), calls


WEATHER = ("weather", '{"city": "Paris"}')
TIME = ("time", "{}")

ANSWERS: list[tuple[ToolCallFormat, str, str, Calls]] = [
    (
        HERMES,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [WEATHER],
    ),
    (
        HERMES,
        (
            'I look.\n<tool_call>{"arguments": {}, "name": "time"}</tool_call>\n'
            '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n'
        ),
        "I look.\n",
        [TIME, WEATHER],
    ),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call> Done.',
        "Done.",
        [WEATHER],
    ),
    (HERMES, '<tool_call>{"name": "time"}</tool_call>', "", [TIME]),
    (HERMES, '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [TIME]),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [("other", "{}")]),
    (
        HERMES,
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        "",
        [WEATHER],
    ),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    (HERMES, "<tool_call> sorry", "<tool_call> sorry", []),
    (HERMES, "<tool_call>{no}</tool_call>", "<tool_call>{no}</tool_call>", []),
    (HERMES, '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    (HERMES, "2 < 3, <tool> and <tool_cal", "2 < 3, <tool> and <tool_cal", []),
    (HERMES, '{"name": "time", "arguments": {}}', '{"name": "time", "arguments": {}}', []),
    (
        MISTRAL,
        (
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}, '
            '{"name": "time", "arguments": {}}]'
        ),
        "",
        [WEATHER, TIME],
    ),
    (MISTRAL, 'So.[TOOL_CALLS] [{"name": "time", "arguments": {}}]', "So.", [TIME]),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', "", [WEATHER]),
    (
        MISTRAL,
        '[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{"city": "Paris"}[TOOL_CALLS]time{}',
        "",
        [WEATHER, TIME],
    ),
    (
        NEMOTRON,
        (
            'Well.<TOOLCALL>[{"name": "weather", "arguments": {"city": "Paris"}}, '
            '{"name": "time", "arguments": {}}]</TOOLCALL>'
        ),
        "Well.",
        [WEATHER, TIME],
    ),
    (PHI4, '<|tool_call|>{"name": "time", "arguments": {}}<|/tool_call|>', "", [TIME]),
    (MISTRAL, "[TOOL_CALLS]no call", "[TOOL_CALLS]no call", []),
    (LLAMA3, '{"name": "weather", "parameters": {"city": "Paris"}}', "", [WEATHER]),
    (
        LLAMA3,
        (
            '<|python_tag|>{"type": "function", "name": "weather", '
            '"parameters": {"city": "Paris"}}; '
            '{"name": "time", "parameters": {}}'
        ),
        "",
        [WEATHER, TIME],
    ),
    (LLAMA3, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    (LLAMA3, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (LLAMA3, 'Sure: {"name": "time"}', 'Sure: {"name": "time"}', []),
    (JSON, '\n{"name": "time", "arguments": {}}', "", [TIME]),
    (JSON, '[{"name": "time", "arguments": {}}, {"name": "time"}]', "", [TIME, TIME]),
    (
        JSON,
        '{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}',
        "",
        [WEATHER],
    ),
    (JSON, '{"answer": [1, "}"]}', '{"answer": [1, "}"]}', []),
    (JSON, "[1, 2]", "[1, 2]", []),
    (JSON, "plain", "plain", []),
    (JSON, "", "", []),
    (JSON, "  \n", "  \n", []),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
def test_answers_whole_and_letter_by_letter(
    form: ToolCallFormat, answer: str, text: str, calls: Calls
) -> None:
    assert parse(form, answer) == (text, calls)
    assert parse(form, *answer) == (text, calls)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA3, JSON], ids=lambda form: form.name)
def test_arguments_come_before_they_are_complete(form: ToolCallFormat) -> None:
    parser = ToolCallParser(form, tool_names=NAMES)
    parser.push(f'{form.opening or ""}{{"name": "weather", "arguments": ')
    seen = [parser.push(letter)[1][0].arguments for letter in '{"city": "Par']
    assert "".join(seen) == '{"city": "Par'


ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    ),
    max_size=3,
)


@given(
    form=st.sampled_from([HERMES, MISTRAL, LLAMA3, JSON]),
    arguments=st.lists(ARGUMENTS, min_size=1, max_size=3),
    indent=st.none() | st.integers(0, 2),
    cuts=st.lists(st.integers(0, 300), max_size=8),
)
def test_any_arguments_cut_anywhere_come_out_as_they_went_in(
    form: ToolCallFormat, arguments: list[object], indent: int | None, cuts: list[int]
) -> None:
    calls = [json.dumps({"name": "time", "arguments": a}, indent=indent) for a in arguments]
    opening, closing = form.opening or "", form.closing or ""
    if closing:
        answer = "\n".join(f"{opening}{call}{closing}" for call in calls)
    else:
        answer = f"{opening}[{', '.join(calls)}]"
    edges = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    parts = [answer[a:b] for a, b in itertools.pairwise(edges)]
    text, found = parse(form, *parts)
    assert text == ""
    assert [json.loads(each) for _, each in found] == arguments


PIECES = ["{", "}", "[", "]", '"', "name", "time", ":", ",", "arguments", "\\", " ", "a", "1"]


@given(
    form=st.sampled_from([HERMES, MISTRAL, LLAMA3, JSON]),
    parts=st.lists(
        st.sampled_from([*PIECES, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"]),
        max_size=30,
    ),
)
def test_rubbish_is_the_same_in_one_piece_and_in_many(
    form: ToolCallFormat, parts: list[str]
) -> None:
    whole = "".join(parts)
    text, calls = parse(form, whole)
    cut_text, cut_calls = parse(form, *whole)
    assert cut_calls == calls
    if not calls:
        assert text == cut_text == whole
    assert "".join(cut_text.split()) == "".join(text.split())


def test_a_format_is_known_by_its_template() -> None:
    templates = {
        "{{ '<tool_call>' }}": HERMES,
        "[AVAILABLE_TOOLS] [TOOL_CALLS]": MISTRAL,
        "<TOOLCALL>": NEMOTRON,
        "'<|tool_call|>'": PHI4,
        "<|start_header_id|>ipython <|python_tag|>": LLAMA3,
        "{{ messages }}": JSON,
    }
    for template, form in templates.items():
        assert find_format(template) is form
