"""From a request to the grammar that its answers are held to, checked before anything is queued.

Runs in the text executor.
"""

from __future__ import annotations

from dataclasses import replace

from pipeserve.core.constraint import Grammar, Thoughts
from pipeserve.errors import GrammarError, InvalidParameterError
from pipeserve.server.chat_requests import ChatCompletionRequest
from pipeserve.server.requests import GenerationRequest
from pipeserve.server.state import Services
from pipeserve.server.tool_grammar import begun_call_grammar, forced_call_grammar
from pipeserve.text.answer import AnswerForm
from pipeserve.text.answer_grammar import ControlTokens, after_thoughts
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
    """As form_grammar; or calls, where tool_choice demands them or where the model begins them.

    Thoughts come before any of these, and no more of them than the request allows.

    Raises:
        GrammarError: a schema cannot be kept to.
        InvalidParameterError: min_tokens contradicts it, or two fields contradict each other.
    """
    _check_fields(request, form)
    control = _control_tokens(form, services)
    answer = form_grammar(request, services)
    if request.forces_a_call:
        answer = forced_call_grammar(request, form, control, services)
    if answer is not None:
        _check_min_tokens(request, request.form_field or "tool_choice")
        return _behind_thoughts(answer, request, form, control, services)
    if form.tool_calls is not None:
        answer = begun_call_grammar(request, form, control, services)
        if answer.calls is not None and not answer.calls.text_follows:
            _check_min_tokens(request, "tools")
    thoughts = _thoughts(request, form, services, in_grammar=False)
    if answer is not None and form.reasoning is not None:
        return replace(answer, thoughts=thoughts)
    if thoughts is None or thoughts.max_tokens is None:
        return answer
    return replace(answer or Grammar(definition=""), thoughts=thoughts)


def _check_fields(request: ChatCompletionRequest, form: AnswerForm) -> None:
    field = request.form_field
    if field is None or form.tool_calls is None:
        return
    if request.forces_a_call:
        raise InvalidParameterError(
            f"{field} is given and tool_choice demands a call; leave one of them out", param=field
        )
    raise InvalidParameterError(
        f"{field} is given and so is tools, of which the answer could call none; leave "
        'one of them out or send tool_choice "none"',
        param=field,
    )


def _behind_thoughts(
    answer: Grammar,
    request: ChatCompletionRequest,
    form: AnswerForm,
    control: ControlTokens,
    services: Services,
) -> Grammar:
    """The grammar of thoughts and answer, since an answer has to come."""
    if form.reasoning is None:
        return answer
    is_open = form.is_reasoning_open
    grammar = after_thoughts(answer, form.reasoning, is_open=is_open, control=control)
    _checked(grammar, request.form_field or "tool_choice", request, services)
    if request.most_thoughts is None:
        return grammar
    return replace(grammar, thoughts=_thoughts(request, form, services, in_grammar=True))


def _thoughts(
    request: ChatCompletionRequest, form: AnswerForm, services: Services, *, in_grammar: bool
) -> Thoughts | None:
    """None: the model is not known to think."""
    tags = services.chat_template.features.reasoning
    if tags is None:
        return None
    return Thoughts(
        opening=tags.opening,
        closing=tags.closing,
        is_open=form.is_reasoning_open,
        in_grammar=in_grammar,
        max_tokens=request.most_thoughts,
    )


def _checked(
    grammar: Grammar, field: str, request: GenerationRequest, services: Services
) -> Grammar:
    _check_min_tokens(request, field)
    try:
        services.grammars.check(grammar)
    except GrammarError as error:
        raise _refusal(field, error) from None
    return grammar


def _check_min_tokens(request: GenerationRequest, field: str) -> None:
    if request.min_tokens:
        raise InvalidParameterError(
            f"min_tokens is {request.min_tokens} but {field} says where answers end; leave one of "
            "them out",
            param="min_tokens",
        )


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
