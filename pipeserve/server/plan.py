"""From a request body to the sequences it asks for: parse, template, tokenise, check.

Runs in the text executor, off the event loop; pure functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.constraint import BannedStrings, Grammar
from pipeserve.core.sampling import SamplingParams
from pipeserve.errors import InvalidParameterError, PromptTooLongError
from pipeserve.server.answer_grammar import chat_grammar, form_grammar
from pipeserve.server.body import check_token_ids, parse
from pipeserve.server.chat_prompt import answer_form, encode_chat, render_chat, shown_token_ids
from pipeserve.server.chat_requests import ChatCompletionRequest
from pipeserve.server.completion_requests import CompletionRequest
from pipeserve.server.requests import GenerationRequest
from pipeserve.server.state import Services
from pipeserve.text.answer import AnswerForm
from pipeserve.text.detokenizer import Detokenizer
from pipeserve.text.sequence_breakers import breaker_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSequence:
    """One choice of the answer, before it is submitted."""

    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    echo: str | None = None
    """The prompt's text, where the choice begins with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a request asks of the engine, and how the answer is to be sent."""

    sequences: tuple[PlannedSequence, ...]
    """In the order of the answer's choices: all choices of the first prompt, then the next's."""
    num_prompt_tokens: int
    """Each prompt counted once, however many choices it has."""
    stop: tuple[str, ...]
    is_stream: bool
    includes_usage: bool
    counts_every_chunk: bool
    form: AnswerForm
    num_choices: int
    """Of each prompt."""
    admission: AdmissionParams
    timeout_s: float | None
    """As the request has it."""
    grammar: Grammar | None = None
    """What every answer must match; None: anything."""
    banned_strings: tuple[str, ...] = ()
    """What no answer may hold."""
    shown_token_ids: tuple[int, ...] = ()
    """Control tokens whose names count as text."""
    generates: bool = True
    """False: the one token that each sequence generates is dropped, only the prompt is wanted."""
    scores_end: bool = False
    """Whether the token that ends an answer has its place among the log-probabilities."""

    @property
    def banned(self) -> BannedStrings | None:
        if not self.banned_strings:
            return None
        return BannedStrings(
            strings=self.banned_strings, stop=self.stop, shown_token_ids=self.shown_token_ids
        )

    @property
    def has_logprobs(self) -> bool:
        return self.sequences[0].sampling.num_logprobs is not None


def plan_chat(body: bytes, services: Services, strict_fields: bool) -> Plan:
    """The plan for a body of /v1/chat/completions.

    Raises:
        RequestError: the body is malformed, names another model, does not fit the template or
            the context.
    """
    request = parse(body, ChatCompletionRequest, strict_fields=strict_fields)
    services.card.check_name(request.model)
    _check_count(request, 1, services)
    text = render_chat(request, services)
    _check_size(text, services, param="messages")
    form = answer_form(request, text, services)
    grammar = chat_grammar(request, form, services)
    prompts = (encode_chat(text, services.tokenizer),)
    plan = _plan(request, prompts, services, param="messages", grammar=grammar)
    return replace(plan, form=form, shown_token_ids=shown_token_ids(form, services))


def plan_completion(body: bytes, services: Services, strict_fields: bool) -> Plan:
    """The plan for a body of /v1/completions; raises as plan_chat does."""
    request = parse(body, CompletionRequest, strict_fields=strict_fields)
    services.card.check_name(request.model)
    _check_count(request, len(request.prompts), services)
    prompts = [_prompt_token_ids(prompt, request, services) for prompt in request.prompts]
    infill = services.tokenizer.infill
    ends = infill.ends if infill is not None and request.suffix else frozenset[int]()
    grammar = form_grammar(request, services)
    plan = _plan(request, prompts, services, param="prompt", further_ends=ends, grammar=grammar)
    if request.echo:
        plan = _with_echo(plan, services)
    # So there are as many as generated tokens, which those count who want the prompt's alone.
    return replace(plan, generates=request.max_tokens != 0, scores_end=True)


def _with_echo(plan: Plan, services: Services) -> Plan:
    sequences: list[PlannedSequence] = []
    prompt, text = None, ""
    for sequence in plan.sequences:
        if sequence.prompt_token_ids is not prompt:
            prompt = sequence.prompt_token_ids
            # A character that the prompt leaves half is not there: the answer completes it.
            text = "".join(map(Detokenizer(services.tokenizer).push, prompt))
        num_logprobs = sequence.sampling.num_logprobs
        sampling = replace(sequence.sampling, num_prompt_logprobs=num_logprobs)
        sequences.append(replace(sequence, sampling=sampling, echo=text))
    return replace(plan, sequences=tuple(sequences))


def _prompt_token_ids(
    prompt: str | tuple[int, ...], request: CompletionRequest, services: Services
) -> Sequence[int]:
    tokenizer = services.tokenizer
    if isinstance(prompt, str):
        _check_size(prompt, services, param="prompt")
        # Around a middle, names of control tokens are code like any other.
        is_whole = not request.suffix
        ids: Sequence[int] = tokenizer.encode(
            prompt,
            add_special_tokens=is_whole and request.add_special_tokens is not False,
            parse_special=is_whole,
        )
    else:
        check_token_ids(prompt, vocab_size=tokenizer.vocab_size, param="prompt")
        ids = prompt
    return _around_middle(ids, request.suffix, services) if request.suffix else ids


