"""TextCutter: parts of a long text that have the same tokens, one after another, as the whole.

The library cuts and merges a text in one call that nothing can end; between parts a thread can be
told that nobody waits for the tokens any more, and its memory is that of a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pipeserve.errors import InvalidParameterError

PART_LENGTH = 64 * 1024
"""Characters after which the next cut is taken: 15 to 50 ms of work."""
MAX_PART_LENGTH = 1024 * 1024
"""Characters without a cut that are still taken: 0.3 to 0.8 s of work."""

_LETTERS = "A-Za-zÀ-ÖØ-öø-ÿЁёА-яぁ-ゖァ-ヺ一-龥가-힣"
"""Letters for every pre-tokenizer, also for those that list theirs; none joins a mark before it."""
_MARKS = " \n,.!?，。、"
_CUT = re.compile(rf"[{_MARKS}](?<=[{_LETTERS}].)(?=[{_LETTERS}])", re.DOTALL)
"""Between a letter and a mark that a letter follows.

Why the tokens stay the same in byte-level BPE: in every kind of pretokenizers.py a match ends at
such a place, none looks back, and none that ends there or before looks ahead across it. Composing
characters (NFC) does not reach across it either.
"""
_LETTER_AND_MARK = re.compile(rf"[{_MARKS}](?<=[{_LETTERS}].)", re.DOTALL)


class TextCutter:
    """Knows where not to cut. Immutable; may be used from any thread at the same time."""

    def __init__(
        self, unbroken: Iterable[str], *, cuts_at: str = _MARKS, drops_space: bool
    ) -> None:
        """unbroken: tokens that may lie across a cut, spaces in them as spaces: a letter and a mark
        that follow each other in one of them are not cut. Where no token holds both, nothing is
        merged across. cuts_at: the marks to cut at. drops_space: the tokenizer puts a space in
        front of a part itself.
        """
        self._kept = frozenset(
            text[match.start() - 1 : match.start() + 1]
            for text in unbroken
            for match in _LETTER_AND_MARK.finditer(text)
        )
        self._cuts_at = frozenset(cuts_at)
        self._drops_space = drops_space

    def parts(self, text: str) -> Iterator[str]:
        """The text in parts of about PART_LENGTH.

        Raises:
            InvalidParameterError: there is no cut in MAX_PART_LENGTH characters.
        """
        start = 0
        while len(text) - start > PART_LENGTH:
            end = self._next_cut(text, start)
            if end is None:
                break
            yield text[start:end]
            start = end + 1 if self._drops_space else end
        if len(text) - start > MAX_PART_LENGTH:
            raise InvalidParameterError(
                f"the text has more than {MAX_PART_LENGTH} characters in which no letter, space or "
                "mark and letter follow each other; send less of it at once"
            )
        yield text[start:]

    def _next_cut(self, text: str, start: int) -> int | None:
        """Where the part that begins at `start` should end."""
        # In windows: a search holds the interpreter's lock.
        last = min(start + MAX_PART_LENGTH, len(text))
        for window in range(start + PART_LENGTH, last, PART_LENGTH):
            # One more, which is only looked at.
            for match in _CUT.finditer(text, window, window + PART_LENGTH + 1):
                end = match.start()
                if text[end] in self._cuts_at and text[end - 1 : end + 1] not in self._kept:
                    return end
        return None


def byte_level_cutter(added: Iterable[str]) -> TextCutter:
    """For byte-level BPE with these added tokens."""
    return TextCutter(added, drops_space=False)


def spm_cutter(tokens: Iterable[str], added: Iterable[str], *, adds_space: bool) -> TextCutter:
    """For SentencePiece BPE with these tokens, spaces in them as spaces, of which some are added.

    adds_space: in front of every stretch of text between added tokens.
    """
    tokens = frozenset(tokens)
    cuts_at = "".join(mark for mark in _MARKS if mark in tokens)  # unknown ones become one token
    if not adds_space:
        return TextCutter(tokens, cuts_at=cuts_at, drops_space=False)
    begins_with_letter = re.compile(f"[{_LETTERS}]").match
    has_stretch = not any(begins_with_letter(name) for name in added)  # to put the space before
    return TextCutter(tokens, cuts_at=" " if has_stretch else "", drops_space=True)
