"""Grammars of whole answers: thoughts before what is asked for, and calls of tools.

Pure functions. Know how models write, no HTTP.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeserve.core.constraint import Calls, Grammar
from pipeserve.text.grammar import Part, json_part, of_parts, quoted
from pipeserve.text.reasoning import ReasoningTags
from pipeserve.text.tool_calls import LLAMA3, ToolCallFormat

ControlTokens = Mapping[str, int]
"""Those of the words that stand around thoughts and calls which are single tokens and no text."""

_GAP = r"[ \t\r\n]{0,20}"
"""Between what a call is made of; templates differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableTool:
    """A tool as far as calls of it go."""

    name: str
    parameters: dict[str, Any]
    """A JSON schema."""
    is_strict: bool = True
    """Whether keywords of the schema that cannot be kept to are an error, not ignored."""


def after_thoughts(
    answer: Grammar, tags: ReasoningTags, *, is_open: bool, control: ControlTokens
) -> Grammar:
    """Thoughts of any text, then the answer; is_open: the prompt ends with the opening tag."""
    first, *others = json.loads(answer.definition)["grammars"]
    thoughts = "thoughts" if is_open else f"({_word(tags.opening, control)} thoughts)?"
    lines = (f"start: {thoughts} SPACE @answer", _up_to("thoughts", tags.closing, control), _SPACE)
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
    return _of_lines([*lines, _call(form, tools)], tools)


def begun_calls(
    form: ToolCallFormat, tools: Sequence[CallableTool], *, control: ControlTokens
) -> Grammar:
    """Any text, but calls of these tools where the model begins calls."""
    if form.opening is not None and form.starts_anywhere:
        beginnings: tuple[str, ...] = (form.opening,)
        lines = _behind_opening(form, form.opening, tools, control)
    else:
        beginnings = _beginnings(form)
        lines = _at_start(form, control)
    return Grammar(
        definition=_of_lines([*lines, _call(form, tools)], tools).definition,
        calls=Calls(
            beginnings=beginnings,
            is_anywhere=form.starts_anywhere,
            text_follows=form.closing is not None,
        ),
    )


def _behind_opening(
    form: ToolCallFormat, opening: str, tools: Sequence[CallableTool], control: ControlTokens
) -> list[str]:
    """Text without the opening, or with it at its end and a call or a list of calls behind it.

    Where no word closes a call, text behind it could be taken for another: none follows.
    """
    has_bare = form.has_bare_names and "[ARGS]" in control
    if form.closing is None:
        end = f" (GAP? {_word(opening, control)} GAP? called_behind)*"
    else:
        end = f" GAP? {_word(form.closing, control)}"
    return [
        f"start: TEXT | opening GAP? called_behind{end}",
        f"TEXT: {_without(opening)}",
        _up_to("opening", opening, control),
        f"called_behind: call | several{' | bare' if has_bare else ''}",
        'several: "[" GAP? call (SEPARATOR call)* END',
        f"GAP: /{_GAP.replace('{0', '{1')}/",
        *_LIST,
        *([_bare_calls(tools, control)] if has_bare else []),
    ]


def _at_start(form: ToolCallFormat, control: ControlTokens) -> list[str]:
    """A call or a list of calls, or text that begins like neither.

    A call is {"name": ...}, also behind "type", and also as what "function" is.
    """
    spaces, prefix = r"[ \t\r\n]*", ""
    calls = "one | many (SEPARATOR call)* END"
    lines = [f"start: TEXT | {calls}"]
    if form.opening is not None:
        prefix = f"({_escaped(form.opening)}{spaces})?"
        if form.opening in control:
            lines = [f"{lines[0]} | {_word(form.opening, control)} ({calls})"]
    begins = rf'\{{{spaces}("type"{spaces}:{spaces}"function"{spaces},{spaces})?'
    inner = rf'"function"{spaces}:{spaces}\{{{spaces}'
    name = f'"name"{spaces}:'
    return [
        *lines,
        f"TEXT: /(?s:.*)/ & ~/(?s:{spaces}{prefix}(\\[{spaces})?{begins}({inner})?{name}.*)/",
        "one: ONE called | ONE_INNER called TAIL",
        "many: MANY called | MANY_INNER called TAIL",
        f"ONE: /{spaces}{prefix}{begins}{name}{_GAP}/",
        f"ONE_INNER: /{spaces}{prefix}{begins}{inner}{name}{_GAP}/",
        f"MANY: /{spaces}{prefix}\\[{spaces}{begins}{name}{_GAP}/",
        f"MANY_INNER: /{spaces}{prefix}\\[{spaces}{begins}{inner}{name}{_GAP}/",
        *_LIST,
    ]


