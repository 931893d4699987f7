"""Scores: tokens with log-probabilities that wait for their text to become certain.

Belongs to one choice; runs on the event loop. Does not know JSON.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection
from dataclasses import dataclass

from pipeserve.engine.messages import TokenLogprobs
from pipeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A token of the answer with its log-probabilities."""

    token_id: int
    text_offset: int
    """Characters of the answer before this token."""
    logprobs: TokenLogprobs | None
    """None for the first token of an echoed prompt, which nothing comes before."""


class Scores:
    """Takes tokens as they come and gives them out with the text that they are part of."""

    def __init__(self, tokenizer: Tokenizer, shown_token_ids: Collection[int]) -> None:
        """shown_token_ids: control tokens that are part of the text."""
        self._tokenizer = tokenizer
        self._shown_ids = frozenset(shown_token_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.num_decoded = 0
        """Characters of all tokens so far."""
        self._num_visible = 0
        self._waiting: list[ScoredToken] = []

    def add(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """The next token, of an echoed prompt or generated."""
        self._waiting.append(
            ScoredToken(token_id=token_id, text_offset=self.num_decoded, logprobs=logprobs)
        )
        is_hidden = token_id not in self._shown_ids
        raw = self._tokenizer.token_bytes(token_id, skip_special=is_hidden)
        self.num_decoded += len(self._decoder.decode(raw))

    def show(self, text: str) -> None:
        """More text of the answer is certain."""
        self._num_visible += len(text)

    def take(self, *, is_cut: bool) -> tuple[ScoredToken, ...]:
        """The tokens behind the certain text, without those that a stop string cut away."""
        taken = self._waiting
        self._waiting = []
        if is_cut:
            taken = [token for token in taken if token.text_offset < self._num_visible]
        return tuple(taken)
