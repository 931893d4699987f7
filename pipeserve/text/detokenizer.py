"""Detokenizer: one sequence's tokens to text as they come, cut exactly before a stop string.

Belongs to one request; not to be shared between threads. Its cost is linear in the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeserve.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")

_MOST_BYTES_OF_CHARACTER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizerMark:
    """Where a Detokenizer stands between two tokens."""

    decoder: tuple[bytes, int]
    """Its state: the bytes of an incomplete character first."""
    strips_space: bool

    @property
    def is_within(self) -> bool:
        """Whether the next character has begun."""
        return bool(self.decoder[0])


class Detokenizer:
    """What `push` and `finish` return, put together, is the decoded text up to a stop string.

    A character is given out once all its bytes are there; text that may be the beginning of a
    stop string once it turns out not to be. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
        shown_token_ids: Collection[int] = (),
    ) -> None:
        """
        Args:
            stop: the text ends before whichever of these is complete first. Empty ones are ignored.
            skip_special_tokens: leave out the names of control tokens.
            prompt_token_ids: what the generated tokens continue. Where the prompt has text, a space
                that the first token begins with belongs to the text; where it has none, it is the
                tokenizer's own. A character that the prompt leaves half is completed.
            shown_token_ids: control tokens whose names are part of the text all the same.
        """
        self._pieces = tokenizer.pieces(skip_special=skip_special_tokens)
        self._shown = {
            token_id: tokenizer.token_bytes(token_id, skip_special=False)
            for token_id in shown_token_ids
        }
        self._decoder = _UTF8(errors="replace")
        self._decode = self._decoder.decode
        for token_id in prompt_token_ids[-_MOST_BYTES_OF_CHARACTER:]:
            self._decode(tokenizer.token_bytes(token_id))
        self._strips_space = tokenizer.strips_leading_space and all(
            tokenizer.is_special(token_id) for token_id in prompt_token_ids
        )
        self._stops = _StopMatcher(stop) if any(stop) else None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing comes after that."""
        return self._stops is not None and self._stops.found

    def push(self, token_id: int) -> str:
        """Take the next token; the text that is now certain, possibly empty."""
        piece = self._shown.get(token_id) or self._pieces[token_id]
        if self._strips_space and piece:
            self._strips_space = False
            piece = piece.removeprefix(b" ")
        text = self._decode(piece)
        return text if self._stops is None else self._stops.push(text)

    def mark(self) -> DetokenizerMark:
        """For go_back; stop strings cannot be unseen."""
        assert self._stops is None, "without stop strings"
        return DetokenizerMark(decoder=self._decoder.getstate(), strips_space=self._strips_space)

    def go_back(self, mark: DetokenizerMark) -> None:
        """Forget the tokens since then."""
        self._decoder.setstate(mark.decoder)
        self._strips_space = mark.strips_space

    def finish(self) -> str:
        """The text that was held back; call it once, after the last token."""
        text = self._decode(b"", final=True)
        return text if self._stops is None else self._stops.push(text) + self._stops.rest()


class _StopMatcher:
    """Looks for several strings at once in a text that comes in parts.

    Per stop string it keeps how much of it the text ends with (Knuth, Morris and Pratt 1977), so
    that no character is looked at twice.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = [stop for stop in stops if stop]
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._first_letters = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        """The longest end of the text that begins a stop string."""

    def push(self, text: str) -> str:
        """Take more text; what of it, and of the text held back, cannot be part of a stop."""
        if self.found:
            return ""
        if not self._held and self._first_letters.isdisjoint(text):
            return text
        pending = self._held + text
        for position, letter in enumerate(text, start=len(self._held) + 1):
            length = self._advance(letter)
            if length:
                self.found = True
                self._held = ""
                return pending[: position - length]
        cut = len(pending) - max(self._matched)
        self._held = pending[cut:]
        return pending[:cut]

    def rest(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, letter: str) -> int:
        """Take one letter; the length of the longest stop string that it completes, or 0."""
        completed = 0
        for index, stop in enumerate(self._stops):
            matched, failures = self._matched[index], self._failures[index]
            while matched and stop[matched] != letter:
                matched = failures[matched - 1]
            if stop[matched] == letter:
                matched += 1
            self._matched[index] = matched
            if matched == len(stop):
                completed = max(completed, matched)
        return completed


def _failure_table(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest own beginning that ends it."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
