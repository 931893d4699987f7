"""OpenAI request bodies: parsed strictly, refused with the field, its value and the mend.

Runs in the text executor. With responses.py the only place that knows OpenAI's JSON.
"""

from __future__ import annotations

import json
import secrets
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from pipeserve.core.sampling import MAX_LOGPROBS, MAX_SEED, SamplingParams
from pipeserve.errors import InvalidParameterError

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 500
"""Every choice prepares its own search for the stop strings, on the event loop."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for /v1/completions."""


def _refused(mend: str, *harmless: object) -> AfterValidator:
    """A field that is understood but not supported, unless it holds a value that asks nothing."""

    def check(value: object) -> object:
        if value is None or value in harmless:
            return value
        raise ValueError(f"this is not supported: {mend}")

    return AfterValidator(check)


def _kind_of_text(value: object) -> str:
    """Which branch of `string or list` a value belongs to; tags in <> stay out of messages."""
    return "<text>" if isinstance(value, str) else "<list>"


def _kind_of_prompt(value: object) -> str:
    if isinstance(value, str):
        return "<text>"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        return "<id lists>"
    return "<ids>" if isinstance(first, int) else "<texts>"


class _Body(BaseModel):
    """Strict types, no NaN; unknown fields are ignored and null is the same as absent."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class ContentPart(_Body):
    """One part of a message; only text can be served."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[tuple[ContentPart, ...], Tag("<list>")],
        Discriminator(_kind_of_text),
    ]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[Any, _refused("leave it out", [])] = None
    function_call: Annotated[Any, _refused("leave it out")] = None
    audio: Annotated[Any, _refused("leave it out")] = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: the content as one string, `developer` as `system`."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class StreamOptions(_Body):
    include_usage: bool | None = None


_LEAVE_OUT = "leave it out"
_NO_GRAMMAR = "leave it out; this version does not constrain the output"

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class GenerationRequest(_Body):
    """What chat and plain completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("<text>")]
            | Annotated[tuple[StopString, ...], Field(max_length=MAX_STOP_STRINGS), Tag("<list>")],
            Discriminator(_kind_of_text),
        ]
        | None
    ) = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 mean no limit."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None

    response_format: Annotated[Any, _refused(_NO_GRAMMAR, {"type": "text"})] = None
    structured_outputs: Annotated[Any, _refused(_NO_GRAMMAR)] = None
    guided_json: Annotated[Any, _refused(_NO_GRAMMAR)] = None
    guided_regex: Annotated[Any, _refused(_NO_GRAMMAR)] = None
    guided_choice: Annotated[Any, _refused(_NO_GRAMMAR)] = None
    guided_grammar: Annotated[Any, _refused(_NO_GRAMMAR)] = None
    grammar: Annotated[Any, _refused(_NO_GRAMMAR, "")] = None
    prompt_logprobs: Annotated[Any, _refused(_LEAVE_OUT, False)] = None
    use_beam_search: Annotated[Any, _refused(_LEAVE_OUT, False)] = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidParameterError(
                "stream_options is given but stream is not true; set stream or leave it out",
                param="stream_options",
            )
        return self

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None: no log-probabilities at all."""

    @property
    @abstractmethod
    def wanted_tokens(self) -> int | None:
        """Most tokens to generate; None: as many as the context has room for."""

    def choice_seeds(self) -> tuple[int, ...]:
        """One seed per choice: consecutive from the request's own, or random ones."""
        if self.seed is None:
            return tuple(secrets.randbelow(MAX_SEED + 1) for _ in range(self.num_choices))
        return tuple((self.seed + index) % (MAX_SEED + 1) for index in range(self.num_choices))

    def sampling(
        self, *, seed: int, max_tokens: int, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> SamplingParams:
        """The values that the request gives, and the defaults for the rest.

        Raises:
            InvalidParameterError: a value is out of its range or names no token.
        """
        given = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None
        }
        if self.top_k is not None and self.top_k > 0:
            given["top_k"] = min(self.top_k, vocab_size)
        own_stops = self.stop_token_ids or ()
        check_token_ids(own_stops, vocab_size=vocab_size, param="stop_token_ids")
        return SamplingParams(
            seed=seed,
            max_tokens=max_tokens,
            logit_bias=tuple(self._logit_bias(vocab_size)),
            num_logprobs=self.num_logprobs,
            stop_token_ids=tuple(sorted({*own_stops, *(() if self.ignore_eos else eos_token_ids)})),
            **given,
        )

    def _logit_bias(self, vocab_size: int) -> Iterator[tuple[int, float]]:
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise InvalidParameterError(
                    f'logit_bias has the key {_shown(key)}; keys must be token ids such as "1234"',
                    param="logit_bias",
                )
            check_token_ids((int(key),), vocab_size=vocab_size, param="logit_bias")
            yield int(key), bias


