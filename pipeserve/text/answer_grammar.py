"""Grammars of whole answers: thoughts before what is asked for, and calls of tools.

Pure functions. Know how models write, no HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeserve.core.constraint import Grammar
from pipeserve.text.grammar import Part, json_part, of_parts, quoted
from pipeserve.text.reasoning import ReasoningTags
from pipeserve.text.tool_calls import ToolCallFormat

ControlTokens = Mapping[str, int]
"""Those of the words that stand around thoughts and calls which are single tokens and no text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableTool:
    """A tool as far as calls of it go."""

    name: str
    parameters: dict[str, Any]
    """A JSON schema."""


def after_thoughts(
    answer: Grammar, tags: ReasoningTags, *, is_open: bool, control: ControlTokens
) -> Grammar:
    """Thoughts of any text, then the answer; is_open: the prompt ends with the opening tag."""
    first, *others = json.loads(answer.definition)["grammars"]
    thoughts = "thoughts" if is_open else f"({_word(tags.opening, control)} thoughts)?"
    lines = (f"start: {thoughts} SPACE @answer", _until("thoughts", tags.closing, control), _SPACE)
    return of_parts({"lark_grammar": "\n".join(lines)}, {**first, "name": "answer"}, *others)


def forced_calls(
    form: ToolCallFormat, tools: Sequence[CallableTool], *, is_single: bool, control: ControlTokens
) -> Grammar:
    """Calls and nothing else: at least one, or exactly one.

    Where the model's format has no words around a call, it is one: a second could not be told
    from text.
    """
    if form.opening is None or not form.starts_anywhere:
        lines = ["start: call"]
    elif form.closing is None:
        several = "call" if is_single else 'call (", " call)*'
        lines = [f'start: {_word(form.opening, control)} "[" {several} "]"']
    else:
        opening, closing = _word(form.opening, control), _word(form.closing, control)
        block = f'{opening} "\\n" call "\\n" {closing}'
        lines = [f"start: {block}" if is_single else f'start: {block} ("\\n" {block})*']
    return of_parts({"lark_grammar": "\n".join([*lines, _call(form, tools)])}, *_arguments(tools))


def _call(form: ToolCallFormat, tools: Sequence[CallableTool]) -> str:
    """A rule for the JSON object that is a call."""
    key = "parameters" if form.opening == "<|python_tag|>" else "arguments"
    alternatives = []
    for index, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
        alternatives.append(f'{quoted(head)} @arguments_{index} "}}"')
    return f"call: {' | '.join(alternatives)}"


def _arguments(tools: Sequence[CallableTool]) -> list[Part]:
    return [
        {**json_part({**tool.parameters, "type": "object"}), "name": f"arguments_{index}"}
        for index, tool in enumerate(tools)
    ]


_SPACE = r"SPACE: /[ \r\n\t]{0,4}/"


def _word(word: str, control: ControlTokens) -> str:
    return f"<[{control[word]}]>" if word in control else quoted(word)


def _until(rule: str, word: str, control: ControlTokens) -> str:
    """A rule for any text and the first such word behind it."""
    if word in control:  # no text can hold it
        return f"{rule}: /(?s:.*)/ <[{control[word]}]>"
    escaped = re.escape(word).replace("/", r"\/")
    return f"{rule}[lazy]: /(?s:.*){escaped}/"
