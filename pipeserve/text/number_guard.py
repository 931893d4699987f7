"""NumberGuard: keeps the numbers of JSON answers within what a double holds.

JSON's own grammar has no bounds, but readers make null or infinity of 1e999. Used by one thread at
a time; knows tokens as bytes, nothing of schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from pipeserve.core.constraint import WORD_BITS, WordArray

MAX_EXPONENT_DIGITS = 2
MAX_DIGITS = 200
"""In a row. A number is below 10 ** (200 + 99)."""

_LEADING_DIGITS = re.compile(rb"[+-]?(\d+)")
_IN_EXPONENT = re.compile(rb"\d[eE][+-]?(\d*)$")
_TAIL_BYTES = 5
"""As many as show an exponent: digit, letter, sign, two digits."""
_IN_NUMBERS = tuple(bytes([byte]) for byte in b"0123456789eE+-")
_TOO_LARGE = re.compile(rb"(^|[\d.])[eE][+-]?\d{3}")


class NumberTokens:
    """What the guard asks of a vocabulary, found out once."""

    def __init__(self, pieces: Sequence[bytes], num_words: int) -> None:
        self.pieces = pieces
        leading = [_LEADING_DIGITS.match(piece) for piece in pieces]
        counts = [0 if found is None else len(found[1]) for found in leading]
        self.with_digits: Sequence[WordArray] = [
            _words((i for i, count in enumerate(counts) if count >= least), num_words)
            for least in range(1, MAX_EXPONENT_DIGITS + 2)
        ]
        """At [n]: tokens that begin with more than n digits, or with a sign and those."""
        too_large = [i for i, piece in enumerate(pieces) if _TOO_LARGE.search(piece)]
        self.too_large = _words(too_large, num_words) if too_large else None
        """Tokens that hold too large an exponent by themselves."""


class NumberGuard:
    """One answer's, over its tokens so far."""

    def __init__(self, tokens: NumberTokens) -> None:
        self._tokens = tokens
        self._is_in_string = False
        self._is_escaped = False
        self._num_digits = 0
        self._tail = b""

    def accept(self, token_id: int) -> None:
        piece = self._tokens.pieces[token_id]
        if b'"' in piece or min(piece, default=0x20) < 0x20 or self._is_in_string:
            self._follow_string(piece)
        if self._is_in_string or not piece.endswith(_IN_NUMBERS):
            self._tail, self._num_digits = b"", 0
            return
        self._tail = (self._tail + piece)[-_TAIL_BYTES:]
        num_digits = len(piece) - len(piece.rstrip(b"0123456789"))
        is_all_digits = num_digits == len(piece)
        self._num_digits = self._num_digits + num_digits if is_all_digits else num_digits

    def _follow_string(self, piece: bytes) -> None:
        for byte in piece:
            if byte < 0x20:  # not so within a string, whatever stood before the document
                self._is_in_string = self._is_escaped = False
            elif self._is_escaped:
                self._is_escaped = False
            elif byte == ord("\\"):
                self._is_escaped = self._is_in_string
            elif byte == ord('"'):
                self._is_in_string = not self._is_in_string

    def without_huge(self, mask_W: WordArray) -> WordArray:
        """The mask less the tokens that make a number too large, where others are left."""
        too_large = self._tokens.too_large
        if self._is_in_string or (too_large is None and not self._tail):
            return mask_W
        rest_W = mask_W if too_large is None else mask_W & ~too_large
        if (found := _IN_EXPONENT.search(self._tail)) is not None:
            num_left = max(0, MAX_EXPONENT_DIGITS - len(found[1]))
            rest_W = rest_W & ~self._tokens.with_digits[num_left]
        elif self._num_digits >= MAX_DIGITS:
            rest_W = rest_W & ~self._tokens.with_digits[0]
        # What a constant of the schema demands has no alternative.
        return rest_W if rest_W.any() else mask_W


def _words(token_ids: Iterable[int], num_words: int) -> WordArray:
    mask_W = np.zeros(num_words, np.uint32)
    for token_id in token_ids:
        mask_W[token_id // WORD_BITS] |= np.uint32(1 << token_id % WORD_BITS)
    return mask_W.view(np.int32)