_SAMPLING_FIELDS = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of max_tokens; wins where both are given."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: Annotated[Any, _refused("leave it out; this version does not call tools", [])] = None
    tool_choice: Annotated[Any, _refused('leave it out or send "none"', "none")] = None
    functions: Annotated[Any, _refused(_LEAVE_OUT, [])] = None
    function_call: Annotated[Any, _refused('leave it out or send "none"', "none")] = None
    modalities: Annotated[Any, _refused('leave it out or send ["text"]', ["text"])] = None
    audio: Annotated[Any, _refused(_LEAVE_OUT)] = None
    web_search_options: Annotated[Any, _refused(_LEAVE_OUT)] = None
    store: Annotated[Any, _refused("leave it out; nothing is stored", False)] = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameterError(
                f"top_logprobs is {self.top_logprobs} but logprobs is not true; set logprobs to "
                "true or leave top_logprobs out",
                param="top_logprobs",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[tuple[str, ...], Field(min_length=1), Tag("<texts>")]
        | Annotated[tuple[int, ...], Tag("<ids>")]
        | Annotated[tuple[tuple[int, ...], ...], Tag("<id lists>")],
        Discriminator(_kind_of_prompt),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    echo: Annotated[Any, _refused(_LEAVE_OUT, False)] = None
    suffix: Annotated[Any, _refused(_LEAVE_OUT, "")] = None
    best_of: Annotated[Any, _refused("leave it out or send 1; n gives several choices", 1)] = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """One entry per prompt: a text or its token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (self.prompt,)
        return self.prompt


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """Reads a request body.

    Raises:
        InvalidParameterError: not JSON, or a field is missing, malformed or not supported.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    param = _field_name(problem["loc"]) or None
    raise InvalidParameterError(_explain(problem, param), param=param)


def check_token_ids(ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Raises InvalidParameterError where an id is not in the vocabulary."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
    raise InvalidParameterError(
        f"{param} names token {wrong}; ids of this model run from 0 to {vocab_size - 1}",
        param=param,
    )


_MUST_BE = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "string_too_long": "a string of at most {max_length} characters",
    "string_too_short": "a string of at least {min_length} character",
}
"""What to write instead, by pydantic's name of the mistake."""


def _explain(problem: ErrorDetails, field: str | None) -> str:
    details = problem.get("ctx", {})
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {details['error']}"
    if field is None:
        return "the body is not a JSON object; send one with the field model and the others"
    if problem["type"] == "missing":
        return f"{field} is missing; the request needs it"
    if problem["type"] == "value_error":
        return f"{field} is {_shown(problem['input'])}; {details['error']}"
    must_be = _MUST_BE.get(problem["type"])
    if problem["type"] == "tuple_type" and str(problem["loc"][-1]).startswith("<"):
        must_be = "a string or a list"  # neither branch of a union fits
    mend = f"it must be {must_be.format(**details)}" if must_be else problem["msg"]
    return f"{field} is {_shown(problem['input'])}; {mend}"


def _field_name(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "<list>", 1) -> "messages[0].content[1]"."""
    name = ""
    for step in location:
        if isinstance(step, int):
            name += f"[{step}]"
        elif not step.startswith("<"):
            name += f".{step}" if name else step
    return name


def _shown(value: object) -> str:
    """A value as JSON, cut short: enough to recognise it, not enough to leak a prompt."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
