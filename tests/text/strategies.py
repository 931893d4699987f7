"""Hypothesis strategies for texts that are hard on tokenizers."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.text.corpus import CORPUS

_CHARACTERS = st.characters(exclude_categories=["Cs"])
_RUNS = st.builds(
    lambda letter, count: letter * count, st.sampled_from(" \n\t\r▁a1é.'<"), st.integers(1, 30)
)
_NAMES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<end_of_turn>", "</h1>"]
)
_EXCERPTS = st.builds(
    lambda text, start, length: text[start : start + length],
    st.sampled_from(list(CORPUS.values())),
    st.integers(0, 60),
    st.integers(1, 20),
)

TEXTS = st.lists(
    st.one_of(st.text(_CHARACTERS, max_size=12), _RUNS, _NAMES, _EXCERPTS), max_size=8
).map("".join)
"""Random characters of all planes, runs, names of special tokens and pieces of the corpus."""
