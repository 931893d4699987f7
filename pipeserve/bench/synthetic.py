"""Writes a GGUF file of random weights in a real model's shape, or reuses the one of last time.

Speed does not depend on the values; never test correctness on such a file alone.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import pre_tokenizers

from pipeserve.bench.random_blocks import random_blocks
from pipeserve.bench.recipes import tensor_types
from pipeserve.errors import ConfigError, GGUFFormatError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.config import ModelConfig
from pipeserve.models.llama import required_tensors
from pipeserve.text.vocabulary import TokenType

STAMP_KEY = "pipeserve.bench.stamp"
_FORMAT = 1
"""Raise it when this module writes other bytes for the same shape and recipe."""

_HEADER_ROOM_BYTES = 16 * 1024**2
"""Space for metadata: a vocabulary of 128k tokens takes 2 MB."""
_SEED = 0
_CONTROL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
_MERGE = "! !"
"""The only merge: the tokenizers need one. Its result is the first of the made-up tokens."""


def provide_model(name: str, shape: ModelConfig, recipe: str, *, folder: Path) -> Path:
    """The path of the synthetic file NAME-RECIPE.gguf in `folder`, written if it is not there.

    Raises:
        ConfigError: there is no such recipe, or no room in the folder.
    """
    path = folder / f"{name}-{recipe}.gguf"
    if _is_stamped(path, _stamp(shape, recipe)):
        return path
    num_bytes = weight_bytes(shape, recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < num_bytes + _HEADER_ROOM_BYTES:
            raise ConfigError(
                f"{path} would take {num_bytes} bytes and {folder} has {free} free; make room, or "
                "set cache_dir to another folder"
            )
        print(f"writing {path}, {num_bytes / 1e9:.2f} GB", file=sys.stderr, flush=True)
        _write_whole(path, shape, recipe)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; set cache_dir to another folder"
        ) from None
    return path


def weight_bytes(shape: ModelConfig, recipe: str) -> int:
    """Bytes of all tensors of the file. Raises ConfigError where there is no such recipe."""
    types = tensor_types(recipe, shape)
    return sum(_num_bytes(dims, types[name]) for name, dims in required_tensors(shape).items())


def write_model(path: Path, shape: ModelConfig, recipe: str) -> None:
    """Write the file, whether or not there is one; a second writing gives the same bytes.

    Raises:
        ConfigError: there is no such recipe.
        OSError: the file cannot be written.
    """
    types = tensor_types(recipe, shape)
    tensors = required_tensors(shape)
    writer = GGUFWriter(path, shape.architecture)
    _add_metadata(writer, shape, recipe)
    _add_vocabulary(writer, shape.vocab_size)
    for name, dims in tensors.items():
        writer.add_tensor_info(
            name,
            dims,
            np.dtype(np.float32),  # ignored: raw_dtype says what the bytes are
            _num_bytes(dims, types[name]),
            raw_dtype=types[name],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    alignment = writer.data_alignment
    writer.close()
    rng = np.random.default_rng(_SEED)
    pools = {kind: random_blocks(kind, rng).tobytes() for kind in sorted(set(types.values()))}
    with path.open("ab") as file:
        for name, dims in tensors.items():
            _align(file, alignment)
            if len(dims) == 1:
                file.write(np.ones(dims, dtype=np.float32).tobytes())
                continue
            kind = types[name]
            start = int(rng.integers(100)) * GGML_QUANT_SIZES[kind][1]
            _write_repeated(file, pools[kind], start=start, num_bytes=_num_bytes(dims, kind))
        _align(file, alignment)


def _write_whole(path: Path, shape: ModelConfig, recipe: str) -> None:
    """A file of this name is whole: what is being written has another."""
    unfinished = path.with_suffix(".part")
    try:
        write_model(unfinished, shape, recipe)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _stamp(shape: ModelConfig, recipe: str) -> str:
    return f"{_FORMAT} {recipe} {shape}"


def _is_stamped(path: Path, stamp: str) -> bool:
    if not path.is_file():
        return False
    try:
        with GGUFFile.open(path) as gguf_file:
            return gguf_file.metadata.get(STAMP_KEY) == stamp
    except GGUFFormatError:
        return False


def _num_bytes(dims: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(dims, dtype=np.int64)) // block_size * block_bytes


def _align(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _write_repeated(file: BinaryIO, pool: bytes, *, start: int, num_bytes: int) -> None:
    """The pool from byte `start` on, then all of it again and again."""
    data = memoryview(pool)
    while num_bytes:
        part = data[start : start + num_bytes]
        file.write(part)
        num_bytes -= len(part)
        start = 0


def _add_metadata(writer: GGUFWriter, shape: ModelConfig, recipe: str) -> None:
    writer.add_string(STAMP_KEY, _stamp(shape, recipe))
    writer.add_quantization_version(2)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.ffn_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.rope_dim)
    writer.add_vocab_size(shape.vocab_size)


def _add_vocabulary(writer: GGUFWriter, vocab_size: int) -> None:
    """Every byte, made-up tokens of two and three visible characters, and the control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    made_up = (
        "".join(parts) for length in (2, 3) for parts in itertools.product(visible, repeat=length)
    )
    num_made_up = vocab_size - len(letters) - len(_CONTROL_TOKENS)
    tokens = [*letters, *itertools.islice(made_up, num_made_up), *_CONTROL_TOKENS]
    assert len(tokens) == vocab_size, "a shape's vocabulary holds the bytes and is below 800,000"
    types = [TokenType.NORMAL] * (vocab_size - len(_CONTROL_TOKENS))
    types += [TokenType.CONTROL] * len(_CONTROL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in types])
    writer.add_token_merges([_MERGE])
    writer.add_bos_token_id(vocab_size - 2)
    writer.add_eos_token_id(vocab_size - 1)