def _beginnings(form: ToolCallFormat) -> tuple[str, ...]:
    """Of calls that are the whole answer."""
    openings = ("",) if form.opening is None else ("", form.opening)
    return tuple(
        "".join(parts)
        for parts in itertools.product(
            openings, ("{", "[{"), ("", '"type":"function",'), ("", '"function":{'), ('"name":',)
        )
    )


def _bare_calls(tools: Sequence[CallableTool], control: ControlTokens) -> str:
    """A rule for NAME[ARGS]{...}."""
    call_id = ""
    if "[CALL_ID]" in control:
        call_id = f"({_word('[CALL_ID]', control)} /[a-zA-Z0-9]{{1,20}}/)? "
    between = f"{call_id}{_word('[ARGS]', control)}"
    calls = (f"{quoted(tool.name)} {between} @arguments_{i}" for i, tool in enumerate(tools))
    return f"bare: {' | '.join(calls)}"


def _call(form: ToolCallFormat, tools: Sequence[CallableTool]) -> str:
    """Rules for the JSON object that is a call."""
    key = "parameters" if form is LLAMA3 else "arguments"
    names = (quoted(json.dumps(tool.name, ensure_ascii=False)) for tool in tools)
    called = " | ".join(f"{name} KEY @arguments_{index}" for index, name in enumerate(names))
    return "\n".join(
        (
            "call: HEAD called",
            f"called: ({called}) TAIL",
            rf'HEAD: /\{{{_GAP}"name"{_GAP}:{_GAP}/',
            rf'KEY: /{_GAP},{_GAP}"{key}"{_GAP}:{_GAP}/',
            rf"TAIL: /{_GAP}\}}/",
        )
    )


def _of_lines(lines: Sequence[str], tools: Sequence[CallableTool]) -> Grammar:
    return of_parts({"lark_grammar": "\n".join(lines)}, *_arguments(tools))


def _arguments(tools: Sequence[CallableTool]) -> list[Part]:
    return [
        {
            **json_part({**tool.parameters, "type": "object"}, is_strict=tool.is_strict),
            "name": f"arguments_{index}",
        }
        for index, tool in enumerate(tools)
    ]


_SPACE = r"SPACE: /[ \r\n\t]{0,4}/"
_LIST = (f"SEPARATOR: /{_GAP},{_GAP}/", rf"END: /{_GAP}\]/")


def _word(word: str, control: ControlTokens) -> str:
    return f"<[{control[word]}]>" if word in control else quoted(word)


def _up_to(rule: str, word: str, control: ControlTokens) -> str:
    """A rule for any text and the first such word behind it, spelled or as a control token."""
    spelled = f"/(?s:.*){_escaped(word)}/"
    if word not in control:
        return f"{rule}[lazy]: {spelled}"
    before = f"{rule.upper()}_TEXT"
    return "\n".join(
        (
            f"{rule}: {before} {_word(word, control)} | spelled_{rule}",
            f"{before}: {_without(word)}",
            f"spelled_{rule}[lazy]: {spelled}",
        )
    )


def _without(word: str) -> str:
    """Any text that the word is not in."""
    return f"/(?s:.*)/ & ~/(?s:.*{_escaped(word)}.*)/"


def _escaped(word: str) -> str:
    return re.escape(word).replace("/", r"\/")
