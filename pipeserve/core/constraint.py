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


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeRun:
    """Any tokens may come, until one of them makes a difference."""

    watched: frozenset[int]
    """The first of these ends the run: what may follow it has to be found out."""
    max_tokens: int | None = None
    """So many end it as well; at least 1, None: any number."""


class TokenConstraint(Protocol):
    """One answer's way through a grammar. Used by one thread at a time, but not always the same."""

    def allowed(self) -> WordArray | FreeRun:
        """The tokens that may come next, as [W] words: bit i % 32 of word i // 32 is token i.

        At least one is allowed. Or a run of tokens of which each may be any.

        Raises:
            GrammarError: nothing may follow, or finding out takes more than the limits allow.
        """
        ...

    def accept(self, token_id: int) -> None:
        """This token came; those of a free run are told once it has ended.

        Raises:
            GrammarError: it was not allowed, or reading it takes more than the limits allow.
        """
        ...


ConstraintFactory = Callable[[Grammar], TokenConstraint]
"""Raises GrammarError where the grammar does not compile."""


def num_words(vocab_size: int) -> int:
    """W: words of a mask over the vocabulary."""
    return -(-vocab_size // WORD_BITS)
