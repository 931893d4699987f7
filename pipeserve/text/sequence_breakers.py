"""Sequence breakers of DRY: from strings to the tokens at which a repetition may not go on.

Pure functions of a tokenizer; a few milliseconds per string at 128,000 tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from pipeserve.core.sampler_chain import BreakerGroup
from pipeserve.text.tokenizer import Tokenizer

_SEPARATOR = "\u0100"
"""No byte: tokens are searched as Latin-1."""
_MOST_TAIL_TOKENS = 20
"""llama.cpp's limit."""


def breaker_groups(tokenizer: Tokenizer, strings: Sequence[str]) -> tuple[BreakerGroup, ...]:
    """Heads and tails as in llama.cpp (src/llama-sampling.cpp): a token that holds a string is a
    breaker of its own; one that ends with its beginning is one where the tokens of the rest
    follow. A string is not cut inside a character."""
    searched = _Pieces(tokenizer)
    heads: defaultdict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for string in dict.fromkeys(strings):
        whole = searched.ids_with(string)
        heads[()].append(whole)
        for beginning, rest in _cuts(string):
            ids = np.setdiff1d(searched.ids_that_end_with(beginning), whole)
            if len(ids) > 0:
                tail = tokenizer.encode(rest, add_special_tokens=False, parse_special=False)
                heads[tuple(tail[:_MOST_TAIL_TOKENS])].append(ids)
    return tuple(
        BreakerGroup(tail=tail, heads=np.unique(np.concatenate(found)).astype(np.int32).tobytes())
        for tail, found in sorted(heads.items())
    )


def _cuts(string: str) -> Iterator[tuple[str, str]]:
    for place in range(1, len(string)):
        yield string[:place], string[place:]


class _Pieces:
    """The bytes of all tokens as one text, to be searched at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = [piece.decode("latin-1") for piece in tokenizer.pieces(skip_special=False)]
        self._text = _SEPARATOR.join([*pieces, ""])
        self._starts = np.cumsum([0, *(len(piece) + 1 for piece in pieces)])

    def ids_with(self, string: str) -> np.ndarray:
        return self._find(_latin(string))

    def ids_that_end_with(self, string: str) -> np.ndarray:
        return self._find(_latin(string) + _SEPARATOR)

    def _find(self, wanted: str) -> np.ndarray:
        places, place = [], self._text.find(wanted)
        while place >= 0:
            places.append(place)
            place = self._text.find(wanted, place + 1)
        return np.unique(np.searchsorted(self._starts, places, side="right") - 1)


def _latin(string: str) -> str:
    return string.encode("utf-8", "replace").decode("latin-1")
