"""What requests say about how much a model may think before it answers.

Runs in the text executor. The fields are those of vLLM, llama-server and Qwen's own service.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeserve.errors import InvalidParameterError
from pipeserve.server.body import Body

Budget = Annotated[int, Field(ge=-1)]
"""Tokens; -1: any number."""


class ThinkingRequest(Body):
    """The fields of a chat that limit its thoughts; one of them at most."""

    thinking_token_budget: Budget | None = None
    """Tokens of thoughts, then the answer begins; 0: no thoughts, -1: no limit."""
    thinking_budget_tokens: Budget | None = None
    """llama-server's name of thinking_token_budget."""
    thinking_budget: Budget | None = None
    """Qwen's name of thinking_token_budget."""
    reasoning_budget: Budget | None = None
    """Another name of thinking_token_budget."""

    @model_validator(mode="after")
    def _budgets_agree(self) -> ThinkingRequest:
        given = {name: value for name in _NAMES if (value := getattr(self, name)) is not None}
        if len(set(given.values())) > 1:
            first, second, *_ = given
            raise InvalidParameterError(
                f"{second} is {given[second]} but {first} is {given[first]}; leave one of them out",
                param=second,
            )
        return self

    @property
    def most_thoughts(self) -> int | None:
        """Tokens of thoughts; None: any number."""
        given = (getattr(self, name) for name in _NAMES)
        budget = next((value for value in given if value is not None), None)
        return None if budget is None or budget < 0 else budget


_NAMES = tuple(ThinkingRequest.model_fields)
