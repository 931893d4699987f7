"""Vocabulary: what a GGUF file says about its tokens, checked once, before a tokenizer is built.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#ggml. What the keys leave open
follows llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from pipeserve.errors import GGUFFormatError
from pipeserve.gguf.reader import GGUFFile

END_OF_TURN_TOKENS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
    }
)
"""Control tokens of these names end a generation, whether or not the file says so."""


# Old SentencePiece files leave out the ids that every such vocabulary had.
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}


class TokenType(enum.IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    """Never part of a text; its name stands for it only where special tokens are parsed."""
    USER_DEFINED = 4
    """Always matched as a whole, before anything else is tokenised."""
    UNUSED = 5
    BYTE = 6
    """One raw byte, named <0x00> to <0xFF>."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens and their types, by id."""

    path: Path
    tokens: list[str]
    types: list[int]
    """TokenType of each token; a number that TokenType lacks counts as NORMAL."""
    ids: dict[str, int]
    bos_token_id: int | None
    eos_token_id: int | None
    unknown_token_id: int | None
    eos_token_ids: frozenset[int]
    """Every token that ends a generation."""

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Vocabulary:
        """Read and check the vocabulary.

        Raises:
            GGUFFormatError: keys are missing, or contradict each other.
        """
        tokens = gguf_file.metadata_strings("tokenizer.ggml.tokens")
        types = _token_types(gguf_file, len(tokens))
        bos, eos, end_of_turn, end_of_message, unknown = (
            _token_id(gguf_file, name, len(tokens))
            for name in ("bos", "eos", "eot", "eom", "unknown")
        )
        ends = {end for end in (eos, end_of_turn, end_of_message) if end is not None}
        for token_id in ends if bos is None else {bos, *ends}:
            types[token_id] = TokenType.CONTROL
        return cls(
            path=gguf_file.path,
            tokens=tokens,
            types=types,
            ids=_ids_by_token(gguf_file, tokens),
            bos_token_id=bos,
            eos_token_id=eos,
            unknown_token_id=unknown,
            eos_token_ids=frozenset(ends | _ends_by_name(tokens, types)),
        )

    def of_type(self, token_type: TokenType) -> list[int]:
        """Ids of all tokens of this type, ascending."""
        return [index for index, kind in enumerate(self.types) if kind == token_type]


def _token_types(gguf_file: GGUFFile, num_tokens: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in gguf_file.metadata:
        return [TokenType.NORMAL] * num_tokens
    types = gguf_file.metadata_array("tokenizer.ggml.token_type").tolist()
    if len(types) != num_tokens:
        raise GGUFFormatError(
            gguf_file.path,
            f"has {num_tokens} tokens but {len(types)} entries in tokenizer.ggml.token_type",
        )
    return [int(kind) for kind in types]


def _ids_by_token(gguf_file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) == len(tokens):
        return ids
    index, token = next((i, token) for i, token in enumerate(tokens) if ids[token] != i)
    raise GGUFFormatError(
        gguf_file.path, f"the token {token!r} occurs twice: as {index} and as {ids[token]}"
    )


def _token_id(gguf_file: GGUFFile, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in gguf_file.metadata:
        return _DEFAULT_IDS.get(gguf_file.metadata_str("tokenizer.ggml.model"), {}).get(name)
    token_id = gguf_file.metadata_int(key)
    if not 0 <= token_id < num_tokens:
        raise GGUFFormatError(gguf_file.path, f"{key} is {token_id}, of {num_tokens} tokens")
    return token_id


def _ends_by_name(tokens: list[str], types: list[int]) -> set[int]:
    names = END_OF_TURN_TOKENS
    # OpenAI's harmony format ends a message with <|end|> in the middle of an answer.
    if {"<|return|>", "<|call|>"} <= set(tokens):
        names = names - {"<|end|>"}
    return {
        index
        for index, token in enumerate(tokens)
        if types[index] == TokenType.CONTROL and token in names
    }
