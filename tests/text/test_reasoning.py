"""Thoughts told from answers, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeserve.text.reasoning import KNOWN_TAGS, ReasoningSplitter, find_tags

THINK = KNOWN_TAGS[0]


def split(*parts: str, is_open: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(THINK, is_open=is_open)
    pairs = [splitter.push(part) for part in parts] + [splitter.finish()]
    return "".join(pair[0] for pair in pairs), "".join(pair[1] for pair in pairs)


@pytest.mark.parametrize(
    ("answer", "is_open", "expected"),
    [
        ("<think>\nwell\n</think>\n\nYes", False, ("well", "Yes")),
        ("\n<think>a b\n\nc</think>d", False, ("a b\n\nc", "d")),
        ("well\n</think>\n\nYes ", True, ("well", "Yes ")),
        ("<think></think>Yes", False, ("", "Yes")),
        ("<think>cut o", False, ("cut o", "")),
        ("<think>half </thi", False, ("half </thi", "")),
        ("no thoughts", False, ("", "no thoughts")),
        (" <th", False, ("", " <th")),
        ("say <think>not</think>", False, ("", "say <think>not</think>")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("", False, ("", "")),
    ],
)
def test_whole_and_letter_by_letter(answer: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert split(answer, is_open=is_open) == expected
    assert split(*answer, is_open=is_open) == expected


@given(
    st.lists(st.sampled_from(["<think>", "</think>", " ", "\n", "a", "<", "/th"]), max_size=12),
    st.booleans(),
)
def test_cuts_change_nothing(parts: list[str], is_open: bool) -> None:
    whole = "".join(parts)
    assert split(*whole, is_open=is_open) == split(whole, is_open=is_open)


def test_tags_are_found_in_the_template() -> None:
    assert find_tags("{{ content.split('</think>') }}") is THINK
    assert find_tags("[THINK]{{ x }}[/THINK]") is KNOWN_TAGS[1]
    assert find_tags("{{ messages }}") is None
