"""Sizes of kernels in real models: matrices by type, heads, vocabularies. Values only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipeserve.bench.recipes import Q4_K_M, tensor_types
from pipeserve.bench.shapes import SHAPES
from pipeserve.errors import ConfigError
from pipeserve.models.config import ModelConfig

NAMES = ("llama-8b", "llama-70b", "qwen3-30b-a3b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A quantised matrix as a stage multiplies by it."""

    name: str
    num_rows: int
    num_columns: int
    type_name: str
    per_step: int | None
    """How many of them a decode step multiplies by; None where tokens choose (experts)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """What the kernels of one model see, at Q4_K_M."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    """Of one expert, where there are several."""
    vocab_size: int
    matrices: tuple[Matrix, ...]


def kernel_shape(name: str) -> KernelShape:
    """Raises ConfigError where there is none of this name."""
    if name not in NAMES:
        raise ConfigError(f"kernels of the shape {name} are not known; known: {', '.join(NAMES)}")
    return _qwen3_30b_a3b() if name not in SHAPES else _dense(name, SHAPES[name])


def _dense(name: str, shape: ModelConfig) -> KernelShape:
    return KernelShape(
        name=name,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        ffn_size=shape.ffn_size,
        vocab_size=shape.vocab_size,
        matrices=_matrices(shape),
    )


def _matrices(shape: ModelConfig) -> tuple[Matrix, ...]:
    """With neighbours of one type made one matrix, as the loader does."""
    types = {name: kind.name for name, kind in tensor_types(Q4_K_M, shape).items()}
    hidden, kv_size = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    q_size = shape.num_heads * shape.head_dim
    counts: Counter[tuple[str, int, int, str]] = Counter()
    for layer in range(shape.num_layers):
        rows = {"q": q_size, "k": kv_size, "v": kv_size}
        of_layer = {part: types[f"blk.{layer}.attn_{part}.weight"] for part in rows}
        counts.update(_stacked(rows, hidden, of_layer, joint=""))
        counts[("output", hidden, q_size, types[f"blk.{layer}.attn_output.weight"])] += 1
        rows = {"gate": shape.ffn_size, "up": shape.ffn_size}
        of_layer = {part: types[f"blk.{layer}.ffn_{part}.weight"] for part in rows}
        counts.update(_stacked(rows, hidden, of_layer, joint="_"))
        counts[("down", hidden, shape.ffn_size, types[f"blk.{layer}.ffn_down.weight"])] += 1
    counts[("head", shape.vocab_size, hidden, types["output.weight"])] += 1
    return tuple(
        Matrix(
            name=name, num_rows=num_rows, num_columns=num_columns, type_name=kind, per_step=count
        )
        for (name, num_rows, num_columns, kind), count in counts.items()
    )


def _stacked(
    rows: Mapping[str, int], num_columns: int, types: Mapping[str, str], *, joint: str
) -> Iterator[tuple[str, int, int, str]]:
    for type_name, parts in groupby(rows, key=types.__getitem__):
        names: Sequence[str] = list(parts)
        yield joint.join(names), sum(rows[part] for part in names), num_columns, type_name


def _qwen3_30b_a3b() -> KernelShape:
    """Qwen3 30B-A3B: 128 experts, of which a token takes 8; published config.json."""
    hidden, heads, kv_heads, head_dim, ffn_size, vocab = 2048, 32, 4, 128, 768, 151_936
    num_layers, half = 48, 24
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    sizes = (
        ("qkv", q_size + 2 * kv_size, hidden, "Q4_K", half),
        ("qk", q_size + kv_size, hidden, "Q4_K", half),
        ("v", kv_size, hidden, "Q6_K", half),
        ("output", hidden, q_size, "Q4_K", num_layers),
        ("expert_gate_up", 2 * ffn_size, hidden, "Q4_K", None),
        ("expert_down", hidden, ffn_size, "Q4_K", None),
        ("expert_down", hidden, ffn_size, "Q6_K", None),
        ("head", vocab, hidden, "Q6_K", 1),
    )
    return KernelShape(
        name="qwen3-30b-a3b",
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=vocab,
        matrices=tuple(
            Matrix(name=name, num_rows=n, num_columns=k, type_name=kind, per_step=count)
            for name, n, k, kind, count in sizes
        ),
    )
