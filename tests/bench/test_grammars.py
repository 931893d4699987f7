"""The command measures every form, and a cut vocabulary is smaller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeserve.bench import grammars
from tests.text.small_vocabularies import write_byte_vocabulary


@pytest.mark.parametrize(("vocab_size", "expected"), [(None, 301), (270, 270)])
def test_every_form_is_measured(
    vocab_size: int | None, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = [f"<|{index}|>" for index in range(43)]
    path = write_byte_vocabulary(
        tmp_path / "bytes.gguf", control=["<|end|>", *control], ids={"eos_token_id": 257}
    )
    grammars.run(path, vocab_size=vocab_size, num_answers=1, wants_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["vocab_size"] == expected
    assert {line["form"] for line in report["forms"]} == set(grammars.FORMS)
    assert all(line["num_tokens"] > 0 for line in report["forms"])
    grammars.run(path, vocab_size=vocab_size, num_answers=1, wants_json=False)
    assert "json schema" in capsys.readouterr().out
