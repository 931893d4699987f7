"""SentencePiece BPE (tokenizer.ggml.model "llama"): the pieces and backend of such a vocabulary.

SentencePiece joins the neighbours whose union has the best score, leftmost first; the same follows
from BPE with every split of every token as a merge, ranked by the token's score.
"""

from __future__ import annotations

import re

import numpy as np
from tokenizers import Tokenizer, models, normalizers

from pipeserve.errors import GGUFFormatError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.vocabulary import TokenType, Vocabulary

SPACE = "▁"
"""How a space is written in tokens (U+2581)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def adds_space_prefix(gguf_file: GGUFFile) -> bool:
    """Whether text gets a space in front: Llama's vocabularies yes, Gemma's no."""
    return gguf_file.metadata_bool("tokenizer.ggml.add_space_prefix", True)


def build_spm(gguf_file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """The backend, without added tokens.

    The space prefix goes before every stretch of text between added tokens, as in llama.cpp and in
    Llama 2's tokenizer.json.

    Raises:
        GGUFFormatError: there is not one score for each token.
    """
    unknown = vocabulary.unknown_token_id
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_by_score(gguf_file, vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        if adds_space_prefix(gguf_file)
        else spaces
    )
    return backend


def _merges_by_score(gguf_file: GGUFFile, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    scores = gguf_file.metadata_array("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise GGUFFormatError(
            gguf_file.path,
            f"has {len(vocabulary.tokens)} tokens but {len(scores)} entries in "
            "tokenizer.ggml.scores",
        )
    # Only normal tokens come about by merging; bytes, control and user-defined tokens do not.
    normal = {
        token
        for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if token_type == TokenType.NORMAL
    }
    merges = []
    for index in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
        token = vocabulary.tokens[index]
        if token not in normal:
            continue
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((left, right))
    return merges


def spm_pieces(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes that each token stands for; added tokens stand for their name.

    Raises:
        GGUFFormatError: a byte token is not named <0x00> to <0xFF>.
    """
    pieces = []
    for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if token_type == TokenType.BYTE:
            pieces.append(_byte(vocabulary, token))
        elif token_type in (TokenType.CONTROL, TokenType.USER_DEFINED):
            pieces.append(token.encode())
        else:
            pieces.append(token.replace(SPACE, " ").encode())
    return pieces


def _byte(vocabulary: Vocabulary, token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    if match is None:
        raise GGUFFormatError(
            vocabulary.path, f"the token {token!r} is of type byte, but not named <0x00> to <0xFF>"
        )
    return bytes.fromhex(match[1])
