"""PrefillBudget: how much prompt the next micro-batch computes.

Owned by the engine thread. Few enough tokens that those who decode hardly notice, and as many in
one micro-batch as in the next: a step that is longer than its neighbours leaves every other stage
idle for the difference.
"""

from __future__ import annotations

from pipeserve.core.batch import PipelineFacts

ITERATIONS = 5
"""Times the number of stages: over so many micro-batches waiting prompt tokens are spread while
others decode (token throttling, gLLM, arXiv 2504.14775). Fewer answer sooner, more keep the stages
busier: 97 % with 5 in `bench schedule --clients 256 --split 1,1,1,1 --output 64-256`."""
LEAST = 32
"""Prompt tokens that a step with any computes at least, where max_batch_tokens is not small."""
HOLD = 0.97
"""From one step to the next the budget falls to no less than this share, or it would follow every
arrival up and down."""
HOLD_EMPTY = 0.9
"""The same where no prompt waits."""


class PrefillBudget:
    """Free KV needs no part in it: a prompt is admitted only with the blocks of all its tokens."""

    def __init__(self, facts: PipelineFacts, *, is_throttled: bool = True) -> None:
        """is_throttled: else prompts take all the space beside the decode rows."""
        self._facts = facts
        self._is_throttled = is_throttled
        self._num_tokens = 0.0

    def num_tokens(self, *, num_decode_rows: int, num_pending: int, is_decoding: bool) -> int:
        """For the next step, with so many decode rows while so many prompt tokens wait.

        is_decoding: whether any sequence waits for a further token, in this step or another.
        """
        most, num_stages = self._facts.max_batch_tokens, self._facts.num_stages
        space = most - num_decode_rows
        if not self._is_throttled:
            return space
        if not is_decoding:  # one chunk for each stage, if they are not too small
            return min(space, max(-(-num_pending // num_stages), most // 8))
        held = self._num_tokens * (HOLD if num_pending else HOLD_EMPTY)
        wanted = num_pending / (ITERATIONS * num_stages)
        self._num_tokens = min(most, max(held, wanted, min(LEAST, most / 8), 1.0))
        return min(space, int(self._num_tokens))
