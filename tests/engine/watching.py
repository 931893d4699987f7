"""Watched sequences on fake stages: one token per byte, and what they write by the definition."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeserve.core.constraint import BannedStrings
from pipeserve.core.sampling import SamplingParams
from pipeserve.text.banned_text import BannedTextWatch, BannedTextWatches
from tests.fakes import checksum_token, facts, take_by_number
from tests.text.banned_by_hand import answer_by_hand
from tests.text.test_banned_text import PieceTokenizer

VOCAB_SIZE = facts().vocab_size
PIECES = [bytes([value]) for value in range(VOCAB_SIZE)]
WATCHES = BannedTextWatches(lambda: PieceTokenizer(PIECES))  # type: ignore[arg-type, return-value]

BANNED = (
    ("a",),
    ("ab", "Q"),
    tuple("klmnopqrstuvwxyz"),
    ("never",),
    *(tuple(first + second for second in "abcdefghijklm") for first in "XYZ"),
)
"""Fake stages write small letters, until one is banned."""


def watch_for(*strings: str) -> BannedTextWatch:
    return WATCHES.build(BannedStrings(strings=strings), ())


def watched_tokens(
    prompt: Sequence[int], sampling: SamplingParams, banned: Sequence[str]
) -> list[int] | None:
    """What a faultless pipeline generates; None where it finds no way on."""

    def choose(token_ids: Sequence[int], not_these: Collection[int]) -> int:
        token_id = checksum_token([*prompt, *token_ids], sampling)
        if not not_these:
            return token_id
        return take_by_number(token_id, [i for i in range(VOCAB_SIZE) if i not in not_these])

    return answer_by_hand(
        PIECES,
        choose,
        banned=banned,
        ends=sampling.stop_token_ids,
        max_tokens=sampling.max_tokens,
        most_banned=VOCAB_SIZE // 2,
    )
