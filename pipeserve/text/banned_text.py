"""BannedTextWatch: sees in an answer's tokens, as they come, whether they write a banned string.

Belongs to one sequence; not to be shared between threads. Knows no requests and no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeserve.core.constraint import BannedStrings, Sighting
from pipeserve.text.detokenizer import Detokenizer, DetokenizerMark
from pipeserve.text.tokenizer import Tokenizer

MAX_STEPS_KEPT = 4096
"""Of Phrases: more than a vocabulary's letters after the ends of a few strings."""


class Phrases:
    """Looks for several strings at once in a text that comes letter by letter.

    Where it stands is a string itself: the longest end of the text that begins one of them, so
    that going back is free.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._whole = frozenset(map(fold, strings))
        self._beginnings = frozenset(
            phrase[:length] for phrase in self._whole for length in range(1, len(phrase))
        )
        self.first_letters = frozenset(phrase[0] for phrase in self._whole)
        self.step = lru_cache(MAX_STEPS_KEPT)(self._step)
        """See _step; a text that repeats itself costs a look."""

    def _step(self, end: str, letter: str) -> tuple[str, int]:
        """The text that ended with `end` goes on: its new end, and the length of the longest of
        the strings that it now ends with, or 0."""
        end += letter
        lengths = range(len(end), 0, -1)
        completed = next((length for length in lengths if end[-length:] in self._whole), 0)
        while end and end not in self._beginnings:
            end = end[1:]
        return end, completed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Between two tokens."""

    mark: DetokenizerMark
    position: int
    """Characters before it."""
    end: str
    """What of them may begin a banned string."""
    tail: str
    """The last of them, as many as a stop string may have begun with."""


class BannedTextWatch:
    """A TextWatch: capitals count as small letters, stop strings are seen as the client sees them.

    A banned string is looked for in what is before the first stop string. Where a token completes
    both, the stop string ends the answer if nothing banned is before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        phrases: Phrases,
        *,
        stop: Sequence[str],
        prompt_token_ids: Sequence[int],
        shown_token_ids: Sequence[int],
    ) -> None:
        """See Detokenizer for the last two."""
        self._detokenizer = Detokenizer(
            tokenizer, prompt_token_ids=prompt_token_ids, shown_token_ids=shown_token_ids
        )
        self._phrases = phrases
        self._stops = [each for each in stop if each]
        self._tail_length = max(map(len, self._stops), default=1) - 1
        self._now = _Place(mark=self._detokenizer.mark(), position=0, end="", tail="")
        self._held: list[_Place] = []
        """The place before each token that may yet be withdrawn."""
        self._is_stopped = False

    def push(self, token_id: int) -> Sighting:
        if self._is_stopped:
            return Sighting()
        before = self._now
        self._held.append(before)
        text = self._detokenizer.push(token_id)
        end, match = self._search(before, fold(text))
        longer = before.tail + text
        tail = longer[len(longer) - min(len(longer), self._tail_length) :]
        self._now = _Place(
            mark=self._detokenizer.mark(),
            position=before.position + len(text),
            end=end,
            tail=tail,
        )
        if match is None and not end and not self._now.mark.is_within:
            self._held.clear()
            return Sighting()
        cut = self._cut(longer, first=before.position - len(before.tail))
        if match is not None and (cut is None or match[1] <= cut):
            return self._withdraw(match[0])
        if cut is not None:
            self._is_stopped = True
            return Sighting()
        self._settle()
        return Sighting(num_held=len(self._held))

    def _search(self, before: _Place, text: str) -> tuple[str, tuple[int, int] | None]:
        """The end of the text, and where a banned string begins and ends."""
        end = before.end
        if not end and self._phrases.first_letters.isdisjoint(text):
            return "", None
        for position, letter in enumerate(text, start=before.position + 1):
            end, length = self._phrases.step(end, letter)
            if length:
                return end, (position - length, position)
        return end, None

    def _cut(self, text: str, *, first: int) -> int | None:
        """Where the text that the client sees ends: before the stop string that is complete first.

        first: the position of the text's first character.
        """
        found = [
            (at + len(stop), -len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0
        ]
        return None if not found else first + sum(min(found))

    def _num_tokens_before(self, position: int) -> int:
        """How many of the held tokens have no byte of the character there, or of later ones."""
        for index, after in enumerate([*self._held[1:], self._now]):
            if after.position > position or (after.position == position and after.mark.is_within):
                return index
        return len(self._held)

    def _withdraw(self, position: int) -> Sighting:
        """Go back to before the token that the character there begins with. One that is settled
        stays: after it came what could be no banned string, and was then withdrawn itself."""
        first = self._num_tokens_before(position)
        num_withdrawn = len(self._held) - first
        self._now = self._held[first]
        self._detokenizer.go_back(self._now.mark)
        del self._held[first:]
        self._settle()
        return Sighting(num_held=len(self._held), num_withdrawn=num_withdrawn)

    def _settle(self) -> None:
        """Hold only those from where a banned string may have begun."""
        del self._held[: self._num_tokens_before(self._now.position - len(self._now.end))]


class BannedTextWatches:
    """Makes them for one tokenizer, which is read when the first is wanted; on one thread at a
    time."""

    def __init__(self, read_tokenizer: Callable[[], Tokenizer]) -> None:
        self._read_tokenizer = read_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._latest: tuple[tuple[str, ...], Phrases] | None = None
        """The choices of one request come one after another."""

    def build(self, banned: BannedStrings, prompt_token_ids: Sequence[int]) -> BannedTextWatch:
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        if self._latest is None or self._latest[0] != banned.strings:
            self._latest = banned.strings, Phrases(banned.strings)
        return BannedTextWatch(
            self._tokenizer,
            self._latest[1],
            stop=banned.stop,
            prompt_token_ids=prompt_token_ids,
            shown_token_ids=banned.shown_token_ids,
        )


def fold(text: str) -> str:
    """As many letters, alike where they differ in case only."""
    return text.lower() if text.isascii() else "".join(map(_fold_letter, text))


def _fold_letter(letter: str) -> str:
    folded = letter.casefold()
    if len(folded) > 1:
        folded = letter.lower()
    return folded if len(folded) == 1 else letter
