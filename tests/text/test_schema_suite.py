"""The official JSON-Schema-Test-Suite: what a schema of it demands is kept to, or refused with the
reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from pipeserve.errors import GrammarError
from pipeserve.text.grammar import json_grammar
from pipeserve.text.tokenizer import Tokenizer
from tests.text.writer import Writer

SUITE = json.loads(Path(__file__).with_name("json_schema_test_suite.json").read_text())
SEEDS = range(5)
MOST_BYTES = 200


def check_case(writer: Writer, case: dict[str, Any], count: Counter[str]) -> None:
    """Answers are valid, by a validator that knows formats as well; what the suite calls invalid
    cannot be written."""
    schema = case["schema"]
    try:
        writer.compiler.check(json_grammar(schema))
    except GrammarError as refusal:
        assert str(refusal)
        count["refused"] += 1
        return
    count["accepted"] += 1
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    for seed in SEEDS:
        answer = writer.write(json_grammar(schema), seed, most=MOST_BYTES)
        if answer is None:
            count["cut"] += 1
            continue
        count["documents"] += 1
        assert validator.is_valid(json.loads(answer)), (case["name"], answer)
    for document in case["invalid"]:
        text = json.dumps(document, ensure_ascii=False)
        assert not writer.can_write(schema, text), (case["name"], text)
        count["invalid"] += 1
    for document in case["valid"]:
        can = writer.can_write(schema, json.dumps(document, ensure_ascii=False))
        count["valid"] += 1
        count["writable"] += can


def test_the_suite(byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(byte_tokenizer)
    count: Counter[str] = Counter()
    for case in SUITE["cases"]:
        check_case(writer, case, count)
    with capsys.disabled():
        print(  # noqa: T201
            f"\nJSON-Schema-Test-Suite: {count['accepted']} schemas accepted, {count['refused']} "
            f"refused; {count['documents']} documents written, all valid, {count['cut']} cut; of "
            f"{count['invalid']} invalid documents none can be written, of {count['valid']} valid "
            f"ones {count['writable']}"
        )
    assert count["accepted"] >= 200
    assert count["documents"] >= 1000
    assert count["writable"] >= 0.9 * count["valid"]


def test_a_selection_of_the_suite_with_a_real_vocabulary(demo_tokenizer: Tokenizer) -> None:
    """Whose tokens are longer than one byte, and lack some bytes."""
    writer = Writer(demo_tokenizer)
    num_documents = 0
    for case in SUITE["cases"][::6]:
        schema = case["schema"]
        try:
            writer.compiler.check(json_grammar(schema))
            answer = writer.write(json_grammar(schema), 1, most=60)
        except GrammarError:
            continue
        if answer is not None:
            validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
            assert validator.is_valid(json.loads(answer)), (case["name"], answer)
            num_documents += 1
    assert num_documents >= 20
