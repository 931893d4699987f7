"""Sequence breakers of DRY against llama.cpp's definition, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeserve.core.sampler_chain import Dry
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.sequence_breakers import breaker_groups
from pipeserve.text.tokenizer import Tokenizer


def by_hand(tokenizer: Tokenizer, strings: list[str]) -> dict[tuple[int, ...], set[int]]:
    found: dict[tuple[int, ...], set[int]] = {}
    for token_id, piece in enumerate(tokenizer.pieces(skip_special=False)):
        for string in strings:
            if string.encode() in piece:
                found.setdefault((), set()).add(token_id)
                continue
            for place in range(1, len(string)):
                if piece.endswith(string[:place].encode()):
                    rest = tokenizer.encode(string[place:], add_special_tokens=False)
                    found.setdefault(tuple(rest), set()).add(token_id)
    return found


def grouped(tokenizer: Tokenizer, strings: list[str]) -> dict[tuple[int, ...], set[int]]:
    return {
        group.tail: set(group.head_ids.tolist())
        for group in breaker_groups(tokenizer, tuple(strings))
    }


def test_of_bytes(byte_tokenizer: Tokenizer) -> None:
    assert grouped(byte_tokenizer, [":", "ab", "é"]) == {
        (): {ord(":")},
        (ord("b"),): {ord("a")},
    }


def test_a_control_token_counts_by_its_name(byte_tokenizer: Tokenizer) -> None:
    assert grouped(byte_tokenizer, ["end"])[()] == {257}


@pytest.mark.parametrize(
    "strings",
    [
        ["\n", ":", '"', "*"],
        ["\n\n", "###"],
        [" the", "The end"],
        ["\n", ":", '"', "*", "<|system|>", "<|model|>", "<|user|>"],  # of a well-known client
    ],
)
def test_of_a_real_vocabulary(demo_model_path: Path, strings: list[str]) -> None:
    with GGUFFile.open(demo_model_path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    found = grouped(tokenizer, strings)
    Dry(multiplier=1.0, breakers=breaker_groups(tokenizer, tuple(strings)))  # within its limits
    assert len(found[()]) > 3
    assert found == by_hand(tokenizer, strings)
