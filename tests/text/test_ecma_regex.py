"""Patterns of schemas mean what ECMA-262 says, also where the compiler's notation says another
thing."""

from __future__ import annotations

import json
import re
import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from pipeserve.errors import GrammarError
from pipeserve.text.ecma_regex import rust_regex
from pipeserve.text.grammar import json_grammar
from pipeserve.text.tokenizer import Tokenizer
from tests.text.writer import Writer


@pytest.fixture(scope="module")
def writer(byte_tokenizer: Tokenizer) -> Writer:
    return Writer(byte_tokenizer)


def fits(writer: Writer, pattern: str, text: str) -> bool:
    document = json.dumps(text, ensure_ascii=False)
    return writer.can_write({"type": "string", "pattern": pattern}, document)


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"^\s$", " \n\u00a0\u2003\ufeff", "a\u0085"),
        (r"^\S$", "a\u0085", " \n\u00a0\u2003\ufeff"),
        (r"^[\s]$", "\ufeff", "\u0085"),
        (r"^[^\s]$", "\u0085", "\ufeff"),
        (r"^\d$", "07", "a৪"),
        (r"^\D$", "a৪", "0"),
        (r"^\w$", "aZ0_", "é-"),
        (r"^[\W]$", "é-", "a_"),
        (r"^.$", "a\té", "\n\r\u2028\u2029"),
        ("^[.]$", ".", "a"),
        ("^[a&&b]$", "a&b", "c"),
        ("^[a~~b]$", "a~b", "c"),
        ("^[[a]$", "[a", "]b"),
        ("^[+--]$", "+,-", "*."),
        (r"^[\w-.]$", "a-.", ","),
        (r"^[.-\w]$", ".-a", "/"),
        ("^[a-]$", "a-", "b"),
        (r"^[\b]$", "\b", "b"),
        (r"^[\]\\]$", "]\\", "["),
        (r"^\<$", "<", "a"),
        (r"^\/$", "/", "\\"),
        (r"^\u0041$", "A", "B"),
        (r"^\x41$", "A", "B"),
        (r"^\u{41}$", "A", "B"),
        (r"^\cJ$", "\n", "J"),
        (r"^\0$", "\0", "0"),
        (r"^\t$", "\t", "t"),
        (r"^\p{Lu}$", "AÄ", "aä"),
        (r"^\\$", "\\", "d"),
        ("^#$", "#", "a"),
        ("^{$", "{", "}"),
        ("^]$", "]", "["),
    ],
)
def test_single_characters(writer: Writer, pattern: str, right: str, wrong: str) -> None:
    assert [fits(writer, pattern, each) for each in right] == [True] * len(right)
    assert [fits(writer, pattern, each) for each in wrong] == [False] * len(wrong)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"\Aa\z", "escape"),
        (r"a\Z", "escape"),
        (r"\e", "escape"),
        ("a\\", "escape"),
        ("(?x)a b", "group"),
        ("[]a]", "empty class"),
        (r"\ud83d", "0xd83d"),
        ("[a", "unclosed"),
        ("a(?=b)", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"\bfoo\b", "lookarounds"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(writer: Writer, pattern: str, reason: str) -> None:
    for schema in ({"pattern": pattern}, {"patternProperties": {pattern: {"type": "null"}}}):
        with pytest.raises(GrammarError, match=reason):
            writer.compiler.check(json_grammar({"allOf": [{"items": schema}]}))


def test_documents_within_a_schema_are_no_patterns(writer: Writer) -> None:
    schema = {
        "properties": {"pattern": {"const": {"pattern": r"\Z"}}, "enum": {"pattern": r"^\s$"}},
        "required": ["pattern", "enum"],
        "additionalProperties": False,
    }
    assert writer.can_write(schema, r'{"pattern": {"pattern": "\\Z"}, "enum": " "}')
    assert not writer.can_write(schema, '{"pattern": {"pattern": "\\\\Z"}, "enum": "\u0085"}')


def test_two_names_of_one_pattern(writer: Writer) -> None:
    schema = {"patternProperties": {r"^\d$": {"minimum": 3}, "^[0-9]$": {"maximum": 5}}}
    assert writer.can_write(schema, '{"1": 4}')
    assert not writer.can_write(schema, '{"1": 2}')
    assert not writer.can_write(schema, '{"1": 6}')


PIECES = (
    r"a b c - ^ & ~ [ ] [^ . \d \w \s \D \W \S * + ? {2} {1,} ( (?: ) | , 0 a-c \- \] \[ \\".split()
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pattern=st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join),
    texts=st.lists(st.text("abc-^&~[]0,. \\", max_size=4), min_size=4, max_size=8),
)
def test_as_python_reads_them(writer: Writer, pattern: str, texts: list[str]) -> None:
    """Python's notation is the same for ASCII, where it takes a pattern without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            expected = re.compile(pattern, re.ASCII)
        except (re.error, Warning):
            return
    if re.search(r"[*+?}]\+|(^|[^\\])\[\^?\]|[({|]\^|\^[*+?{]", pattern):
        return  # possessive, or a class that begins with its own end: ECMA-262 knows neither
    try:
        rust_regex(pattern)
        writer.compiler.check(json_grammar({"pattern": pattern}))
    except GrammarError:
        return
    for text in texts:
        assert fits(writer, f"^(?:{pattern})$", text) == bool(expected.fullmatch(text)), text
