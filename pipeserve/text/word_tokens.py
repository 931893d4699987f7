"""WordTokens: which tokens of a vocabulary matter to the words around thoughts and calls.

May be used from any thread. Knows no grammar and no format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from pipeserve.core.constraint import WordArray, num_words
from pipeserve.errors import GrammarError


class WordTokens:
    """Found by looking at every token, once for each word."""

    def __init__(
        self, pieces: Sequence[bytes], spell: Callable[[str], Sequence[int]], *, vocab_size: int
    ) -> None:
        """pieces: of all tokens, control tokens by their names. spell: a text's tokens.
        vocab_size: of the model's logits."""
        self._pieces = pieces
        self._spell = spell
        self._num_words = num_words(vocab_size)
        self._watched: dict[str, frozenset[int]] = {}
        self._going_beyond: dict[bytes, frozenset[int]] = {}

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def watched(self, word: str) -> frozenset[int]:
        """Tokens of which one comes whenever the word is written, however it is cut.

        Those that can hold its second byte: much rarer than those that can hold its first, which is
        a bracket.
        """
        if word not in self._watched:
            raw = word.encode()
            self._watched[word] = frozenset(
                token_id
                for token_id, piece in enumerate(self._pieces)
                if _agree(piece, raw[1:]) or (raw[:2] in piece and _holds_two(piece, raw))
            )
        return self._watched[word]

    def going_beyond(self, rest: bytes) -> frozenset[int]:
        """Tokens that begin with the rest of a word and go on with something else."""
        if rest not in self._going_beyond:
            self._going_beyond[rest] = frozenset(
                token_id
                for token_id, piece in enumerate(self._pieces)
                if len(piece) > len(rest) and piece.startswith(rest)
            )
        return self._going_beyond[rest]

    def whole(self, word: str) -> int | None:
        """The token that is this word."""
        raw = word.encode()
        return next((i for i in sorted(self.watched(word)) if self._pieces[i] == raw), None)

    def next_of(self, word: str, num_written: int) -> int:
        """A token that brings the word to its end, or nearer to it.

        num_written: bytes of it that are there already.

        Raises:
            GrammarError: there is none.
        """
        token_id = self.whole(word)
        if token_id is not None:
            return token_id
        ids = self._spell(word.encode()[num_written:].decode())
        if not ids:
            raise GrammarError(f"no token of this model can go on with {word!r}")
        return ids[0]

    def mask(self, ids: Collection[int]) -> WordArray:
        """Of these tokens."""
        bits = np.zeros(32 * self._num_words, np.bool_)
        bits[list(ids)] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def mask_without(self, ids: Collection[int]) -> WordArray:
        """Of all tokens but these."""
        bits = np.zeros(32 * self._num_words, np.bool_)
        bits[: len(self._pieces)] = True
        bits[list(ids)] = False
        return np.packbits(bits, bitorder="little").view(np.int32)


def num_begun(text: bytes, word: bytes) -> int:
    """Bytes of the longest end of the text that the word begins with, short of all of it."""
    most = min(len(text), len(word) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(word[:n])), 0)


def _agree(piece: bytes, rest: bytes) -> bool:
    return bool(piece) and (rest.startswith(piece) or piece.startswith(rest))


def _holds_two(piece: bytes, raw: bytes) -> bool:
    """Whether the word may begin somewhere in the piece, with two bytes at least."""
    starts = (at for at in range(len(piece) - 1) if piece.startswith(raw[:2], at))
    return any(_agree(piece[at:], raw) for at in starts)
