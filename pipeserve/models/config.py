"""ModelConfig: a decoder's shape, read from GGUF metadata. No tensor is touched here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeserve.errors import GGUFFormatError, UnsupportedModelError
from pipeserve.gguf.reader import GGUFFile


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions are divided by factor (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Low frequencies are divided by factor, high ones kept (Peng et al., arXiv 2309.00071)."""

    factor: float
    original_context_length: int
    """What the model was trained for before it was extended."""
    beta_fast: float
    """Frequencies that turn more often than this within the original context are kept."""
    beta_slow: float
    """Frequencies that turn less often than this are divided by the whole factor."""
    attention_factor: float
    """Multiplies the model's own scale of queries and keys, 0.1 ln(factor) + 1."""


RopeScaling = LinearScaling | YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder, the same for every layer."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    """Tokens of context that the model was trained for."""
    rms_eps: float
    rope_theta: float
    rope_dim: int
    """Leading entries of a head that are rotated; the rest pass unchanged."""
    rope_scaling: RopeScaling | None
    """Llama 3's scaling is not here: the file brings its divisors as a tensor (rope_freqs)."""
    has_tied_head: bool
    """The output head is the embedding."""

    @property
    def attention_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim


def read_config(gguf_file: GGUFFile) -> ModelConfig:
    """Read the keys that dense decoders with RMSNorm, rotary positions and GQA have in common.

    Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        GGUFFormatError: a key is missing, or values contradict each other.
        UnsupportedModelError: the file asks for something that is not built in.
    """
    arch = gguf_file.metadata_str("general.architecture")
    hidden_size = _positive(gguf_file, f"{arch}.embedding_length")
    num_heads = _per_layer(gguf_file, f"{arch}.attention.head_count")
    num_kv_heads = _per_layer(gguf_file, f"{arch}.attention.head_count_kv", num_heads)
    head_dim = _positive(gguf_file, f"{arch}.attention.key_length", hidden_size // num_heads)
    embedding = gguf_file.tensors.get("token_embd.weight")
    config = ModelConfig(
        architecture=arch,
        num_layers=_positive(gguf_file, f"{arch}.block_count"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=_per_layer(gguf_file, f"{arch}.feed_forward_length"),
        vocab_size=_vocab_size(gguf_file, embedding.shape[0] if embedding else None),
        context_length=_positive(gguf_file, f"{arch}.context_length"),
        rms_eps=_above_0(gguf_file, f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=_above_0(gguf_file, f"{arch}.rope.freq_base", 10000.0),
        rope_dim=_positive(gguf_file, f"{arch}.rope.dimension_count", head_dim),
        rope_scaling=_rope_scaling(gguf_file, arch),
        has_tied_head="output.weight" not in gguf_file.tensors,
    )
    _check_heads(gguf_file, config)
    return config


def _check_heads(gguf_file: GGUFFile, config: ModelConfig) -> None:
    arch, path = config.architecture, gguf_file.path
    if config.num_heads % config.num_kv_heads:
        raise GGUFFormatError(
            path,
            f"{arch}.attention.head_count is {config.num_heads}, no multiple of "
            f"{arch}.attention.head_count_kv, {config.num_kv_heads}",
        )
    if config.rope_dim % 2 or config.rope_dim > config.head_dim:
        raise GGUFFormatError(
            path,
            f"{arch}.rope.dimension_count is {config.rope_dim}; it must be even and at most the "
            f"size of a head, {config.head_dim}",
        )
    value_dim = gguf_file.metadata_int(f"{arch}.attention.value_length", config.head_dim)
    if value_dim != config.head_dim:
        raise UnsupportedModelError(
            path,
            f"{arch}.attention.value_length is {value_dim} and key_length {config.head_dim}; "
            "only equal ones are built in",
        )


def _vocab_size(gguf_file: GGUFFile, embedding_rows: int | None) -> int:
    """Rows of the embedding; where that is missing, what the tokenizer says."""
    if embedding_rows is not None:
        return embedding_rows
    return len(gguf_file.metadata_strings("tokenizer.ggml.tokens"))


def _positive(gguf_file: GGUFFile, key: str, default: int | None = None) -> int:
    value = gguf_file.metadata_int(key, default)
    if value < 1:
        raise GGUFFormatError(gguf_file.path, f"{key} is {value}; it must be at least 1")
    return value


def _above_0(gguf_file: GGUFFile, key: str, default: float | None = None) -> float:
    value = gguf_file.metadata_float(key, default)
    if not 0.0 < value < math.inf:  # NaN is neither
        raise GGUFFormatError(
            gguf_file.path, f"{key} is {value}; it must be a finite number above 0"
        )
    return value


def _per_layer(gguf_file: GGUFFile, key: str, default: int | None = None) -> int:
    """A count that the file may also give layer by layer; only equal ones are built in."""
    value = gguf_file.metadata.get(key)
    if not isinstance(value, np.ndarray):
        return _positive(gguf_file, key, default)
    if value.dtype.kind not in "iu" or value.size == 0:
        raise GGUFFormatError(gguf_file.path, f"{key} has values that are not whole numbers")
    if value.min() != value.max():
        counts = np.unique(value)[:8].tolist()
        raise UnsupportedModelError(
            gguf_file.path, f"{key} differs between layers ({counts}); that is not built in"
        )
    count = int(value[0])
    if count < 1:
        raise GGUFFormatError(gguf_file.path, f"{key} is {count}; it must be at least 1")
    return count


def _rope_scaling(gguf_file: GGUFFile, arch: str) -> RopeScaling | None:
    prefix = f"{arch}.rope.scaling"
    legacy_factor = _above_0(gguf_file, f"{arch}.rope.scale_linear", 1.0)
    factor = _above_0(gguf_file, f"{prefix}.factor", legacy_factor)
    kind = gguf_file.metadata_str(f"{prefix}.type", "none" if factor == 1.0 else "linear")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearScaling(factor=factor)
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original_context_length=_positive(gguf_file, f"{prefix}.original_context_length"),
            beta_fast=_above_0(gguf_file, f"{prefix}.yarn_beta_fast", 32.0),
            beta_slow=_above_0(gguf_file, f"{prefix}.yarn_beta_slow", 1.0),
            attention_factor=_above_0(gguf_file, f"{prefix}.yarn_attn_factor", 1.0),
        )
    raise UnsupportedModelError(
        gguf_file.path, f"{prefix}.type is {kind}; built in are none, linear and yarn"
    )
