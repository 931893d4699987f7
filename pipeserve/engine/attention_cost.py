"""AttentionCost: how much longer a prompt token takes the more tokens stand before it.

Owned by the engine thread. Learned from the time that steps took on their slowest stage; the clock
is what it is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeserve.engine.step_draft import StepDraft

FORGETTING = 0.998
"""Weight of all earlier steps against the newest."""
LEARN_EVERY = 16
"""Steps with prompt tokens between two looks at what was learned."""
CERTAINTY = 4.0
"""Standard errors that the cost must be away from nothing before it counts."""
MOST = 1 / 512
"""No model's token takes twice as long this few tokens further on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step's time depends on."""

    num_rows: int
    num_positions: int
    """Keys that its decode rows read."""
    num_prompt_tokens: int
    num_pairs: int
    """Of its prompt tokens, each with a token before it."""

    @classmethod
    def of(cls, draft: StepDraft) -> StepWork:
        """Before the draft's tokens count as computed."""
        return cls(
            num_rows=len(draft.decode),
            num_positions=sum(chunk.sequence.num_computed_tokens for chunk in draft.decode),
            num_prompt_tokens=sum(chunk.num_tokens for chunk in draft.prefill),
            num_pairs=sum(
                chunk.num_tokens * (2 * chunk.sequence.num_computed_tokens + chunk.num_tokens) // 2
                for chunk in draft.prefill
            ),
        )


class AttentionCost:
    """A linear model of step times, by least squares that forget: of use is only the ratio of what
    a pair of tokens takes to what a prompt token takes."""

    def __init__(self, *, is_learned: bool = True) -> None:
        """is_learned: else all prompt tokens cost the same."""
        self._is_learned = is_learned
        self._moments = np.zeros((5, 5))
        self._products = np.zeros(5)
        self._square = 0.0
        self._weight = 0.0
        self._num_noted = 0
        self.per_position = 0.0
        """What a token that stands before it adds to a prompt token, whose own cost is 1."""

    def note(self, work: StepWork, time_s: float) -> None:
        """A step has come back."""
        if not self._is_learned or work.num_prompt_tokens == 0:
            return
        # Scaled to about 1, or the equations could not be solved.
        features = np.array(
            [
                1.0,
                work.num_rows / 64,
                work.num_positions / 65536,
                work.num_prompt_tokens / 256,
                work.num_pairs / 2**20,
            ]
        )
        self._moments = FORGETTING * self._moments + np.outer(features, features)
        self._products = FORGETTING * self._products + features * time_s
        self._square = FORGETTING * self._square + time_s * time_s
        self._weight = FORGETTING * self._weight + 1.0
        self._num_noted += 1
        if self._num_noted % LEARN_EVERY == 0:
            self._learn()

    def _learn(self) -> None:
        inverse = np.linalg.pinv(self._moments, rcond=1e-9, hermitian=True)
        costs = inverse @ self._products
        squared_errors = max(0.0, self._square - float(costs @ self._products))
        variance = squared_errors / max(1.0, self._weight - len(costs))
        deviation = math.sqrt(max(0.0, variance * float(inverse[4, 4])))
        per_token, per_pair = float(costs[3]) / 256, float(costs[4]) / 2**20
        self.per_position = 0.0
        if per_token > 0.0 and costs[4] > CERTAINTY * deviation:
            self.per_position = min(MOST, per_pair / per_token)

    def cost(self, first: int, num_tokens: int) -> float:
        """Of a chunk that begins at this position, in prompt tokens without any before them."""
        return num_tokens * (1.0 + self.per_position * (first + num_tokens / 2))

    def num_tokens(self, first: int, budget: float) -> int:
        """The longest chunk from this position that costs no more, but at least a quarter of the
        budget: the positive root of the quadratic equation that `cost` is."""
        slope = 1.0 + self.per_position * first
        root = math.sqrt(slope * slope + 2.0 * self.per_position * budget)
        return max(int(2.0 * budget / (slope + root)), int(budget / 4), 1)
