"""CallsAnywhere and CallsAtStart: let a model write what it likes, and hold the calls that it
begins to their grammar.

TokenConstraints of one answer. Know no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pipeserve.core.constraint import FreeRun, WordArray
from pipeserve.text.word_tokens import WordTokens, num_begun

ANYTHING = FreeRun(watched=frozenset())


class MaskedAnswer(Protocol):
    """A TokenConstraint with a mask for every token."""

    def allowed(self) -> WordArray: ...

    def accept(self, token_id: int) -> None: ...

    def is_end(self, token_id: int) -> bool:
        """Whether the token ends answers."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""


class CallsAnywhere:
    """Text, and calls behind an opening word.

    Nothing is found out for the tokens of the text, but for those that may hold a beginning of
    the word.
    """

    def __init__(
        self,
        new_call: Callable[[], MaskedAnswer],
        opening: str,
        words: WordTokens,
        *,
        text_follows: bool,
    ) -> None:
        """new_call: what the opening and a call must match, or a text without the opening.
        text_follows: whether a complete call may be followed by text, else it says by what."""
        self._text_follows = text_follows
        self._new_call = new_call
        self._opening = opening.encode()
        self._words = words
        self._free_run = FreeRun(watched=words.watched(opening))
        self._call: MaskedAnswer | None = None
        self._held: list[int] = []
        """Tokens since the text may have begun the word."""
        self._tail = b""
        """Those as bytes."""
        self._has_begun = False
        """Whether the word is complete, so that this is a call."""

    def allowed(self) -> WordArray | FreeRun:
        if self._call is None:
            if not self._has_begun and num_begun(self._tail, self._opening) < 2:
                return self._free_run
            self._call = self._new_call()
            for token_id in self._held:
                self._call.accept(token_id)
        return self._call.allowed()

    def accept(self, token_id: int) -> None:
        if self._call is not None:
            self._call.accept(token_id)
            is_over = self._text_follows and self._has_begun and self._call.is_complete
            if is_over or self._call.is_end(token_id):
                self._call, self._held, self._tail, self._has_begun = None, [], b"", False
                return
        if not self._has_begun:
            self._look_for_opening(token_id)

    def _look_for_opening(self, token_id: int) -> None:
        self._held.append(token_id)
        self._tail += self._words.piece(token_id)
        self._has_begun = self._opening in self._tail
        if self._has_begun:
            return
        count = num_begun(self._tail, self._opening)
        while self._held and len(rest := self._tail[len(self._first_held) :]) >= count:
            self._held, self._tail = self._held[1:], rest
        if count < 2:
            self._call = None

    @property
    def _first_held(self) -> bytes:
        return self._words.piece(self._held[0])


class CallsAtStart:
    """A call that is the whole answer, if the answer begins like one; else any text."""

    def __init__(self, answer: MaskedAnswer, beginnings: Sequence[str], words: WordTokens) -> None:
        """answer: what calls must match, or a text that does not begin like one.
        beginnings: what calls begin with, whitespace left out."""
        self._answer = answer
        self._beginnings = tuple(each.encode() for each in beginnings)
        self._words = words
        self._start = b""
        self._is_call = self._is_free = False

    def allowed(self) -> WordArray | FreeRun:
        return ANYTHING if self._is_free else self._answer.allowed()

    def accept(self, token_id: int) -> None:
        if self._is_free:
            return
        self._answer.accept(token_id)
        if self._answer.is_end(token_id):  # and goes on: ends are ignored
            self._is_free = True
        elif not self._is_call:
            self._start += b"".join(self._words.piece(token_id).split())
            self._is_call = self._start.startswith(self._beginnings)
            self._is_free = not self._is_call and not any(
                each.startswith(self._start) for each in self._beginnings
            )
