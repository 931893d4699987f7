"""OutputReserve: how many KV blocks the running sequences will still want, learned from those that
have finished. Owned by the engine thread.

The projection is that of past-future scheduling (LightLLM, arXiv 2507.10150): not the sum of what
all will want, but the most that they hold at one time, since some end while others grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pipeserve.engine.sequence import Sequence

FIRST_GUESS = 128
"""Output tokens that are expected before any sequence has finished."""
MEMORY = 512
"""Finished sequences that count."""
RAISE = 0.05
"""Added to the caution by each preemption (as in gLLM, arXiv 2504.14775)."""
DECAY = 0.998
"""What is left of the caution after a finished sequence."""


class OutputReserve:
    """Expects of a sequence what others went on to have that were once as long."""

    def __init__(self, *, block_size: int, is_kept: bool = True) -> None:
        """is_kept: else nothing is expected to come."""
        self._block_size = block_size
        self._is_kept = is_kept
        self._recent: deque[int] = deque([FIRST_GUESS], maxlen=MEMORY)
        self._lengths = np.array([FIRST_GUESS])
        self._totals = np.array([FIRST_GUESS, 0])
        self._is_stale = False
        self._caution = 0.0

    def note_finished(self, num_output_tokens: int) -> None:
        """A sequence came to its end."""
        self._recent.append(num_output_tokens)
        self._is_stale = True
        self._caution *= DECAY

    def note_preemption(self) -> None:
        """The reserve was too small."""
        self._caution += RAISE

    def expected(self, num_output: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Output tokens still to come of sequences that have so many.

        Of one that is longer than all before it, as many again.
        """
        if self._is_stale:
            self._lengths = np.sort(np.array(self._recent))
            self._totals = np.append(self._lengths[::-1].cumsum()[::-1], 0)
            self._is_stale = False
        first = np.searchsorted(self._lengths, num_output, side="right")
        num_longer = len(self._lengths) - first
        mean = self._totals[first] / np.maximum(num_longer, 1)
        return np.where(num_longer > 0, mean - num_output, np.maximum(num_output, 1))

    def most_blocks(self, num_sequences: int) -> int:
        """What so many would want if each became as long as any that is remembered."""
        if not self._is_kept:
            return 0
        most = max(self._recent) * num_sequences * (1.0 + self._caution)
        return num_sequences + int(most) // self._block_size

    def num_blocks(self, sequences: Iterable[Sequence]) -> int:
        """Blocks beyond those that they hold now, or are about to get, at the fullest moment."""
        facts = np.array(
            [
                (
                    sequence.num_output_tokens + sequence.num_in_flight,
                    sequence.sampling.max_tokens,
                    len(sequence.token_ids) - (sequence.num_cached_tokens or 0),
                )
                for sequence in sequences
            ],
            np.int64,
        ).reshape(-1, 3)
        num_output, max_tokens, num_own = facts.T
        left = np.minimum(self.expected(num_output), max_tokens - num_output)
        order = np.argsort(left, kind="stable")
        left = left[order]
        # When the one at index i ends, those before it are gone and the others as much longer.
        num_alive = len(left) - np.arange(len(left))
        num_freed = num_own[order].cumsum() - num_own[order]
        growth = left * num_alive - num_freed
        most = float(growth.max(initial=0.0)) * (1.0 + self._caution)
        return len(left) + int(most) // self._block_size
