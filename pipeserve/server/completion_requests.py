"""The body of /v1/completions.

Runs in the text executor.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from pipeserve.core.sampling import MAX_LOGPROBS
from pipeserve.errors import InvalidParameterError
from pipeserve.server.body import Refused
from pipeserve.server.requests import GenerationRequest

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for /v1/completions."""


def _kind_of_prompt(value: object) -> str:
    if isinstance(value, str):
        return "<text>"
    first = value[0] if isinstance(value, list | tuple) and value else None
    if isinstance(first, list | tuple):
        return "<id lists>"
    return "<ids>" if isinstance(first, int) else "<texts>"


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[tuple[str, ...], Field(min_length=1), Tag("<texts>")]
        | Annotated[tuple[int, ...], Tag("<ids>")]
        | Annotated[tuple[tuple[int, ...], ...], Tag("<id lists>")],
        Discriminator(_kind_of_prompt),
    ]
    """One text or several, or the token ids of one or several."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 is for echo: nothing is generated."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    """The answer begins with the prompt, whose tokens get log-probabilities like the others."""
    suffix: str | None = None
    """Fill in what stands between prompt and suffix."""
    add_special_tokens: bool | None = None
    """false: a text becomes tokens without BOS in front."""
    best_of: Annotated[Any, Refused("leave it out or send 1; n gives several choices", 1)] = None

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidParameterError(
                "max_tokens is 0, which leaves nothing to answer; it must be at least 1, or set "
                "echo",
                param="max_tokens",
            )
        if self.echo and self.suffix:
            raise InvalidParameterError(
                "suffix is given and so is echo; leave one of them out", param="suffix"
            )
        return self

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
