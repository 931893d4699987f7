"""Long texts have the same tokens in parts as at once, in every kind of vocabulary."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pipeserve.errors import InvalidParameterError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text import long_texts
from pipeserve.text.long_texts import MAX_PART_LENGTH, PART_LENGTH, TextCutter, byte_level_cutter
from pipeserve.text.pretokenizers import PRE_TOKENIZERS
from pipeserve.text.tokenizer import Tokenizer
from tests.text.small_vocabularies import write_byte_vocabulary, write_trained_spm
from tests.text.strategies import TEXTS

WORDS = st.sampled_from(
    [
        "a",
        "Bc",
        "'s",
        "naïve",
        "и",
        "字符",
        "かな",
        "한글",
        "12",
        "x1",
        "e\u0301",
        "‘",
        "ß",
        "ﬀ",
        "…",
    ]
)
MARKS = st.sampled_from(
    [*" \n,.!?，。、", "  ", "\n\n", " \n", "\t", ". ", "'", "/", "▁", "\u00a0"]
)
DENSE = st.lists(st.tuples(WORDS, MARKS), max_size=12).map(
    lambda pairs: "".join(itertools.chain.from_iterable(pairs))
)
"""Texts with many places that look like cuts."""
MIXED = st.lists(st.one_of(DENSE, TEXTS), max_size=3).map("".join)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every cut is taken."""
    monkeypatch.setattr(long_texts, "PART_LENGTH", 1)


def test_no_pattern_looks_back() -> None:
    for kind in PRE_TOKENIZERS.values():
        for pattern in kind.patterns:
            assert not re.search(r"\(\?<[=!]|\\[bBAG]|(^|[|(])\^", pattern), pattern


PATTERNS = sorted({kind.patterns for kind in PRE_TOKENIZERS.values()})


@functools.cache
def cutting_steps(patterns: tuple[str, ...]) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    )


@pytest.mark.parametrize("patterns", PATTERNS)
@settings(deadline=None, max_examples=100)
@given(text=MIXED)
def test_every_pre_tokenizer_cuts_parts_as_the_whole(patterns: tuple[str, ...], text: str) -> None:
    steps = cutting_steps(patterns)

    def pieces(part: str) -> list[str]:
        return [piece for piece, _ in steps.pre_tokenize_str(part)]

    parts = list(byte_level_cutter(()).parts(text))
    assert "".join(parts) == text
    assert [piece for part in parts for piece in pieces(part)] == pieces(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The quick brown fox", 4),
        ("Ja, und? Nein!\nWas.so", 2),
        ("\u4e2d\u6587\uff0c\u53e5\u5b50\u3002\u4e8c", 3),
        ("Это тест", 2),
        ("한글 문장", 2),
        ("a  b\n\nc 1 d", 1),
    ],
)
def test_where_texts_are_cut(text: str, count: int) -> None:
    assert len(list(byte_level_cutter(()).parts(text))) == count


def load(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="module", params=["llama", "gemma", "bytes"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    if request.param == "bytes":
        added = ("<|end|>", "a b", "c, d")
        return load(write_byte_vocabulary(path, merges=["a b", "Ġ a"], control=added))
    return load(write_trained_spm(path, add_space_prefix=request.param == "llama"))


@settings(deadline=None, max_examples=150)
@given(text=MIXED)
def test_parts_have_the_tokens_of_the_whole(text: str, tokenizer: Tokenizer) -> None:
    text += "a b c, d e."
    for parse_special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
        assert ids == whole(tokenizer, text, parse_special=parse_special)


def whole(tokenizer: Tokenizer, text: str, *, parse_special: bool) -> list[int]:
    backend = tokenizer._backend if parse_special else tokenizer._plain_backend
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def test_tokens_that_span_a_cut_are_not_cut() -> None:
    assert list(byte_level_cutter(["a b"]).parts("x a b a c")) == ["x", " a b", " a c"]
    assert list(TextCutter((), cuts_at="", drops_space=False).parts("a b c")) == ["a b c"]
    assert list(TextCutter((), drops_space=True).parts("a b c")) == ["a", "b", "c"]


def test_parts_are_long_and_end_at_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PART_LENGTH", PART_LENGTH)
    text = "some words, " * 100_000
    parts = list(byte_level_cutter(()).parts(text))
    assert "".join(parts) == text
    assert {len(part) // PART_LENGTH for part in parts[:-1]} == {1}


def test_a_text_that_cannot_be_cut_is_taken_up_to_a_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_texts, "PART_LENGTH", PART_LENGTH)
    longest = "a" * MAX_PART_LENGTH
    assert list(byte_level_cutter(()).parts(longest)) == [longest]
    with pytest.raises(InvalidParameterError, match="more than 1048576 characters"):
        list(byte_level_cutter(()).parts(longest + "a"))
