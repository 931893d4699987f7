"""From a request to the grammar that its answers are held to, checked before anything is queued.

Runs in the text executor.
"""

from __future__ import annotations

from pipeserve.core.constraint import Grammar
from pipeserve.errors import GrammarError, InvalidParameterError
from pipeserve.server.chat_requests import ChatCompletionRequest
from pipeserve.server.requests import GenerationRequest
from pipeserve.server.state import Services
from pipeserve.text.answer import AnswerForm
from pipeserve.text.answer_grammar import CallableTool, after_thoughts, forced_calls
from pipeserve.text.tool_calls import special_words


def form_grammar(request: GenerationRequest, services: Services) -> Grammar | None:
    """What the request's own fields say about its answers; None: nothing.

    Raises:
        GrammarError: they cannot be kept to.
        InvalidParameterError: min_tokens contradicts them.
    """
    field = request.form_field
    if field is None:
        return None
    try:
        grammar = request.grammar_of_field()
    except GrammarError as error:
        raise _refusal(field, error) from None
    return None if grammar is None else _checked(grammar, field, request, services)


def chat_grammar(
    request: ChatCompletionRequest, form: AnswerForm, services: Services
) -> Grammar | None:
    """As form_grammar, or calls where tool_choice demands them; thoughts come before either.

    Raises:
        GrammarError: a schema cannot be kept to.
        InvalidParameterError: min_tokens contradicts it, or two fields contradict each other.
    """
    control = _control_tokens(form, services)
    if request.forces_a_call:
        grammar, field = _calls(request, form, control, services), "tool_choice"
    else:
        answer, field = form_grammar(request, services), request.form_field or ""
        if answer is None:
            return None
        if form.tool_calls is not None:
            raise InvalidParameterError(
                f"{field} is given and so is tools, of which the answer could call none; leave "
                'one of them out or send tool_choice "none"',
                param=field,
            )
        grammar = answer
    if form.reasoning is None:
        return grammar
    is_open = form.is_reasoning_open
    grammar = after_thoughts(grammar, form.reasoning, is_open=is_open, control=control)
    return _checked(grammar, field, request, services)


def _calls(
    request: ChatCompletionRequest, form: AnswerForm, control: dict[str, int], services: Services
) -> Grammar:
    assert form.tool_calls is not None, "a choice of tools needs tools"
    if request.form_field is not None:
        raise InvalidParameterError(
            f"{request.form_field} is given and tool_choice demands a call; leave one of them out",
            param=request.form_field,
        )
    tools = [
        CallableTool(name=each.function.name, parameters=each.function.parameters or {})
        for each in request.offered_tools
    ]
    is_single = request.names_the_call or form.max_calls == 1
    for index, tool in enumerate(tools):  # each alone, to say whose schema it is
        alone = forced_calls(form.tool_calls, [tool], is_single=True, control=control)
        _checked(alone, f"tools[{index}].function.parameters", request, services)
    return _checked(
        forced_calls(form.tool_calls, tools, is_single=is_single, control=control),
        "tool_choice",
        request,
        services,
    )


def _checked(
    grammar: Grammar, field: str, request: GenerationRequest, services: Services
) -> Grammar:
    if request.min_tokens:
        raise InvalidParameterError(
            f"min_tokens is {request.min_tokens} but {field} says where answers end; leave one of "
            "them out",
            param="min_tokens",
        )
    try:
        services.grammars.check(grammar)
    except GrammarError as error:
        raise _refusal(field, error) from None
    return grammar


def _refusal(field: str, error: GrammarError) -> GrammarError:
    return GrammarError(f"{field} cannot be kept to: {error}", param=field)


def _control_tokens(form: AnswerForm, services: Services) -> dict[str, int]:
    """Those of the words around thoughts and calls that are control tokens."""
    words: list[str] = []
    if form.tool_calls is not None:
        words += special_words(form.tool_calls)
    if form.reasoning is not None:
        words += [form.reasoning.opening, form.reasoning.closing]
    ids = {word: services.tokenizer.token_id(word) for word in words}
    return {
        word: token_id
        for word, token_id in ids.items()
        if token_id is not None and services.tokenizer.is_special(token_id)
    }
