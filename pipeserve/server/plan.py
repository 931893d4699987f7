"""From a request body to the sequences it asks for: parse, template, tokenise, check.

Runs in the text executor, off the event loop; pure functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeserve.core.sampling import SamplingParams
from pipeserve.errors import InvalidParameterError, PromptTooLongError, UnknownModelError
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
    _check_model(request.model, services)
    generation_prompt = request.add_generation_prompt
    text = services.chat_template.render(
        [message.for_template() for message in request.messages],
        add_generation_prompt=True if generation_prompt is None else generation_prompt,
        extra=request.chat_template_kwargs,
    )
    prompt = services.tokenizer.encode(text, add_special_tokens=False)
    prompt = _begin_with_bos(prompt, services.tokenizer)
    return _plan(request, (prompt,), services, param="messages")


def plan_completion(body: bytes, services: Services) -> Plan:
    """The plan for a body of /v1/completions; raises as plan_chat does."""
    request = parse(body, CompletionRequest)
    _check_model(request.model, services)
    tokenizer = services.tokenizer
    prompts: list[Sequence[int]] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            prompts.append(tokenizer.encode(prompt, add_special_tokens=True))
        else:
            check_token_ids(prompt, vocab_size=tokenizer.vocab_size, param="prompt")
            prompts.append(prompt)
    return _plan(request, prompts, services, param="prompt")


def _begin_with_bos(prompt: list[int], tokenizer: Tokenizer) -> list[int]:
    """A template writes the special tokens itself, but some leave BOS to the tokenizer."""
    bos = tokenizer.bos_token_id
    if not tokenizer.add_bos or bos is None or prompt[:1] == [bos]:
        return prompt
    return [bos, *prompt]


def _check_model(name: str, services: Services) -> None:
    if name != services.card.name:
        raise UnknownModelError(
            f"model {name!r} is not served here; this daemon serves {services.card.name!r}",
            param="model",
        )


def _plan(
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    services: Services,
    *,
    param: str,
) -> Plan:
    seeds = request.choice_seeds()
    sequences: list[PlannedSequence] = []
    for prompt in prompts:
        max_tokens = _max_tokens(request, len(prompt), services, param=param)
        sequences += (
            PlannedSequence(
                prompt_token_ids=prompt,
                sampling=request.sampling(
                    seed=seed,
                    max_tokens=max_tokens,
                    vocab_size=services.tokenizer.vocab_size,
                    eos_token_ids=services.tokenizer.eos_token_ids,
                ),
            )
            for seed in seeds
        )
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
