"""Shapes of real models, for synthetic files of their size. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pipeserve.errors import ConfigError
from pipeserve.models.config import ModelConfig


def _llama(
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    ffn_size: int,
    vocab_size: int,
    context_length: int,
    rope_theta: float,
    has_tied_head: bool,
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        context_length=context_length,
        rms_eps=1e-5,
        rope_theta=rope_theta,
        rope_dim=head_dim,
        rope_scaling=None,
        has_tied_head=has_tied_head,
    )


SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-8b": _llama(
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            ffn_size=14336,
            vocab_size=128256,
            context_length=131072,
            rope_theta=500000.0,
            has_tied_head=False,
        ),
        "llama-70b": _llama(
            num_layers=80,
            hidden_size=8192,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            ffn_size=28672,
            vocab_size=128256,
            context_length=131072,
            rope_theta=500000.0,
            has_tied_head=False,
        ),
        "llama-1b": _llama(
            num_layers=16,
            hidden_size=2048,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            ffn_size=8192,
            vocab_size=128256,
            context_length=131072,
            rope_theta=500000.0,
            has_tied_head=True,
        ),
        "smollm-135m": _llama(
            num_layers=30,
            hidden_size=576,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            ffn_size=1536,
            vocab_size=49152,
            context_length=8192,
            rope_theta=100000.0,
            has_tied_head=True,
        ),
        "tiny": _llama(
            num_layers=8,
            hidden_size=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            ffn_size=512,
            vocab_size=1024,
            context_length=2048,
            rope_theta=10000.0,
            has_tied_head=True,
        ),
    }
)
"""Llama 3.1 8B and 70B, Llama 3.2 1B and SmolLM2 135M (the demo model) as their published
config.json files have them, without Llama 3's frequency divisors; tiny is nobody's."""


def find_shape(name: str) -> ModelConfig:
    """Raises ConfigError where there is no shape of this name."""
    shape = SHAPES.get(name)
    if shape is None:
        raise ConfigError(f"the shape {name} is not built in; known are {', '.join(SHAPES)}")
    return shape
