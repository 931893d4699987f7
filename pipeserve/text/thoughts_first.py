"""ThoughtsFirst: counts what a model thinks before its answer, and ends it at a limit.

A TokenConstraint of one answer. Knows no HTTP.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import replace

from pipeserve.core.constraint import FreeRun, Thoughts, TokenConstraint, WordArray
from pipeserve.text.begun_calls import ANYTHING
from pipeserve.text.word_tokens import WordTokens, num_begun


class Anything:
    """An answer of any tokens."""

    def allowed(self) -> FreeRun:
        return ANYTHING

    def accept(self, token_id: int) -> None:
        """It makes no difference."""


class _Place(enum.Enum):
    UNDECIDED = enum.auto()
    """Nothing but whitespace and a beginning of the opening word yet."""
    THOUGHTS = enum.auto()
    ANSWER = enum.auto()


class ThoughtsFirst:
    """Thoughts of any tokens, at most so many, then the answer; or the answer at once."""

    def __init__(
        self, thoughts: Thoughts, new_answer: Callable[[], TokenConstraint], words: WordTokens
    ) -> None:
        """new_answer: what comes behind the thoughts, or with them as `thoughts` says."""
        self._rules = thoughts
        self._opening, self._closing = thoughts.opening.encode(), thoughts.closing.encode()
        self._new_answer = new_answer
        self._answer = new_answer()
        self._words = words
        self._place = _Place.THOUGHTS if thoughts.is_open else _Place.UNDECIDED
        self._tail = b""
        """The end of what was written: where a word may have begun."""
        self._num_tokens = 0
        """Of the thoughts."""

    def allowed(self) -> WordArray | FreeRun:
        match self._place:
            case _Place.ANSWER:
                return self._answer.allowed()
            case _Place.UNDECIDED:
                return self._answer_or_opening()
            case _Place.THOUGHTS:
                return self._thoughts()

    def _answer_or_opening(self) -> WordArray | FreeRun:
        allowed = self._answer.allowed()
        if self._rules.in_grammar:
            return allowed
        if isinstance(allowed, FreeRun):  # whether it thinks is told from its first words
            return replace(allowed, max_tokens=1)
        opening = self._words.whole(self._rules.opening)
        return allowed if opening is None else allowed | self._words.mask((opening,))

    def _thoughts(self) -> WordArray | FreeRun:
        most, closing = self._rules.max_tokens, self._rules.closing
        count = num_begun(self._tail, self._closing)
        if most is not None and self._num_tokens >= most:
            return self._forced(self._words.mask((self._words.next_of(closing, count),)))
        if self._rules.in_grammar:
            return self._answer.allowed()
        if count >= 2:  # the answer begins with a token of its own
            return self._words.mask_without(self._words.going_beyond(self._closing[count:]))
        left = None if most is None else most - self._num_tokens
        return FreeRun(watched=self._words.watched(closing), max_tokens=left)

    def _forced(self, mask_W: WordArray) -> WordArray | FreeRun:
        """Within a character no tag can begin; the grammar says how the character may end."""
        allowed = self._answer.allowed() if self._rules.in_grammar else mask_W
        if isinstance(allowed, FreeRun) or (allowed & mask_W).any():
            return mask_W
        return allowed

    def accept(self, token_id: int) -> None:
        match self._place:
            case _Place.ANSWER:
                self._answer.accept(token_id)
            case _Place.UNDECIDED:
                self._decide(token_id)
            case _Place.THOUGHTS:
                self._think(token_id)

    def _decide(self, token_id: int) -> None:
        self._tail = (self._tail + self._words.piece(token_id)).lstrip()
        if not self._tail.startswith(self._opening):
            self._answer.accept(token_id)
            if not self._opening.startswith(self._tail):
                self._place = _Place.ANSWER
            return
        self._place = _Place.THOUGHTS
        self._tail = self._tail.removeprefix(self._opening)
        if self._rules.in_grammar:
            self._answer.accept(token_id)
        else:  # what it was told of was no answer
            self._answer = self._new_answer()

    def _think(self, token_id: int) -> None:
        if self._rules.in_grammar:
            self._answer.accept(token_id)
        self._num_tokens += 1
        text = self._tail + self._words.piece(token_id)
        if self._closing in text:
            self._place = _Place.ANSWER
        self._tail = text[-len(self._closing) :]
