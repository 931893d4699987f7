"""From a request body to the sequences it asks for: parse, template, tokenise, check.

Runs in the text executor, off the event loop; pure functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeserve.core.sampling import SamplingParams
from pipeserve.errors import InvalidParameterError, PromptTooLongError
from pipeserve.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    check_token_ids,
    parse,
)
from pipeserve.server.state import Services
from pipeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSequence:
    """One choice of the answer, before it is submitted."""

    prompt_token_ids: Sequence[int]
    sampling: SamplingParams


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

    @property
    def has_logprobs(self) -> bool:
        return self.sequences[0].sampling.num_logprobs is not None


def plan_chat(body: bytes, services: Services) -> Plan:
    """The plan for a body of /v1/chat/completions.

    Raises:
        RequestError: the body is malformed, names another model, does not fit the template or
            the context.
    """
    request = parse(body, ChatCompletionRequest)
    services.card.check_name(request.model)
    _check_count(request, 1, services)
    generation_prompt = request.add_generation_prompt
    text = services.chat_template.render(
        [message.for_template() for message in request.messages],
        add_generation_prompt=True if generation_prompt is None else generation_prompt,
        extra=request.chat_template_kwargs,
    )
    _check_size(text, services, param="messages")
    prompt = services.tokenizer.encode(text, add_special_tokens=False)
    prompt = _begin_with_bos(prompt, services.tokenizer)
    return _plan(request, (prompt,), services, param="messages")


def plan_completion(body: bytes, services: Services) -> Plan:
    """The plan for a body of /v1/completions; raises as plan_chat does."""
    request = parse(body, CompletionRequest)
    services.card.check_name(request.model)
    _check_count(request, len(request.prompts), services)
    tokenizer = services.tokenizer
    prompts: list[Sequence[int]] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            _check_size(prompt, services, param="prompt")
            prompts.append(tokenizer.encode(prompt, add_special_tokens=True))
        else:
            check_token_ids(prompt, vocab_size=tokenizer.vocab_size, param="prompt")
            prompts.append(prompt)
    return _plan(request, prompts, services, param="prompt")


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


def _begin_with_bos(prompt: list[int], tokenizer: Tokenizer) -> list[int]:
    """A template writes the special tokens itself, but some leave BOS to the tokenizer."""
    bos = tokenizer.bos_token_id
    if not tokenizer.add_bos or bos is None or prompt[:1] == [bos]:
        return prompt
    return [bos, *prompt]


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
) -> Plan:
    seeds = request.choice_seeds()
    limits = [_max_tokens(request, len(prompt), services, param=param) for prompt in prompts]
    # Made once: a logit_bias can name the whole vocabulary, and all sequences share it.
    sampling = request.sampling(
        seed=seeds[0],
        max_tokens=limits[0],
        vocab_size=services.tokenizer.vocab_size,
        eos_token_ids=services.tokenizer.eos_token_ids,
    )
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
    )


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
    if num_prompt_tokens + wanted > context_length:
        raise PromptTooLongError(
            f"{param} has {num_prompt_tokens} tokens and up to {wanted} are asked for, together "
            f"{num_prompt_tokens + wanted}; the context holds {context_length}: shorten {param} "
            f"or ask for at most {context_length - num_prompt_tokens}",
            param=param,
        )
    return wanted
