"""Small GGUF vocabularies for the tests: all bytes, every kind of token, SentencePiece trained."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pipeserve.text.vocabulary import TokenType
from tests.text.corpus import CORPUS

INERT_MERGE = "ÿ þ"
"""A merge of the bytes FF and FE, which no text has: a file without any merge is refused."""


def write_vocabulary(
    path: Path,
    *,
    model: str,
    tokens: Sequence[str],
    types: Sequence[int],
    pre: str | None = None,
    merges: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    ids: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    chat_template: str | None = None,
) -> Path:
    """A GGUF of metadata only. `ids` and `flags` are keyed by the end of tokenizer.ggml.*."""
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_string("tokenizer.ggml.model", model)
    writer.add_array("tokenizer.ggml.tokens", list(tokens))
    writer.add_array("tokenizer.ggml.token_type", [int(kind) for kind in types])
    if pre is not None:
        writer.add_string("tokenizer.ggml.pre", pre)
    if merges is not None:
        writer.add_array("tokenizer.ggml.merges", list(merges))
    if scores is not None:
        writer.add_array("tokenizer.ggml.scores", [float(score) for score in scores])
    for name, token_id in (ids or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}", token_id)
    for name, flag in (flags or {}).items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if chat_template is not None:
        writer.add_string("tokenizer.chat_template", chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte, in the order of the bytes, from its published definition."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    letters, spare = [], 256
    for byte in range(256):
        if byte in kept:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters


def write_byte_vocabulary(
    path: Path,
    *,
    pre: str = "gpt-2",
    merges: Sequence[str] = (INERT_MERGE,),
    control: Sequence[str] = ("<|end|>",),
    user_defined: Sequence[str] = (),
    ids: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    chat_template: str | None = None,
) -> Path:
    """Tokens 0 to 255 are the bytes; then what the merges make, control and user-defined ones."""
    merged = ["".join(merge.split(" ")) for merge in merges]
    tokens = [*byte_letters(), *merged, *control, *user_defined]
    types = [TokenType.NORMAL] * (256 + len(merged))
    types += [TokenType.CONTROL] * len(control) + [TokenType.USER_DEFINED] * len(user_defined)
    return write_vocabulary(
        path,
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        ids=ids,
        flags=flags,
        chat_template=chat_template,
    )


def write_trained_spm(path: Path, *, add_space_prefix: bool, vocab_size: int = 1200) -> Path:
    """A Llama-like vocabulary that the sentencepiece library trained on the corpus."""
    trained = io.BytesIO()
    texts = (text for text in CORPUS.values() if text.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=trained,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=add_space_prefix,
        split_digits=True,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    return write_vocabulary(
        path,
        model="llama",
        tokens=[piece.piece for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        ids={"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
        flags={"add_space_prefix": add_space_prefix},
    )
