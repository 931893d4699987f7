"""Answers without banned strings by their definition: the whole text is looked at every time."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence

Choose = Callable[[Sequence[int], Collection[int]], int]
"""The next token after these, which is none of those."""


def decoded(pieces: Sequence[bytes], token_ids: Sequence[int]) -> tuple[str, bool]:
    """The text so far, and whether it ends within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = "".join(decoder.decode(pieces[token_id]) for token_id in token_ids)
    return text, bool(decoder.getstate()[0])


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """As a client sees it: up to the stop string that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def first_banned(text: str, banned: Sequence[str]) -> int | None:
    """Where the banned string begins that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [each for each in banned if text[:end].lower().endswith(each.lower())]
        if complete:
            return end - max(map(len, complete))
    return None


def may_begin(text: str, banned: Sequence[str]) -> int:
    """Where the longest end of the text begins that is a beginning of a banned string."""
    beginnings = {each.lower()[:length] for each in banned for length in range(1, len(each))}
    return next(at for at in range(len(text) + 1) if text[at:].lower() in {*beginnings, ""})


def tokens_before(pieces: Sequence[bytes], token_ids: Sequence[int], position: int) -> int:
    """The most tokens that end before the first byte of the character there."""
    for count in range(len(token_ids), -1, -1):
        text, is_within = decoded(pieces, token_ids[:count])
        if len(text) < position or (len(text) == position and not is_within):
            return count
    raise AssertionError("nothing ends before the text")


def answer_by_hand(
    pieces: Sequence[bytes],
    choose: Choose,
    *,
    banned: Sequence[str],
    stop: Sequence[str] = (),
    ends: Collection[int] = (),
    max_tokens: int,
    most_banned: int = 10_000,
) -> list[int] | None:
    """The tokens of a whole answer, the end token included; None where too many are banned in one
    place. A stop string ends it with the token that completes one. A token is told, and stays, once
    no banned string may begin with it."""
    token_ids: list[int] = []
    num_told = 0
    banned_at: dict[int, set[int]] = {}
    while len(token_ids) < max_tokens:
        token_ids.append(choose(token_ids, banned_at.get(len(token_ids), set())))
        if token_ids[-1] in ends:
            break
        text, is_stopped = cut_at_stop(decoded(pieces, token_ids)[0], stop)
        position = first_banned(text, banned)
        if position is None:
            if is_stopped:
                break
            beginning = may_begin(text, banned)
            num_told = max(num_told, tokens_before(pieces, token_ids, beginning))
            continue
        at = max(num_told, tokens_before(pieces, token_ids, position))
        banned_at = {place: ids for place, ids in banned_at.items() if place <= at}
        banned_at.setdefault(at, set()).add(token_ids[at])
        if len(banned_at[at]) > most_banned:
            return None
        del token_ids[at:]
    return token_ids
