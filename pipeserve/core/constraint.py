"""TokenConstraint: which token may come next, and Grammar: what it is built from; TextWatch: what
must not be written, and BannedStrings.

Values and protocols; text gives them their meaning, the engine advances them off its own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

WordArray = npt.NDArray[np.int32]

WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Where in an answer calls of tools are told from other text, which may be anything."""

    beginnings: tuple[str, ...]
    """What they begin with, whitespace left out."""
    is_anywhere: bool
    """Whether they may follow other text; else they are the whole answer."""
    text_follows: bool
    """Whether other text may follow them; else nothing but calls does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """What a model may write before its answer, between these words."""

    opening: str
    closing: str
    is_open: bool
    """Whether the prompt ends with the opening."""
    in_grammar: bool
    """Whether the answer's definition is of the thoughts as well."""
    max_tokens: int | None
    """So many, then the closing comes; it and the opening are not counted. None: any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must match: plain values, since what is compiled stays in its process."""

    definition: str
    """As pipeserve.text.grammar writes it, where it was found to compile; empty: anything."""
    calls: Calls | None = None
    """The definition is of the calls alone; None: of the whole answer."""
    thoughts: Thoughts | None = None
    """What may come before it; None: nothing that is told apart."""

    @property
    def is_of_whole_answer(self) -> bool:
        """Whether it says where every answer ends."""
        return bool(self.definition) and self.calls is None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class BannedStrings:
    """What an answer must not hold: compared without regard to case, in all that the model writes
    before a stop string, thoughts included."""

    strings: tuple[str, ...]
    stop: tuple[str, ...] = ()
    """The answer's stop strings: what they cut off is not looked at."""
    shown_token_ids: tuple[int, ...] = ()
    """Control tokens whose names are part of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What a watch says of the newest tokens."""

    num_held: int = 0
    """So many of the tokens that are left, the last ones, may turn out to write a banned string."""
    num_withdrawn: int = 0
    """So many, the newest included, do: they are to be taken back."""


class TextWatch(Protocol):
    """Follows one answer's text; belongs to the thread that pushes."""

    def push(self, token_id: int) -> Sighting:
        """The next token. Those that it withdraws are as if they had never been pushed."""
        ...


WatchFactory = Callable[[BannedStrings, Sequence[int]], TextWatch]
"""For a sequence with that prompt."""


def num_words(vocab_size: int) -> int:
    """W: words of a mask over the vocabulary."""
    return -(-vocab_size // WORD_BITS)
