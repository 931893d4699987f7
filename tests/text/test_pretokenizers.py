"""The cuts of each pre-tokenizer: by transformers' patterns where it has them, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pipeserve.text.pretokenizers import PRE_TOKENIZERS
from tests.text.corpus import CORPUS
from tests.text.strategies import TEXTS


def cut(text: str, *patterns: str) -> list[str]:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


SHARED = sorted(PRE_TOKENIZERS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys())


def test_the_common_names_are_shared() -> None:
    assert {"llama-bpe", "llama3", "qwen2", "tekken", "gpt-4o", "dbrx"} <= set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_corpus_is_cut_as_by_transformers(name: str) -> None:
    for text in CORPUS.values():
        theirs = cut(text, GGUF_PRE_TOKENIZER_SPLITS[name])
        assert cut(text, *PRE_TOKENIZERS[name].patterns) == theirs


@settings(deadline=None)
@given(text=TEXTS)
@pytest.mark.parametrize("name", ["gpt-2", "olmo"])
def test_gpt2_is_cut_as_by_the_tokenizers_library(name: str, text: str) -> None:
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ours = pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(Regex(pattern), "isolated")
                for pattern in PRE_TOKENIZERS[name].patterns
            ),
            to_letters,
        ]
    )
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_kind_keeps_the_whole_text(name: str) -> None:
    for text in CORPUS.values():
        assert "".join(cut(text, *PRE_TOKENIZERS[name].patterns)) == text


SENTENCE = "I'll pay 12345, OK?\n\n  Fine"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", "I|'ll| pay| 12345|,| OK|?|\n\n | Fine"),
        ("smollm", "I|'ll| pay| |1|2|3|4|5|,| OK|?|\n\n | Fine"),
        ("starcoder", "I|'ll| pay| |1|2|3|4|5|,| OK|?|\n\n | Fine"),
        ("command-r", "I|'ll| pay| |1|2|3|4|5|,| OK|?|\n\n | Fine"),
        ("default", "I|'|ll| pay| |123|45|,| OK|?|\n\n | Fine"),
        ("falcon", "I|'|ll| pay| |123|45|,| OK|?|\n\n | Fine"),
        ("llama-bpe", "I|'ll| pay| |123|45|,| OK|?\n\n| | Fine"),
        ("qwen2", "I|'ll| pay| |1|2|3|4|5|,| OK|?\n\n| | Fine"),
        ("qwen35", "I|'ll| pay| |1|2|3|4|5|,| OK|?\n\n| | Fine"),
        ("tekken", "I|'ll| pay| |1|2|3|4|5|,| OK|?\n\n| | Fine"),
        ("gpt-4o", "I'll| pay| |123|45|,| OK|?\n\n| | Fine"),
        ("deepseek-v3", "I|'ll| pay| |123|45|,| OK|?\n\n| | Fine"),
        ("deepseek-llm", "I|'|ll| pay| |12345|,| OK|?|\n|\n| | Fine"),
        ("deepseek-coder", "I|'|ll| pay| |1|2|3|4|5|,| OK|?|\n|\n| | Fine"),
        ("bailingmoe", "I|'ll| pay| |1|2|3|4|5|,| OK|?\n\n| | Fine"),
        ("seed-coder", "I|'ll| pay| |1|2|3|4|5|,| OK|?|\n\n| | Fine"),
        ("bloom", "I'll| pay| 12345|,| OK|?\n\n | Fine"),
        ("viking", "I'll| pay| |1|2|3|4|5|,| OK|?\n\n | Fine"),
    ],
)
def test_a_sentence_by_hand(name: str, pieces: str) -> None:
    assert cut(SENTENCE, *PRE_TOKENIZERS[name].patterns) == pieces.split("|")


def test_deepseek_cuts_scripts() -> None:
    patterns = PRE_TOKENIZERS["deepseek-llm"].patterns
    assert cut("word漢字かなслово ώ", *patterns) == ["word", "漢字かな", "слово", " ώ"]
    assert cut("x漢字かな1234", *PRE_TOKENIZERS["deepseek-v3"].patterns) == [
        *("x", "漢字かな", "123", "4"),
    ]


def test_camel_case_is_cut_by_tekken_and_gpt4o() -> None:
    for name in ("tekken", "gpt-4o"):
        assert cut("fooBarBAZ", *PRE_TOKENIZERS[name].patterns) == ["foo", "Bar", "BAZ"]
    assert cut("fooBarBAZ", *PRE_TOKENIZERS["llama-bpe"].patterns) == ["fooBarBAZ"]
