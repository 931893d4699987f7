"""Tools for a model whose chat template knows none: told in the first message, as plain text.

Pure functions. Know messages as templates take them, no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

_INSTRUCTIONS = """You can call these functions, each given as JSON with a schema of its parameters:

{functions}

To call one, answer with nothing but a JSON object of this form, or with a list of such objects to \
call several:
{{"name": "NAME", "arguments": {{"PARAMETER": VALUE}}}}
The results come in the next message. Where no function helps, answer in plain words."""


def with_tools_told(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    *,
    told_to: Literal["system", "user"],
) -> list[dict[str, Any]]:
    """The messages with one about the tools in front, joined to one that is there.

    told_to: its role. A template that takes no system message takes one of the user.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = _INSTRUCTIONS.format(functions=functions)
    rest = [dict(message) for message in messages]
    if rest and rest[0]["role"] == told_to:
        own = rest.pop(0)["content"]
        told = f"{own}\n\n{told}" if told_to == "system" else f"{told}\n\n{own}"
    return [{"role": told_to, "content": told}, *rest]


def with_calls_as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with calls and their results as text of the assistant and of the user."""
    names: dict[str, str] = {}
    plain: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        calls = message.get("tool_calls", ())
        names |= {call["id"]: call["function"]["name"] for call in calls}
        is_result = message["role"] == "tool"
        if calls:
            content = "\n".join(filter(None, (message["content"], *map(_call_text, calls))))
            plain.append({"role": "assistant", "content": content})
        elif not is_result:
            plain.append(dict(message))
        elif follows_result:  # templates want speakers to alternate
            plain[-1]["content"] += f"\n{_result_text(message, names)}"
        else:
            plain.append({"role": "user", "content": _result_text(message, names)})
        follows_result = is_result
    return plain


def _result_text(message: Mapping[str, Any], names: Mapping[str, str]) -> str:
    name = message.get("name") or names.get(message.get("tool_call_id", ""), "the function")
    return f"Result of {name}: {message['content']}"


def _call_text(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"], ensure_ascii=False)
