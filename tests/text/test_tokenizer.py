"""Tokenizer on small vocabularies: special tokens, BOS and EOS, SentencePiece, broken files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeserve.errors import GGUFFormatError, UnsupportedModelError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.tokenizer import LONG_TEXT, Tokenizer
from pipeserve.text.vocabulary import TokenType
from tests.text.corpus import CORPUS
from tests.text.sentencepiece_oracle import processor
from tests.text.small_vocabularies import (
    write_byte_vocabulary,
    write_trained_spm,
    write_vocabulary,
)
from tests.text.strategies import TEXTS

END = 257
"""Id of the first control token in a byte vocabulary: the merged token comes before it."""


def load(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vocabulary.gguf"


class TestByteLevel:
    @settings(deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    def test_bytes_are_the_tokens(self, text: str, byte_tokenizer: Tokenizer) -> None:
        ids = byte_tokenizer.encode(text, add_special_tokens=False)
        assert bytes(ids) == text.encode()
        assert byte_tokenizer.decode(ids) == text
        assert b"".join(map(byte_tokenizer.token_bytes, ids)) == text.encode()

    def test_merges_go_by_rank(self, path: Path) -> None:
        tokenizer = load(write_byte_vocabulary(path, merges=["b c", "a b", "a bc"]))
        ids = tokenizer.encode("abcab", add_special_tokens=False)
        assert [tokenizer.token_bytes(token_id) for token_id in ids] == [b"abc", b"ab"]

    @pytest.mark.parametrize(
        ("pre", "expected"), [("llama-bpe", [b"abc"]), ("gpt-2", [b"a", b"bc"])]
    )
    def test_whole_piece_is_taken_only_where_merges_are_ignored(
        self, pre: str, expected: list[bytes], path: Path
    ) -> None:
        """abc is a token that no merge leads to, since "ab c" comes after "b c"."""
        tokenizer = load(write_byte_vocabulary(path, pre=pre, merges=["b c", "a b", "ab c"]))
        ids = tokenizer.encode("abc", add_special_tokens=False)
        pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
        assert pieces == expected

    def test_names_of_control_tokens_are_parsed_on_request(self, path: Path) -> None:
        tokenizer = load(write_byte_vocabulary(path, control=["<|end|>", "<|end|>>"]))
        text = "a<|end|>>b<|end|>"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [ord("a"), END + 1, ord("b"), END]
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.decode(ids, skip_special=False) == text
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert bytes(ids) == text.encode()

    def test_user_defined_tokens_are_always_parsed_and_always_shown(self, path: Path) -> None:
        tokenizer = load(write_byte_vocabulary(path, user_defined=["<think>", "   ", "漢"]))
        for parse_special in (True, False):
            ids = tokenizer.encode(
                "<think>   漢", add_special_tokens=False, parse_special=parse_special
            )
            assert ids == [END + 1, END + 2, END + 3]
        assert tokenizer.decode(ids) == "<think>   漢"
        assert not tokenizer.is_special(END + 1)

    def test_control_token_in_letters_outside_the_byte_alphabet(self, path: Path) -> None:
        tokenizer = load(write_byte_vocabulary(path, control=["<｜end▁of▁sentence｜>"]))
        ids = tokenizer.encode("a<｜end▁of▁sentence｜>", add_special_tokens=False)
        assert ids == [ord("a"), END]
        assert tokenizer.eos_token_ids == {END}

    def test_composed_form_where_the_model_asks_for_it(self, tmp_path: Path) -> None:
        text = "e\N{COMBINING ACUTE ACCENT}"
        qwen = load(write_byte_vocabulary(tmp_path / "qwen.gguf", pre="qwen2"))
        llama = load(write_byte_vocabulary(tmp_path / "llama.gguf", pre="llama-bpe"))
        assert bytes(qwen.encode(text, add_special_tokens=False)) == "é".encode()
        assert bytes(llama.encode(text, add_special_tokens=False)) == text.encode()

    def test_lone_surrogates_become_replacement_characters(self, byte_tokenizer: Tokenizer) -> None:
        ids = byte_tokenizer.encode("a\ud800b \ud83d\ude42", add_special_tokens=False)
        assert bytes(ids).decode() == "a\ufffdb 🙂"

    def test_bytes_that_are_not_utf8(self, byte_tokenizer: Tokenizer) -> None:
        assert byte_tokenizer.decode([0xE2, 0x82, ord("a"), 0xFF]) == "\ufffda\ufffd"


ENDS = {"bos_token_id": END, "eos_token_id": END + 1}


class TestBeginningAndEnd:
    def tokenizer(self, path: Path, **flags: bool) -> Tokenizer:
        control = ["<s>", "</s>"]
        return load(write_byte_vocabulary(path, control=control, ids=ENDS, flags=flags))

    def test_bos_and_eos_are_added_once(self, path: Path) -> None:
        tokenizer = self.tokenizer(path, add_bos_token=True, add_eos_token=True)
        bos, eos = END, END + 1
        assert tokenizer.encode("a", add_special_tokens=True) == [bos, ord("a"), eos]
        assert tokenizer.encode("<s>a</s>", add_special_tokens=True) == [bos, ord("a"), eos]
        assert tokenizer.encode("", add_special_tokens=True) == [bos, eos]
        assert tokenizer.encode("a", add_special_tokens=False) == [ord("a")]
        as_text = tokenizer.encode("<s>", add_special_tokens=True, parse_special=False)
        assert as_text == [bos, *b"<s>", eos]

    def test_file_may_ask_for_neither(self, path: Path) -> None:
        tokenizer = self.tokenizer(path, add_bos_token=False)
        assert tokenizer.encode("a", add_special_tokens=True) == [ord("a")]
        assert not tokenizer.add_bos
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")

    @pytest.mark.parametrize(("pre", "adds"), [("llama-bpe", True), ("qwen2", False)])
    def test_pre_tokenizer_decides_where_the_file_is_silent(
        self, pre: str, adds: bool, path: Path
    ) -> None:
        control = ["<s>", "</s>"]
        tokenizer = load(write_byte_vocabulary(path, pre=pre, control=control, ids=ENDS))
        assert tokenizer.add_bos is adds

    def test_no_bos_token_no_bos(self, path: Path) -> None:
        tokenizer = load(write_byte_vocabulary(path, flags={"add_bos_token": True}))
        assert tokenizer.bos_token_id is None
        assert tokenizer.bos_token == ""
        assert tokenizer.encode("a", add_special_tokens=True) == [ord("a")]

    def test_tokens_that_end_a_generation(self, path: Path) -> None:
        control = ["</s>", "<|im_end|>", "<tool>", "<end_of_turn>", "<|other|>"]
        ids = {"eos_token_id": END, "eot_token_id": END + 2}
        path = write_byte_vocabulary(path, control=control, user_defined=["<|eot_id|>"], ids=ids)
        assert load(path).eos_token_ids == {END, END + 1, END + 2, END + 3}

    def test_harmony_goes_on_after_end(self, path: Path) -> None:
        path = write_byte_vocabulary(path, control=["<|end|>", "<|return|>", "<|call|>"])
        assert load(path).eos_token_ids == {END + 1, END + 2}


class TestInfill:
    NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>")

    def test_tokens_are_found_by_name(self, path: Path) -> None:
        infill = load(write_byte_vocabulary(path, control=self.NAMES)).infill
        assert infill is not None
        assert (infill.prefix, infill.suffix, infill.middle) == (END, END + 1, END + 2)
        assert infill.ends == {END, END + 1, END + 2, END + 3}

    @pytest.mark.parametrize(
        "keys", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")]
    )
    def test_keys_of_the_file_go_before_names(self, keys: tuple[str, ...], path: Path) -> None:
        ids = {f"{key}_token_id": END + 3 + index for index, key in enumerate(keys)}
        control = [*self.NAMES[:3], "<a>", "<b>", "<c>"]
        infill = load(write_byte_vocabulary(path, control=control, ids=ids)).infill
        assert infill is not None
        assert (infill.prefix, infill.suffix, infill.middle) == (END + 3, END + 4, END + 5)

    def test_some_are_not_enough(self, path: Path) -> None:
        assert load(write_byte_vocabulary(path, control=self.NAMES[:2])).infill is None


Pair = tuple[Tokenizer, sentencepiece.SentencePieceProcessor]


@pytest.fixture(scope="module", params=[True, False], ids=["space prefix", "no prefix"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    write_trained_spm(path, add_space_prefix=request.param)
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file), processor(file)


class TestSentencePiece:
    @pytest.mark.parametrize("name", CORPUS)
    def test_corpus(self, name: str, pair: Pair) -> None:
        self.assert_same(*pair, CORPUS[name])

    @settings(deadline=None)
    @given(text=TEXTS)
    def test_any_text(self, text: str, pair: Pair) -> None:
        self.assert_same(*pair, text)

    def assert_same(
        self, ours: Tokenizer, theirs: sentencepiece.SentencePieceProcessor, text: str
    ) -> None:
        ids = ours.encode(text, add_special_tokens=False, parse_special=False)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text.replace("▁", " ")

    def test_space_prefix_after_special_tokens(self, tmp_path: Path) -> None:
        tokenizer = load(write_trained_spm(tmp_path / "spm.gguf", add_space_prefix=True))
        plain = tokenizer.encode("a", add_special_tokens=False)
        assert tokenizer.encode("<s>a</s>a", add_special_tokens=True) == [1, *plain, 2, *plain]
        assert tokenizer.token_bytes(plain[0]) == b" a"

    def test_bytes_stand_for_unknown_letters(self, tmp_path: Path) -> None:
        tokenizer = load(write_trained_spm(tmp_path / "spm.gguf", add_space_prefix=False))
        ids = tokenizer.encode("ꙮ", add_special_tokens=False)
        assert [tokenizer.token_bytes(token_id) for token_id in ids] == [b"\xea", b"\x99", b"\xae"]
        assert tokenizer.is_special(0)  # <unk>

    def test_usual_ids_and_flags_where_the_file_is_silent(self, path: Path) -> None:
        tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
        types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * 3]
        scores = [0, 0, 0, -2, -3, -1]
        write_vocabulary(path, model="llama", tokens=tokens, types=types, scores=scores)
        tokenizer = load(path)
        assert tokenizer.encode("a", add_special_tokens=True) == [1, 5]
        assert tokenizer.eos_token_ids == {2}
        assert tokenizer.encode("ab", add_special_tokens=False) == [5, 0]


class TestBrokenFiles:
    def refuse(self, path: Path, problem: str, error: type[Exception] = GGUFFormatError) -> None:
        with pytest.raises(error, match=problem) as caught:
            load(path)
        assert str(path) in str(caught.value)

    def test_unknown_pre_tokenizer(self, path: Path) -> None:
        write_byte_vocabulary(path, pre="novel")
        self.refuse(path, "pre is novel.*known are .*llama-bpe.*smollm", UnsupportedModelError)

    def test_unknown_model(self, path: Path) -> None:
        write_vocabulary(path, model="bert", tokens=["a"], types=[1])
        self.refuse(path, "model is bert.*known are gpt2 and llama", UnsupportedModelError)

    def test_no_vocabulary(self, path: Path) -> None:
        write_vocabulary(path, model="gpt2", tokens=[], types=[])
        self.refuse(path, "tokenizer.ggml.tokens")

    def test_no_merges(self, path: Path) -> None:
        write_vocabulary(path, model="gpt2", tokens=["a"], types=[1])
        self.refuse(path, r"lacks the metadata key tokenizer\.ggml\.merges")

    @pytest.mark.parametrize("merge", ["a xx", "xx a", "c d", "ab", ""])
    def test_merge_of_unknown_tokens(self, merge: str, path: Path) -> None:
        tokens = ["a", "b", "ab", "c", "d"]
        write_vocabulary(path, model="gpt2", tokens=tokens, types=[1] * 5, merges=["a b", merge])
        self.refuse(path, f"merge 1 is '{merge}'")

    def test_same_token_twice(self, path: Path) -> None:
        write_vocabulary(path, model="gpt2", tokens=["a", "b", "a"], types=[1] * 3, merges=["a b"])
        self.refuse(path, "token 'a' occurs twice: as 0 and as 2")

    def test_types_for_other_tokens(self, path: Path) -> None:
        write_vocabulary(path, model="gpt2", tokens=["a", "b"], types=[1], merges=["a b"])
        self.refuse(path, "2 tokens but 1 entries in tokenizer.ggml.token_type")

    def test_scores_for_other_tokens(self, path: Path) -> None:
        tokens, types = ["<unk>", "<s>", "</s>"], [1, 3, 3]
        write_vocabulary(path, model="llama", tokens=tokens, types=types, scores=[0, 0])
        self.refuse(path, "3 tokens but 2 entries in tokenizer.ggml.scores")

    def test_byte_token_of_another_name(self, path: Path) -> None:
        tokens, types = ["<unk>", "<s>", "</s>", "<0x4>"], [1, 3, 3, 6]
        write_vocabulary(path, model="llama", tokens=tokens, types=types, scores=[0] * 4)
        self.refuse(path, "'<0x4>' is of type byte")

    def test_special_token_outside_the_vocabulary(self, path: Path) -> None:
        write_byte_vocabulary(path, ids={"eos_token_id": 999})
        self.refuse(path, "eos_token_id is 999, of 258 tokens")


def test_many_threads_get_the_same_ids(byte_tokenizer: Tokenizer) -> None:
    texts = [*CORPUS.values()] * 4

    def both(text: str) -> tuple[list[int], list[int]]:
        return (
            byte_tokenizer.encode(text, add_special_tokens=True),
            byte_tokenizer.encode(text, add_special_tokens=True, parse_special=False),
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both, texts)) == [both(text) for text in texts]


def test_a_long_text_gets_the_ids_of_its_parts(byte_tokenizer: Tokenizer) -> None:
    part = "Hello wörld 😀\n"
    ids = byte_tokenizer.encode(part, add_special_tokens=False)
    copies = LONG_TEXT // len(part) + 1
    assert byte_tokenizer.encode(part * copies, add_special_tokens=False) == ids * copies
