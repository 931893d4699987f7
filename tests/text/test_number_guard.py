"""Numbers that a model may write are numbers to those who read them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pipeserve.text.grammar import json_grammar
from pipeserve.text.number_guard import MAX_DIGITS, NumberGuard, NumberTokens
from pipeserve.text.tokenizer import Tokenizer
from tests.text.writer import Writer, allowed_ids


@pytest.fixture(scope="module")
def writer(byte_tokenizer: Tokenizer) -> Writer:
    return Writer(byte_tokenizer)


def numbers(document: Any) -> list[float]:
    if isinstance(document, dict | list):
        inner = document.values() if isinstance(document, dict) else document
        return [number for each in inner for number in numbers(each)]
    return [document] if isinstance(document, int | float) else []


@pytest.mark.parametrize("schema", [{"type": "number"}, {"type": "array", "minItems": 4}, {}])
def test_all_numbers_are_finite(writer: Writer, schema: dict[str, Any]) -> None:
    found = []
    for seed in range(150):
        answer = writer.write(json_grammar(schema), seed, most=500)
        if answer is not None:
            found += numbers(json.loads(answer))
    assert len(found) > 30
    assert all(math.isfinite(float(number)) for number in found)


@pytest.mark.parametrize(
    ("text", "can"),
    [
        ("1e99", True),
        ("-2.5E-17", True),
        ("1e100", False),
        ("[1e+100]", False),
        ('"1e100"', True),
        (r'"\"1e100"', True),
        (r'["\\", 1e100]', False),
        ('{"3e1005": 0}', True),
        ("9" * MAX_DIGITS, True),
        ("9" * (MAX_DIGITS + 1), False),
        ("0." + "3" * 30, True),
    ],
)
def test_what_can_be_written(writer: Writer, text: str, can: bool) -> None:
    assert writer.can_write({}, text) is can


def test_a_constant_is_written_whatever_its_size(writer: Writer) -> None:
    for seed in range(5):
        answer = writer.write(json_grammar({"const": 1e200}), seed)
        assert answer is not None
        assert float(answer) == 1e200


def test_tokens_of_several_digits() -> None:
    pieces = [
        b"1",
        b"12",
        b"123",
        b"+12",
        b"+123",
        b"e",
        b"e5",
        b"e123",
        b"1e123",
        b".5",
        b" ",
        b'"',
    ]
    tokens = NumberTokens(pieces, 1)
    everything = tokens.with_digits[0] | ~tokens.with_digits[0]

    def left(*before: bytes) -> set[bytes]:
        guard = NumberGuard(tokens)
        for piece in before:
            guard.accept(pieces.index(piece))
        ids = allowed_ids(guard.without_huge(everything))
        return {pieces[each] for each in ids if each < len(pieces)}

    never = {b"e123", b"1e123"}
    assert left() == {*pieces} - never
    assert left(b"1", b"e") == {*pieces} - never - {b"123", b"+123"}
    assert left(b"1", b"e5") == {*pieces} - never - {b"12", b"123", b"+12", b"+123"}
    assert left(b"1", b"e", b"12") == {b"e", b"e5", b".5", b" ", b'"'}
    assert left(b"1", b"e", b"12", b" ") == {*pieces} - never
    assert left(b'"', b"1", b"e", b"12") == {*pieces}
