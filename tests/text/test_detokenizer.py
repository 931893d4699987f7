"""Detokenizer: any cut of any text over any tokens, with any stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.detokenizer import Detokenizer
from pipeserve.text.tokenizer import Tokenizer
from pipeserve.text.vocabulary import TokenType
from tests.text.corpus import CORPUS
from tests.text.small_vocabularies import byte_letters, write_trained_spm, write_vocabulary
from tests.text.strategies import TEXTS

END = 257
"""The control token of byte_tokenizer."""

STOPS = st.lists(st.text(st.sampled_from("abü🙂\ufffd"), min_size=1, max_size=5), max_size=4)


def run(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition: the stop that is complete first, and of several there the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def grouped_tokenizer(path: Path, pieces: Sequence[bytes]) -> Tokenizer:
    """A byte-level vocabulary whose tokens are these bytes and nothing else."""
    letters = byte_letters()
    tokens = [*letters, *("".join(letters[byte] for byte in piece) for piece in pieces)]
    unique = list(dict.fromkeys(tokens))
    path = write_vocabulary(
        path,
        model="gpt2",
        tokens=[*unique, "ÿþ"],
        types=[TokenType.NORMAL] * (len(unique) + 1),
        merges=["ÿ þ"],
    )
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


class TestWithoutStop:
    @settings(deadline=None)
    @given(data=st.lists(st.integers(0, 255)))
    @example(data=list("🙂".encode()))
    @example(data=[0xF0, 0x9F, 0x99])
    def test_any_bytes(self, data: list[int], byte_tokenizer: Tokenizer) -> None:
        parts = run(Detokenizer(byte_tokenizer), data)
        assert "".join(parts) == bytes(data).decode(errors="replace") == byte_tokenizer.decode(data)

    @given(text=TEXTS)
    def test_characters_come_whole(self, text: str, byte_tokenizer: Tokenizer) -> None:
        detokenizer = Detokenizer(byte_tokenizer)
        parts = [detokenizer.push(byte) for byte in text.encode()]
        assert [part for part in parts if part] == list(text)
        assert detokenizer.finish() == ""

    def test_tokens_across_characters(self, tmp_path: Path) -> None:
        text = "aü🙂漢b"
        data = text.encode()
        pieces = [data[start : start + 3] for start in range(0, len(data), 3)]
        tokenizer = grouped_tokenizer(tmp_path / "grouped.gguf", pieces)
        ids = [
            next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == piece)
            for piece in pieces
        ]
        parts = run(Detokenizer(tokenizer), ids)
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts)

    def test_incomplete_character_at_the_end(self, byte_tokenizer: Tokenizer) -> None:
        assert run(Detokenizer(byte_tokenizer), [ord("a"), 0xE2, 0x82]) == ["a", "", "", "\ufffd"]

    def test_special_tokens_are_left_out_or_shown(self, byte_tokenizer: Tokenizer) -> None:
        ids = [ord("a"), END, ord("b")]
        assert run(Detokenizer(byte_tokenizer), ids) == ["a", "", "b", ""]
        shown = Detokenizer(byte_tokenizer, skip_special_tokens=False)
        assert run(shown, ids) == ["a", "<|end|>", "b", ""]

    def test_some_special_tokens_are_shown_among_the_others(
        self, byte_tokenizer: Tokenizer
    ) -> None:
        shown = Detokenizer(byte_tokenizer, shown_token_ids=[END])
        assert run(shown, [97, END, 98]) == ["a", "<|end|>", "b", ""]

    def test_character_that_the_prompt_left_half(self, byte_tokenizer: Tokenizer) -> None:
        prompt = [ord("x"), *"🙂".encode()[:2]]
        detokenizer = Detokenizer(byte_tokenizer, prompt_token_ids=prompt)
        assert run(detokenizer, "🙂".encode()[2:]) == ["", "🙂", ""]


class TestStop:
    @settings(deadline=None)
    @given(text=st.text(st.sampled_from("abü🙂")), tail=st.binary(max_size=3), stops=STOPS)
    @example(text="aaab", tail=b"", stops=["aab"])
    @example(text="abab", tail=b"", stops=["bab", "a"])
    @example(text="abc", tail=b"\xe2", stops=["\ufffd"])
    def test_any_text_any_stops(
        self, text: str, tail: bytes, stops: list[str], byte_tokenizer: Tokenizer
    ) -> None:
        data = text.encode() + tail
        detokenizer = Detokenizer(byte_tokenizer, stop=stops)
        joined = "".join(run(detokenizer, data))
        expected, stopped = cut_at_stop(data.decode(errors="replace"), stops)
        assert joined == expected
        assert detokenizer.stopped is stopped

    @settings(deadline=None)
    @given(
        parts=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=6), max_size=8),
        stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=7), max_size=3),
    )
    def test_nothing_is_held_longer_than_needed(
        self,
        parts: list[str],
        stops: list[str],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        """After each token, all is out but the longest end that begins a stop string."""
        path = tmp_path_factory.getbasetemp() / "parts.gguf"
        tokenizer = grouped_tokenizer(path, [part.encode() for part in parts])
        ids = {tokenizer.token_bytes(index): index for index in range(tokenizer.vocab_size)}
        detokenizer = Detokenizer(tokenizer, stop=stops)
        seen = given_out = ""
        for part in parts:
            seen += part
            given_out += detokenizer.push(ids[part.encode()])
            text, stopped = cut_at_stop(seen, stops)
            assert detokenizer.stopped is stopped
            if stopped:
                assert given_out == text
            else:
                assert given_out == seen[: len(seen) - held(seen, stops)]

    def test_stop_across_tokens_is_cut_exactly(self, byte_tokenizer: Tokenizer) -> None:
        detokenizer = Detokenizer(byte_tokenizer, stop=["</answer>"])
        parts = run(detokenizer, b"x < y </ans </answer> z")
        assert "".join(parts) == "x < y </ans "
        assert detokenizer.stopped
        assert detokenizer.push(ord("a")) == ""
        assert detokenizer.finish() == ""

    def test_what_was_held_comes_out_at_the_end(self, byte_tokenizer: Tokenizer) -> None:
        detokenizer = Detokenizer(byte_tokenizer, stop=["stop"])
        assert run(detokenizer, b"a sto") == ["a", " ", "", "", "", "sto"]
        assert not detokenizer.stopped

    def test_empty_stop_strings_are_ignored(self, byte_tokenizer: Tokenizer) -> None:
        detokenizer = Detokenizer(byte_tokenizer, stop=["", "b"])
        assert "".join(run(detokenizer, b"ab")) == "a"
        assert run(Detokenizer(byte_tokenizer, stop=[""]), b"ab") == ["a", "b", ""]

    def test_each_letter_is_compared_a_bounded_number_of_times(
        self, byte_tokenizer: Tokenizer
    ) -> None:
        """Knuth, Morris and Pratt: at most two comparisons a letter, however long the stop."""
        comparisons = 0

        class Letter(str):
            __slots__ = ()
            __hash__ = str.__hash__

            def __eq__(self, other: object) -> bool:
                nonlocal comparisons
                comparisons += 1
                return str.__eq__(self, other)

            def __ne__(self, other: object) -> bool:
                return not self == other

        class Stop(str):
            __slots__ = ()

            def __getitem__(self, index: object) -> Letter:
                return Letter(str.__getitem__(self, index))  # type: ignore[index]

        detokenizer = Detokenizer(byte_tokenizer, stop=[Stop("a" * 500 + "b")])
        prepared = comparisons
        text = "a" * 3000 + "c"
        assert "".join(run(detokenizer, text.encode())) == text
        assert len(text) <= comparisons - prepared <= 4 * len(text)


def held(text: str, stops: Sequence[str]) -> int:
    lengths = [
        length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])
    ]
    return max(lengths, default=0)


class TestSentencePiece:
    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Iterator[Tokenizer]:
        path = write_trained_spm(tmp_path / "spm.gguf", add_space_prefix=True)
        with GGUFFile.open(path) as file:
            yield Tokenizer.from_gguf(file)

    def test_equals_decode(self, tokenizer: Tokenizer) -> None:
        for text in CORPUS.values():
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert "".join(run(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)

    def test_equals_the_rest_of_decode_after_a_prompt(self, tokenizer: Tokenizer) -> None:
        for text in CORPUS.values():
            ids = tokenizer.encode("start " + text, add_special_tokens=True)
            for cut in range(2, len(ids), 7):
                detokenizer = Detokenizer(tokenizer, prompt_token_ids=ids[:cut])
                before = tokenizer.decode(ids[:cut])
                if not before.endswith("\ufffd"):  # the cut is between two characters
                    joined = "".join(run(detokenizer, ids[cut:]))
                    assert before + joined == tokenizer.decode(ids)

    def test_space_prefix_is_shown_only_after_text(self, tokenizer: Tokenizer) -> None:
        (bos, *word) = tokenizer.encode("a", add_special_tokens=True)
        assert "".join(run(Detokenizer(tokenizer), word)) == "a"
        assert "".join(run(Detokenizer(tokenizer, prompt_token_ids=[bos]), word)) == "a"
        assert "".join(run(Detokenizer(tokenizer, prompt_token_ids=[bos, *word]), word)) == " a"


def test_real_vocabularies(demo_model_path: Path, gemma_model_path: Path) -> None:
    for path in (demo_model_path, gemma_model_path):
        with GGUFFile.open(path) as file:
            tokenizer = Tokenizer.from_gguf(file)
        for text in CORPUS.values():
            ids = tokenizer.encode(text, add_special_tokens=False)
            for skip in (True, False):
                detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
                joined = "".join(run(detokenizer, ids))
                assert joined == tokenizer.decode(ids, skip_special=skip)
