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


MAX_TOKEN_CHARACTERS = 1024
"""Several times what is common: every cut of a token may have to be looked at."""


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


_INFILL_NAMES = {
    "pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    "suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    "mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>"),
    "rep": ("<|repo_name|>", "<|fim_repo|>", "<fim-repo>", "<reponame>", "<REPO>"),
    "sep": ("<|file_sep|>",),
}
"""Tokens of code models that files do not always name by key (llama.cpp's list)."""

_OLD_INFILL_KEYS = {"pre": "prefix", "suf": "suffix", "mid": "middle"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillTokens:
    """What a fill-in-the-middle prompt is made of: prefix TEXT suffix TEXT middle."""

    prefix: int
    suffix: int
    middle: int
    ends: frozenset[int]
    """All of the kind: one of them in the answer ends it."""


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
    infill: InfillTokens | None
    """None where the model cannot fill in the middle of a text."""

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Vocabulary:
        """Read and check the vocabulary.

        Raises:
            GGUFFormatError: keys are missing, or contradict each other.
        """
        tokens = gguf_file.metadata_strings("tokenizer.ggml.tokens")
        ids = _ids_by_token(gguf_file, tokens)
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
            ids=ids,
            bos_token_id=bos,
            eos_token_id=eos,
            unknown_token_id=unknown,
            eos_token_ids=frozenset(ends | _ends_by_name(tokens, types)),
            infill=_infill_tokens(gguf_file, ids),
        )

    def of_type(self, token_type: TokenType) -> list[int]:
        """Ids of all tokens of this type, ascending."""
        return [index for index, kind in enumerate(self.types) if kind == token_type]


def _token_types(gguf_file: GGUFFile, num_tokens: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in gguf_file.metadata:
        return [TokenType.NORMAL] * num_tokens
    values = gguf_file.metadata_array("tokenizer.ggml.token_type")
    if values.dtype.kind not in "iu":
        raise GGUFFormatError(
            gguf_file.path, "tokenizer.ggml.token_type has values that are not whole numbers"
        )
    types = values.tolist()
    if len(types) != num_tokens:
        raise GGUFFormatError(
            gguf_file.path,
            f"has {num_tokens} tokens but {len(types)} entries in tokenizer.ggml.token_type",
        )
    return [int(kind) for kind in types]


def _ids_by_token(gguf_file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    longest = max(range(len(tokens)), key=lambda index: len(tokens[index]), default=0)
    if not tokens or len(tokens[longest]) > MAX_TOKEN_CHARACTERS:
        problem = (
            (
                f"token {longest} has {len(tokens[longest])} characters; at most "
                f"{MAX_TOKEN_CHARACTERS} are possible"
            )
            if tokens
            else "there are none"
        )
        raise GGUFFormatError(gguf_file.path, f"tokenizer.ggml.tokens: {problem}")
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


def _infill_tokens(gguf_file: GGUFFile, ids: dict[str, int]) -> InfillTokens | None:
    """By the file's keys (tokenizer.ggml.fim_*, or their older names), else by name."""
    found: dict[str, int] = {}
    for kind, names in _INFILL_NAMES.items():
        by_name = (ids[name] for name in names if name in ids)
        token_id = _token_id(gguf_file, f"fim_{kind}", len(ids))
        if token_id is None and kind in _OLD_INFILL_KEYS:
            token_id = _token_id(gguf_file, _OLD_INFILL_KEYS[kind], len(ids))
        if token_id is None:
            token_id = next(by_name, None)
        if token_id is not None:
            found[kind] = token_id
    if not {"pre", "suf", "mid"} <= found.keys():
        return None
    return InfillTokens(
        prefix=found["pre"],
        suffix=found["suf"],
        middle=found["mid"],
        ends=frozenset(found.values()),
    )


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
