"""TokenConstraint: which token may come next, and Grammar: what it is built from.

Values and protocols; text gives them their meaning, the engine advances them off its own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

WordArray = npt.NDArray[np.int32]

WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What a whole answer must match: plain text, since a compiled one stays in its process."""

    definition: str
    """As pipeserve.text.grammar writes it, where it was found to compile."""


class TokenConstraint(Protocol):
    """One answer's way through a grammar. Used by one thread at a time, but not always the same."""

    def allowed(self) -> WordArray:
        """The tokens that may come next, as [W] words: bit i % 32 of word i // 32 is token i.

        At least one is allowed.

        Raises:
            GrammarError: nothing may follow, or finding out takes more than the limits allow.
        """
        ...

    def accept(self, token_id: int) -> None:
        """This token came.

        Raises:
            GrammarError: it was not allowed, or reading it takes more than the limits allow.
        """
        ...


ConstraintFactory = Callable[[Grammar], TokenConstraint]
"""Raises GrammarError where the grammar does not compile."""


def num_words(vocab_size: int) -> int:
    """W: words of a mask over the vocabulary."""
    return -(-vocab_size // WORD_BITS)
