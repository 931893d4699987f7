"""WatchedOutput: the tokens of a sequence that must not write certain strings.

Owned by the engine thread. Keeps back what may yet be withdrawn, and knows what is banned where.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeserve.core.constraint import WORD_BITS, TextWatch, WordArray, num_words
from pipeserve.engine.messages import TokenLogprobs

MOST_BANNED_AT_ONCE = 1024
"""Tokens in one place; a sequence that found no other way has none that is likely."""
MOST_IN_VAIN = 4096
"""Withdrawals without a token that can be told: ways may branch in many places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputToken:
    """One that was sampled."""

    token_id: int
    logprobs: TokenLogprobs | None


class WatchedOutput:
    """Every token that a banned string begins with is banned in its place, as long as the tokens
    before it stay the same. So no way is tried twice."""

    def __init__(self, watch: TextWatch, *, vocab_size: int) -> None:
        self._watch = watch
        self._vocab_size = vocab_size
        self._num_told = 0
        self._held: list[OutputToken] = []
        self._num_settled = 0
        """Of those that are held, the first ones, which may be told."""
        self._num_in_vain = 0
        """Withdrawals since a token was told."""
        self._banned: dict[int, set[int]] = {}
        """By the place in the output, which is not beyond the known tokens."""

    @property
    def has_told(self) -> bool:
        """Whether the first token has been told."""
        return self._num_told > 0

    @property
    def is_stuck(self) -> bool:
        """Whether nothing likely is left to say."""
        most = min(MOST_BANNED_AT_ONCE, self._vocab_size // 2)
        num_banned = len(self._banned.get(self._num_known, ()))
        return num_banned > most or self._num_in_vain > MOST_IN_VAIN

    @property
    def _num_known(self) -> int:
        return self._num_told + len(self._held)

    def take(self, token: OutputToken, *, is_text: bool) -> int:
        """The next token; how many of the newest, this one included, are withdrawn.

        is_text: not so for a token that ends the sequence.
        """
        self._held.append(token)
        if not is_text:
            return 0
        sighting = self._watch.push(token.token_id)
        if sighting.num_withdrawn:
            first = self._held[-sighting.num_withdrawn]
            del self._held[-sighting.num_withdrawn :]
            self._ban(first.token_id)
            self._num_in_vain += 1
        self._num_settled = len(self._held) - sighting.num_held
        return sighting.num_withdrawn

    def _ban(self, token_id: int) -> None:
        """In the next place. What is banned beyond it followed tokens that are gone."""
        at = self._num_known
        self._banned = {
            place: ids for place, ids in self._banned.items() if self._num_told <= place <= at
        }
        self._banned.setdefault(at, set()).add(token_id)

    def tell(self, *, is_last: bool) -> list[OutputToken]:
        """Those that may be told now, each once; all where no more will come."""
        count = len(self._held) if is_last else self._num_settled
        told = self._held[:count]
        del self._held[:count]
        self._num_settled = 0
        if told:
            self._num_in_vain = 0
            self._num_told += count
        return told

    def mask_at(self, place: int) -> WordArray | None:
        """[W] words for the token in that place of the output; None where all may come."""
        banned = self._banned.get(place)
        if banned is None:
            return None
        words_W = np.full(num_words(self._vocab_size), 0xFFFFFFFF, np.uint32)
        words_W[-1] >>= np.uint32(len(words_W) * WORD_BITS - self._vocab_size)
        for token_id in banned:
            words_W[token_id // WORD_BITS] &= ~np.uint32(1 << token_id % WORD_BITS)
        return words_W.view(np.int32)