def _around_middle(prefix: Sequence[int], suffix: str, services: Services) -> list[int]:
    """A prompt that asks for what stands between prefix and suffix, in the order that models
    were trained with: prefix, suffix, middle."""
    tokenizer = services.tokenizer
    infill = tokenizer.infill
    if infill is None:
        raise InvalidParameterError(
            "suffix needs a model with fill-in-the-middle tokens, which "
            f"{services.card.name!r} has not; leave it out",
            param="suffix",
        )
    _check_size(suffix, services, param="suffix")
    begin = [tokenizer.bos_token_id] if tokenizer.add_bos else []
    after = tokenizer.encode(suffix, add_special_tokens=False, parse_special=False)
    ids = [*begin, infill.prefix, *prefix, infill.suffix, *after, infill.middle]
    return [token_id for token_id in ids if token_id is not None]


def _check_size(text: str, services: Services, *, param: str) -> None:
    """Refuse a text that cannot fit, however it is cut, before seconds are spent on cutting it."""
    context_length = services.engine.facts.context_length
    least = len(text) // services.tokenizer.longest_token_bytes
    if least >= context_length:
        raise PromptTooLongError(
            f"{param} has {len(text)} characters, at least {least} tokens; the context holds "
            f"{context_length}, the answer included: shorten it",
            param=param,
        )


def _check_count(request: GenerationRequest, num_prompts: int, services: Services) -> None:
    """Refuse what could never be queued, before anything is made of every prompt."""
    wanted, most = num_prompts * request.num_choices, services.engine.max_live
    if wanted > most:
        raise InvalidParameterError(
            f"n is {request.num_choices} for {num_prompts} prompt(s), together {wanted} "
            f"sequences; at most {most} can run and wait (max_num_seqs and max_queued_requests): "
            "ask for fewer",
            param="n" if num_prompts == 1 else "prompt",
        )


def _plan(
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    services: Services,
    *,
    param: str,
    grammar: Grammar | None,
    further_ends: frozenset[int] = frozenset(),
) -> Plan:
    """further_ends: tokens that end an answer besides those that always do."""
    _check_banned(request, grammar)
    seeds = request.choice_seeds()
    limits = [_max_tokens(request, len(prompt), services, param=param) for prompt in prompts]
    # Made once: a logit_bias can name the whole vocabulary, and all sequences share it.
    own_ends = services.tokenizer.eos_token_ids
    sampling = request.sampling(
        seed=seeds[0],
        max_tokens=limits[0],
        vocab_size=services.tokenizer.vocab_size,
        eos_token_ids=own_ends | further_ends,
        breaker_groups=partial(breaker_groups, services.tokenizer),
    )
    if grammar is not None and grammar.is_of_whole_answer:
        # Nothing else may follow, also where ends should be ignored.
        stops = tuple(sorted({*sampling.stop_token_ids, *own_ends}))
        sampling = replace(sampling, stop_token_ids=stops)
    sequences = [
        PlannedSequence(
            prompt_token_ids=prompt, sampling=replace(sampling, seed=seed, max_tokens=max_tokens)
        )
        for prompt, max_tokens in zip(prompts, limits, strict=True)
        for seed in seeds
    ]
    return Plan(
        sequences=tuple(sequences),
        num_prompt_tokens=sum(map(len, prompts)),
        stop=request.stop_strings,
        is_stream=bool(request.stream),
        includes_usage=request.includes_usage,
        counts_every_chunk=request.counts_every_chunk,
        form=AnswerForm(),
        num_choices=request.num_choices,
        admission=request.admission,
        timeout_s=request.timeout,
        grammar=grammar,
        banned_strings=request.all_banned_strings,
    )


def _check_banned(request: GenerationRequest, grammar: Grammar | None) -> None:
    """Refuse what cannot go back: a grammar's way, and a threshold that follows what was drawn."""
    if grammar is not None:
        field = request.form_field or _field_of(grammar)
    elif request.mirostat == 2:
        field = "mirostat"
    else:
        return
    if request.all_banned_strings:
        raise InvalidParameterError(
            f"banned_strings is given and so is {field}, which cannot take tokens back; leave one "
            "of them out",
            param="banned_strings",
        )


def _field_of(grammar: Grammar) -> str:
    if grammar.calls is not None:
        return "tools"
    return "tool_choice" if grammar.definition else "thinking_token_budget"


def _max_tokens(
    request: GenerationRequest, num_prompt_tokens: int, services: Services, *, param: str
) -> int:
    """The request's own limit, or what is left of the context."""
    context_length = services.engine.facts.context_length
    if num_prompt_tokens == 0:
        raise InvalidParameterError(f"{param} gives no tokens; send some text", param=param)
    if num_prompt_tokens >= context_length:
        raise PromptTooLongError(
            f"{param} has {num_prompt_tokens} tokens; the context holds {context_length}, "
            "the answer included: shorten it",
            param=param,
        )
    wanted = request.wanted_tokens
    if wanted is None:
        return context_length - num_prompt_tokens
    wanted = max(wanted, 1)  # 0 is for an echo: the token that comes with it is dropped
    if num_prompt_tokens + wanted > context_length:
        raise PromptTooLongError(
            f"{param} has {num_prompt_tokens} tokens and up to {wanted} are asked for, together "
            f"{num_prompt_tokens + wanted}; the context holds {context_length}: shorten {param} "
            f"or ask for at most {context_length - num_prompt_tokens}",
            param=param,
        )
    return wanted
