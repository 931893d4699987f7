"""From the tools of a chat to the grammar of their calls, checked before anything is queued.

Runs in the text executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeserve.core.constraint import Grammar
from pipeserve.errors import GrammarError
from pipeserve.server.chat_requests import ChatCompletionRequest
from pipeserve.server.state import Services
from pipeserve.text.answer import AnswerForm
from pipeserve.text.answer_grammar import (
    CallableTool,
    ControlTokens,
    begun_calls,
    forced_calls,
)

CallGrammar = Callable[[Sequence[CallableTool]], Grammar]


def forced_call_grammar(
    request: ChatCompletionRequest, form: AnswerForm, control: ControlTokens, services: Services
) -> Grammar:
    """Where tool_choice demands calls.

    Raises:
        GrammarError: the schema of a tool cannot be kept to.
    """
    tool_calls = form.tool_calls
    assert tool_calls is not None, "a choice of tools needs tools"
    is_single = request.names_the_call or form.max_calls == 1

    def grammar_of(some: Sequence[CallableTool]) -> Grammar:
        return forced_calls(tool_calls, some, is_single=is_single, control=control)

    return _checked(grammar_of, request, services, are_all_strict=True)


def begun_call_grammar(
    request: ChatCompletionRequest, form: AnswerForm, control: ControlTokens, services: Services
) -> Grammar:
    """Where the model itself says whether it calls.

    Of the schema of a tool that is not `strict`, what cannot be kept to is ignored, since clients
    send such schemas without meaning them to be enforced.

    Raises:
        GrammarError: the schema of a strict tool cannot be kept to.
    """
    tool_calls = form.tool_calls
    assert tool_calls is not None, "calls need tools"

    def grammar_of(some: Sequence[CallableTool]) -> Grammar:
        return begun_calls(tool_calls, some, control=control)

    return _checked(grammar_of, request, services, are_all_strict=False)


def _checked(
    grammar_of: CallGrammar,
    request: ChatCompletionRequest,
    services: Services,
    *,
    are_all_strict: bool,
) -> Grammar:
    """The grammar of all tools, of which those that are not strict may lose some of their schema.

    Only where it does not compile is each tool looked at, which takes longer.
    """
    offered = request.offered_tools
    tools = [
        CallableTool(name=each.function.name, parameters=each.function.parameters or {})
        for each in offered
    ]
    if _problem(grammar_of, tools, services) is None:
        return grammar_of(tools)
    loosened = []
    for given, tool in zip(offered, tools, strict=True):
        problem = _problem(grammar_of, [tool], services)
        if problem is not None and (are_all_strict or given.function.strict):
            field = f"tools[{(request.tools or ()).index(given)}].function.parameters"
            raise GrammarError(f"{field} cannot be kept to: {problem}", param=field)
        loosened.append(tool if problem is None else _loosened(tool, grammar_of, services))
    problem = _problem(grammar_of, loosened, services)
    if problem is not None:
        raise GrammarError(f"tools together cannot be kept to: {problem}", param="tools")
    return grammar_of(loosened)


def _loosened(tool: CallableTool, grammar_of: CallGrammar, services: Services) -> CallableTool:
    loose = replace(tool, is_strict=False)
    plain = replace(loose, parameters=_without_patterns(tool.parameters))
    for candidate in (loose, plain):
        if _problem(grammar_of, [candidate], services) is None:
            return candidate
    return CallableTool(name=tool.name, parameters={})


def _without_patterns(schema: Any) -> Any:
    """The only keywords that no leniency of the compiler takes."""
    if isinstance(schema, dict):
        return {
            key: _without_patterns(value)
            for key, value in schema.items()
            if key != "patternProperties" and not (key == "pattern" and isinstance(value, str))
        }
    if isinstance(schema, list):
        return [_without_patterns(each) for each in schema]
    return schema


def _problem(
    grammar_of: CallGrammar, tools: Sequence[CallableTool], services: Services
) -> GrammarError | None:
    try:
        services.grammars.check(grammar_of(tools))
    except GrammarError as error:
        return error
    return None
