"""Banned strings: what the watch withdraws, and what is never told, against the definition."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeserve.core.constraint import BannedStrings
from pipeserve.engine.watched_output import (
    MOST_BANNED_AT_ONCE,
    MOST_IN_VAIN,
    OutputToken,
    WatchedOutput,
)
from pipeserve.text.banned_text import BannedTextWatch, BannedTextWatches, Phrases, fold
from tests.text.banned_by_hand import answer_by_hand, cut_at_stop, decoded, first_banned

E_ACUTE = "é".encode()
PIECES = (
    *(b"a", b"b", b"c", b"A", b"ab", b"Bc", b"ca ", b" ", b"abcab", b""),
    *(E_ACUTE, E_ACUTE[:1], E_ACUTE[1:], b"a" + E_ACUTE[:1], E_ACUTE[1:] + b"b", b"\xc3\x89"),
)
MANY = 64
"""Further tokens, each a digit or two, so that something is always left."""
VOCABULARY = [*PIECES, *(str(number).encode() for number in range(MANY))]


class PieceTokenizer:
    """Tokens that are these bytes: what a Detokenizer asks of a tokenizer."""

    strips_leading_space = False

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = list(pieces)

    def pieces(self, *, skip_special: bool) -> list[bytes]:
        return self._pieces

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return self._pieces[token_id]

    def is_special(self, token_id: int) -> bool:
        return False


def watch_for(
    banned: Sequence[str], stop: Sequence[str] = (), pieces: Sequence[bytes] = VOCABULARY
) -> BannedTextWatch:
    watches = BannedTextWatches(lambda: PieceTokenizer(pieces))  # type: ignore[arg-type, return-value]
    return watches.build(BannedStrings(strings=tuple(banned), stop=tuple(stop)), ())


def chooser(seed: int, num_usual: int) -> object:
    """Mostly one of the pieces; by all tokens before, as a model chooses."""

    def choose(token_ids: Sequence[int], banned: Collection[int]) -> int:
        number = zlib.crc32(bytes(token_ids), seed)
        usual = [each for each in range(num_usual) if each not in banned]
        allowed = usual or [each for each in range(len(VOCABULARY)) if each not in banned]
        return allowed[number % len(allowed)]

    return choose


def allowed_ids(mask_W: np.ndarray | None) -> set[int]:
    if mask_W is None:
        return set(range(len(VOCABULARY)))
    bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")[: len(VOCABULARY)]
    return set(np.flatnonzero(bits).tolist())


STRINGS = st.text(st.sampled_from("abcé "), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(
    banned=st.lists(STRINGS, min_size=1, max_size=6),
    stop=st.lists(STRINGS, max_size=2),
    seed=st.integers(0, 2**32 - 1),
    num_usual=st.integers(2, len(PIECES)),
    max_tokens=st.integers(1, 30),
)
@example(banned=["abc", "ca"], stop=[], seed=1, num_usual=4, max_tokens=30)
@example(banned=["  "], stop=[" "], seed=0, num_usual=len(PIECES), max_tokens=30)
def test_answers_are_those_of_the_definition(
    banned: list[str], stop: list[str], seed: int, num_usual: int, max_tokens: int
) -> None:
    choose = chooser(seed, num_usual)
    expected = answer_by_hand(VOCABULARY, choose, banned=banned, stop=stop, max_tokens=max_tokens)  # type: ignore[arg-type]
    watched = WatchedOutput(watch_for(banned, stop), vocab_size=len(VOCABULARY))
    known: list[int] = []
    told: list[int] = []
    while len(known) < max_tokens:
        allowed = allowed_ids(watched.mask_at(len(known)))
        banned_here = set(range(len(VOCABULARY))) - allowed
        known.append(choose(known, banned_here))  # type: ignore[operator]
        newest = OutputToken(token_id=known[-1], logprobs=None)
        num_withdrawn = watched.take(newest, is_text=True)
        del known[len(known) - num_withdrawn :]
        told += [token.token_id for token in watched.tell(is_last=False)]
        assert told == known[: len(told)], "what was told is not withdrawn"
        text, is_stopped = cut_at_stop(decoded(VOCABULARY, told)[0], stop)
        assert first_banned(text, banned) is None
        if is_stopped:  # the front half ends it
            break
    if len(known) == max_tokens:
        told += [token.token_id for token in watched.tell(is_last=True)]
    assert told == expected


@pytest.mark.parametrize(
    ("text", "num_held"),
    [("x", 0), ("xa", 1), ("xab", 2), ("xabb", 0), ("xabA", 3), ("xabAc", 0), ("aab", 2)],
)
def test_only_what_may_begin_one_is_kept_back(text: str, num_held: int) -> None:
    pieces = [bytes([each]) for each in range(256)]
    watch = watch_for(["abab"], pieces=pieces)
    assert [watch.push(each) for each in text.encode()][-1].num_held == num_held


def test_the_first_token_of_the_string_is_banned_in_its_place() -> None:
    pieces = [b"so ", b"a tap", b"est", b"ry", b"x"]
    output = WatchedOutput(watch_for(["Tapestry"], pieces=pieces), vocab_size=2000)
    taken = [
        output.take(OutputToken(token_id=each, logprobs=None), is_text=True)
        for each in (0, 1, 2, 3)
    ]
    assert taken == [0, 0, 0, 3]
    assert [token.token_id for token in output.tell(is_last=False)] == [0]
    (banned,) = set(range(2000)) - {
        each
        for each in range(2000)
        if (mask := output.mask_at(1)) is not None and mask[each // 32] >> (each % 32) & 1
    }
    assert banned == 1
    assert output.mask_at(0) is output.mask_at(2) is None


def test_many_ways_that_are_none() -> None:
    pieces = [str(number).encode() for number in range(10_000)]
    output = WatchedOutput(watch_for(list("0123456789"), pieces=pieces), vocab_size=10_000)
    for token_id in range(MOST_BANNED_AT_ONCE + 1):
        assert not output.is_stuck
        assert output.take(OutputToken(token_id=token_id, logprobs=None), is_text=True) == 1
    assert output.is_stuck


def test_many_ways_that_branch_and_are_none() -> None:
    """After each first token each second one is tried, and only then the first is withdrawn."""
    count, dot, bang = 90, 180, 181
    pieces = [*(f"{letter}{n}".encode() for letter in "ab" for n in range(count)), b".", b"!"]
    wrong_second = [f"b{second}." for second in range(count)]
    wrong_first = [f"a{first}b{second}!" for first in range(count) for second in range(count)]
    watch = watch_for([*wrong_second, *wrong_first], pieces=pieces)
    output = WatchedOutput(watch, vocab_size=2000)

    def take(*token_ids: int) -> list[int]:
        tokens = [OutputToken(token_id=each, logprobs=None) for each in token_ids]
        return [output.take(token, is_text=True) for token in tokens]

    num_withdrawals = 0
    for first in range(count):
        assert take(first) == [0]
        for second in range(count - 1):
            assert take(count + second, dot) == [0, 2]
            assert output.tell(is_last=False) == []
            num_withdrawals += 1
            assert output.is_stuck == (num_withdrawals > MOST_IN_VAIN)
            if output.is_stuck:
                return
        assert take(2 * count - 1, bang) == [0, 3]
        num_withdrawals += 1
    raise AssertionError("it goes on for ever")


def test_a_character_that_the_prompt_leaves_half() -> None:
    pieces = [E_ACUTE[:1], E_ACUTE[1:], b"a"]
    watches = BannedTextWatches(lambda: PieceTokenizer(pieces))  # type: ignore[arg-type, return-value]
    watch = watches.build(BannedStrings(strings=("é",)), (0,))
    assert watch.push(1).num_withdrawn == 1
    assert watch.push(2).num_withdrawn == 0


@given(st.text())
def test_folding_keeps_every_place(text: str) -> None:
    assert len(fold(text)) == len(text)
    assert fold(text) == "".join(map(fold, text))


def test_case_is_folded_letter_by_letter() -> None:
    assert fold("ÉΣς") == fold("éσσ")
    assert fold("İẞß") != fold("i̇ss")


def test_phrases_within_phrases() -> None:
    phrases = Phrases(["abcd", "BC"])
    end, lengths = "", []
    for letter in "abcabx":
        end, length = phrases.step(end, letter)
        lengths.append(length)
    assert lengths == [0, 0, 2, 0, 0, 0]
    assert end == ""
