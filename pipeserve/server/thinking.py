"""What requests say about how much a model may think before it answers.

Runs in the text executor. The fields are those of vLLM, llama-server and Qwen's own service.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeserve.server.body import Body

Budget = Annotated[int, Field(ge=-1)]


class ThinkingRequest(Body):
    """The fields of a chat that limit its thoughts; of several the smallest limit holds."""

    thinking_token_budget: Budget | None = None
    """Tokens of thoughts, then the answer begins; 0: no thoughts, -1: no limit."""
    thinking_budget_tokens: Budget | None = None
    """llama-server's name of thinking_token_budget."""
    thinking_budget: Budget | None = None
    """Qwen's name of thinking_token_budget."""
    reasoning_budget: Budget | None = None
    """Another name of thinking_token_budget."""

    @property
    def most_thoughts(self) -> int | None:
        """Tokens of thoughts; None: any number."""
        budgets = (
            self.thinking_token_budget,
            self.thinking_budget_tokens,
            self.thinking_budget,
            self.reasoning_budget,
        )
        return min((each for each in budgets if each is not None and each >= 0), default=None)
