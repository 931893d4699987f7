"""What the bodies of chat and plain completions have in common, and the sampling they ask for.

Runs in the text executor.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.sampler_chain import BreakerGroup
from pipeserve.core.sampling import MAX_SEED, SamplingParams
from pipeserve.errors import InvalidParameterError
from pipeserve.server.body import Body, Ignored, Refused, check_token_ids, kind_of_text, shown
from pipeserve.server.sampler_fields import SamplerFields
from pipeserve.server.structured import FormRequest

MAX_CHOICES = 128
MAX_SALT_CHARACTERS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 500
"""Every choice prepares its own search for the stop strings, on the event loop."""


class StreamOptions(Body):
    include_usage: bool | None = None
    """The stream ends with a chunk that counts tokens."""
    continuous_usage_stats: bool | None = None
    """Beside include_usage: every chunk counts its own choice's tokens so far."""
    include_obfuscation: Ignored = None


_ECHO = "send echo and logprobs to /v1/completions"

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class GenerationRequest(FormRequest, SamplerFields):
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
            Discriminator(kind_of_text),
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

    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    """Lower is served first; 0 where it is left out."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds that the answer may take, waiting included."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    """Computed prompt tokens are shared only with requests that bring the same one."""
    service_tier: str | None = None
    """flex: served only while others leave room. Every other value is taken without effect."""

    user: Ignored = None
    metadata: Ignored = None
    safety_identifier: Ignored = None

    prompt_logprobs: Annotated[Any, Refused(_ECHO, False)] = None
    use_beam_search: Annotated[Any, Refused("leave it out", False)] = None

    bad_words: Annotated[Any, Refused("send banned_strings", [])] = None
    allowed_token_ids: Annotated[Any, Refused("send logit_bias", [])] = None
    truncate_prompt_tokens: Annotated[Any, Refused("shorten the prompt")] = None
    include_stop_str_in_output: Annotated[Any, Refused("add the stop string yourself", False)] = (
        None
    )
    skip_special_tokens: Annotated[Any, Refused("leave it out", True)] = None

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
    def counts_every_chunk(self) -> bool:
        """Whether every chunk of a stream counts tokens."""
        options = self.stream_options
        return self.includes_usage and options is not None and bool(options.continuous_usage_stats)

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None: no log-probabilities at all."""

    @property
    @abstractmethod
    def wanted_tokens(self) -> int | None:
        """Most tokens to generate; None: as many as the context has room for."""

    @property
    def admission(self) -> AdmissionParams:
        """Without the account, which is no matter of the body."""
        return AdmissionParams(
            priority=self.priority or 0,
            is_background=self.service_tier == "flex",
            cache_salt=self.cache_salt or "",
        )

    def choice_seeds(self) -> tuple[int, ...]:
        """One seed per choice: consecutive from the request's own, or random ones."""
        if self.seed is None:
            return tuple(secrets.randbelow(MAX_SEED + 1) for _ in range(self.num_choices))
        return tuple((self.seed + index) % (MAX_SEED + 1) for index in range(self.num_choices))

    def sampling(
        self,
        *,
        seed: int,
        max_tokens: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        breaker_groups: Callable[[tuple[str, ...]], tuple[BreakerGroup, ...]],
    ) -> SamplingParams:
        """The values that the request gives, and the defaults for the rest.

        breaker_groups: what the strings that interrupt a repetition are in tokens.

        Raises:
            InvalidParameterError: a value is out of its range or names no token.
        """
        given = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None
        }
        if self.top_k is not None and self.top_k > 0:
            given["top_k"] = min(self.top_k, vocab_size)
        if self.repeat_penalty is not None:
            given["repetition_penalty"] = self.repeat_penalty
        own_stops = self.stop_token_ids or ()
        check_token_ids(own_stops, vocab_size=vocab_size, param="stop_token_ids")
        params = SamplingParams(
            seed=seed,
            max_tokens=max_tokens,
            logit_bias=tuple(self._logit_bias(vocab_size)),
            num_logprobs=self.num_logprobs,
            stop_token_ids=tuple(sorted({*own_stops, *(() if self.ignore_eos else eos_token_ids)})),
            **given,
        )
        chain = self.chain(penalises=params.has_penalties, breaker_groups=breaker_groups)
        return params if chain is None else replace(params, chain=chain)

    def _logit_bias(self, vocab_size: int) -> Iterator[tuple[int, float]]:
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise InvalidParameterError(
                    f'logit_bias has the key {shown(key)}; keys must be token ids such as "1234"',
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
