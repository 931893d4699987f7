"""Public collections of schemas: what a schema demands is kept to, or refused with the reason.

The official JSON-Schema-Test-Suite is here. PIPESERVE_SCHEMAS names a folder of further files with
a schema and documents each, such as maskbench/data of https://github.com/guidance-ai/jsonschemabench.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
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
MOST_BYTES = 400
"""Of one answer."""
MOST_CHARACTERS, MOST_DOCUMENTS = 3000, 4
"""Of a collection's own, per schema."""


def check(
    writer: Writer, name: str, schema: Any, documents: Iterable[tuple[Any, bool]]
) -> Counter[str]:
    """Answers are valid, by a validator that knows formats as well; documents that the collection
    calls invalid cannot be written."""
    count: Counter[str] = Counter()
    try:
        writer.compiler.check(json_grammar(schema))
    except GrammarError as refusal:
        assert str(refusal)
        return Counter(refused=1)
    count["accepted"] += 1
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for seed in SEEDS:
        try:
            answer = writer.write(json_grammar(schema), seed, most=MOST_BYTES)
        except GrammarError:
            count["ended with an error"] += 1
            continue
        if answer is None:
            count["cut"] += 1
            continue
        count["written"] += 1
        assert validator.is_valid(json.loads(answer)), (name, answer)
    for document, is_valid in documents:
        can = _can_write(writer, schema, document)
        assert is_valid or not can, (name, document)
        count["valid" if is_valid else "invalid"] += 1
        count["writable"] += can
    return count


def _can_write(writer: Writer, schema: Any, document: Any) -> bool:
    try:
        return writer.can_write(schema, json.dumps(document, ensure_ascii=False))
    except GrammarError:  # at its limits
        return False


def told(count: Counter[str]) -> str:
    return (
        f"{count['accepted']} schemas accepted, {count['refused']} refused; {count['written']} "
        f"documents written, all valid, {count['cut']} cut, {count['ended with an error']} ended "
        f"with an error; of {count['invalid']} invalid documents none can be written, of "
        f"{count['valid']} valid ones {count['writable']}"
    )


def test_the_suite(byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(byte_tokenizer)
    count: Counter[str] = Counter()
    for case in SUITE["cases"]:
        documents = [*((each, True) for each in case["valid"])]
        documents += [(each, False) for each in case["invalid"]]
        count += check(writer, case["name"], case["schema"], documents)
    with capsys.disabled():
        print(f"\nJSON-Schema-Test-Suite: {told(count)}")  # noqa: T201
    assert count["accepted"] >= 200
    assert count["written"] >= 1000
    assert count["ended with an error"] == 0
    assert count["writable"] >= 0.9 * count["valid"]


@pytest.mark.timeout(0)
@pytest.mark.skipif("PIPESERVE_SCHEMAS" not in os.environ, reason="PIPESERVE_SCHEMAS names none")
def test_a_collection(byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(byte_tokenizer)
    count: Counter[str] = Counter()
    for path in sorted(Path(os.environ["PIPESERVE_SCHEMAS"]).glob("*.json")):
        case = json.loads(path.read_text())
        documents = [(each["data"], each["valid"]) for each in case["tests"]]
        short = [each for each in documents if len(json.dumps(each[0])) < MOST_CHARACTERS]
        try:
            count += check(writer, path.name, case["schema"], short[:MOST_DOCUMENTS])
        except jsonschema_rs.ValidationError:
            count["schemas that the validator refuses"] += 1
    with capsys.disabled():
        print(f"\n{os.environ['PIPESERVE_SCHEMAS']}: {told(count)}; {count}")  # noqa: T201
    assert count["written"] > 0


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
