"""Byte-level BPE (tokenizer.ggml.model "gpt2"): the pieces and backend of such a vocabulary."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from pipeserve.errors import GGUFFormatError, UnsupportedModelError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from pipeserve.text.vocabulary import TokenType, Vocabulary


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself, or for those not printable 256 and on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
_TO_BYTES = str.maketrans({letter: chr(byte) for letter, byte in _ALPHABET.items()})


def pre_tokenizer_kind(gguf_file: GGUFFile) -> PreTokenizer:
    """The kind that the file names; without a name llama.cpp's default.

    Raises:
        UnsupportedModelError: the name is not a known one.
    """
    name = gguf_file.metadata_str("tokenizer.ggml.pre", "default")
    kind = PRE_TOKENIZERS.get(name)
    if kind is None:
        raise UnsupportedModelError(
            gguf_file.path,
            f"tokenizer.ggml.pre is {name}, which is not built in; known are "
            + ", ".join(sorted(PRE_TOKENIZERS)),
        )
    return kind


def build_bpe(gguf_file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """The backend, without added tokens.

    Raises:
        GGUFFormatError: a merge names a token that the vocabulary lacks.
        UnsupportedModelError: the pre-tokenizer is not a known one.
    """
    kind = pre_tokenizer_kind(gguf_file)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges(gguf_file, vocabulary),
            ignore_merges=kind.ignore_merges,
        )
    )
    if kind.normalise_nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    to_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_alphabet])
    return backend


def _merges(gguf_file: GGUFFile, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    merges = []
    for rank, merge in enumerate(gguf_file.metadata_strings("tokenizer.ggml.merges")):
        # The first part may itself begin with a space in vocabularies that keep real ones.
        space = merge.find(" ", 1)
        left, right = merge[:space], merge[space + 1 :]
        ids = vocabulary.ids
        if space < 0 or left not in ids or right not in ids or left + right not in ids:
            raise GGUFFormatError(
                gguf_file.path, f"merge {rank} is {merge!r}, which joins no two tokens to a third"
            )
        merges.append((left, right))
    return merges


def bpe_pieces(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes that each token stands for; added tokens stand for their name."""
    return [
        _piece(token, token_type)
        for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]


def _piece(token: str, token_type: int) -> bytes:
    is_added = token_type in (TokenType.CONTROL, TokenType.USER_DEFINED)
    if is_added or not _ALPHABET.keys() >= set(token):
        return token.encode()
    return token.translate(_TO_BYTES).encode("latin-1")
