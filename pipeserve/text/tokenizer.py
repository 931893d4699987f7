"""Tokenizer: text to token ids and back, as the model's GGUF file defines it.

Immutable once built; may be used from any thread at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

from pipeserve.errors import UnsupportedModelError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.bpe import bpe_pieces, build_bpe, pre_tokenizer_kind
from pipeserve.text.long_texts import TextCutter, byte_level_cutter, spm_cutter
from pipeserve.text.spm import SPACE, adds_space_prefix, build_spm, spm_pieces
from pipeserve.text.vocabulary import InfillTokens, TokenType, Vocabulary

_SPECIAL_TYPES = (TokenType.CONTROL, TokenType.UNKNOWN)

LONG_TEXT = 10_000
"""Characters from which on a text is encoded without the interpreter's lock: handing it to
another thread costs a millisecond, holding the lock about one per 1,500 characters."""


class Tokenizer:
    """Build it with from_gguf."""

    def __init__(
        self,
        *,
        backend: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        pieces: list[bytes],
        add_bos: bool,
        add_eos: bool,
        strips_leading_space: bool,
        cutter: TextCutter,
    ) -> None:
        """`backend` knows no added tokens yet; `pieces` holds the bytes of each token."""
        self._vocabulary = vocabulary
        self._pieces = pieces
        self._special_ids = frozenset(
            index for index, kind in enumerate(vocabulary.types) if kind in _SPECIAL_TYPES
        )
        self.longest_token_bytes = max(map(len, pieces))
        """A text of n bytes has at least n / longest_token_bytes tokens."""
        self._text_pieces = list(pieces)
        for index in self._special_ids:
            self._text_pieces[index] = b""
        self.add_bos = add_bos and vocabulary.bos_token_id is not None
        """Whether a prompt begins with BOS."""
        self._add_eos = add_eos and vocabulary.eos_token_id is not None
        self.strips_leading_space = strips_leading_space
        """Whether the space that begins a text is the tokenizer's own and not shown."""
        self._cutter = cutter
        added = _added_tokens(vocabulary, keeps_spaces=strips_leading_space)
        self._backend = _with_added_tokens(backend, added)
        # The same model once more, so that the flag need not be switched while others encode.
        self._plain_backend = _with_added_tokens(_twin(backend), added)
        self._plain_backend.encode_special_tokens = True

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Tokenizer:
        """Build the tokenizer from tokenizer.ggml.*.

        Raises:
            GGUFFormatError: keys are missing, or contradict each other.
            UnsupportedModelError: a kind of vocabulary, or a pre-tokenizer, that is not built in.
        """
        model = gguf_file.metadata_str("tokenizer.ggml.model")
        if model not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                gguf_file.path,
                f"tokenizer.ggml.model is {model}, which is not built in; known are gpt2 and llama",
            )
        vocabulary = Vocabulary.from_gguf(gguf_file)
        add_eos = gguf_file.metadata_bool("tokenizer.ggml.add_eos_token", False)
        if model == "llama":
            return cls(
                backend=build_spm(gguf_file, vocabulary),
                vocabulary=vocabulary,
                pieces=spm_pieces(vocabulary),
                add_bos=gguf_file.metadata_bool("tokenizer.ggml.add_bos_token", True),
                add_eos=add_eos,
                strips_leading_space=adds_space_prefix(gguf_file),
                cutter=spm_cutter(
                    (token.replace(SPACE, " ") for token in vocabulary.tokens),
                    _added_names(vocabulary),
                    adds_space=adds_space_prefix(gguf_file),
                ),
            )
        kind = pre_tokenizer_kind(gguf_file)
        return cls(
            backend=build_bpe(gguf_file, vocabulary),
            vocabulary=vocabulary,
            pieces=bpe_pieces(vocabulary),
            add_bos=gguf_file.metadata_bool("tokenizer.ggml.add_bos_token", kind.add_bos),
            add_eos=add_eos,
            strips_leading_space=False,
            cutter=byte_level_cutter(_added_names(vocabulary)),
        )

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary.tokens)

    @property
    def bos_token_id(self) -> int | None:
        return self._vocabulary.bos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return self._vocabulary.eos_token_ids

    @property
    def bos_token(self) -> str:
        """Its name, for templates; empty where there is none."""
        return self._name(self._vocabulary.bos_token_id)

    @property
    def eos_token(self) -> str:
        """Its name, for templates; empty where there is none."""
        return self._name(self._vocabulary.eos_token_id)

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            add_special_tokens: put BOS in front (and EOS behind) if the model wants that; a text
                that begins with BOS already gets no second one.
            parse_special: take the name of a control token in the text for that token. Without
                it, the name is text like any other.

        Raises:
            InvalidParameterError: a text of megabytes has no place to cut it.
        """
        backend = self._backend if parse_special else self._plain_backend
        ids: list[int] = []
        for part in self._cutter.parts(_well_formed(text)):
            ids += _encode(backend, part)
        if not add_special_tokens:
            return ids
        bos, eos = self._vocabulary.bos_token_id, self._vocabulary.eos_token_id
        if self.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if self._add_eos and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        pieces = self._text_pieces if skip_special else self._pieces
        data = b"".join([pieces[token_id] for token_id in token_ids])
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Bytes that one token adds to a text: none for special tokens, unless they are shown."""
        return self.pieces(skip_special=skip_special)[token_id]

    def pieces(self, *, skip_special: bool) -> list[bytes]:
        """token_bytes of every token, by id. Not to be changed."""
        return self._text_pieces if skip_special else self._pieces

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, and so never part of a text."""
        return token_id in self._special_ids

    def has_token(self, name: str) -> bool:
        """Whether the vocabulary holds a token of this name."""
        return name in self._vocabulary.ids

    def token_id(self, name: str) -> int | None:
        """The id of the token of this name; None where the vocabulary has none."""
        return self._vocabulary.ids.get(name)

    @property
    def infill(self) -> InfillTokens | None:
        """What marks prefix, suffix and middle; None where the model cannot fill in."""
        return self._vocabulary.infill

    def _name(self, token_id: int | None) -> str:
        return "" if token_id is None else self._vocabulary.tokens[token_id]


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Only the batch call lets other threads run meanwhile."""
    if len(text) < LONG_TEXT:
        encoding = backend.encode(text, add_special_tokens=False)
    else:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids


def _added_names(vocabulary: Vocabulary) -> list[str]:
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return [vocabulary.tokens[index] for kind in kinds for index in vocabulary.of_type(kind)]


def _added_tokens(vocabulary: Vocabulary, *, keeps_spaces: bool) -> list[tokenizers.AddedToken]:
    """Tokens that are matched as a whole before the text is cut and merged."""
    control = [
        tokenizers.AddedToken(vocabulary.tokens[index], special=True, normalized=False)
        for index in vocabulary.of_type(TokenType.CONTROL)
    ]
    user_defined = [
        # Gemma's runs of spaces are matched once spaces are written as in its other tokens.
        tokenizers.AddedToken(token, special=False, normalized=" " in token and not keeps_spaces)
        for token in (vocabulary.tokens[i] for i in vocabulary.of_type(TokenType.USER_DEFINED))
    ]
    return control + user_defined


def _with_added_tokens(
    backend: tokenizers.Tokenizer, added: list[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    backend.add_tokens([token for token in added if token.content])
    return backend


def _twin(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Another Tokenizer over the same model, which is shared and not copied."""
    twin = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    return twin


def _well_formed(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
