"""The Llama family (GGUF architecture "llama"): names and shapes of its tensors, and their loading.

Shapes: D model dim, N query heads, K kv heads, H head dim, F feed-forward dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeserve.errors import UnsupportedModelError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.config import ModelConfig, read_config
from pipeserve.models.layers import Decoder, DecoderLayer, Head
from pipeserve.models.linear import GatedLinear, Linear, Matrix, make_embedding, make_head
from pipeserve.models.loader import (
    LayerRange,
    Rows,
    WeightReader,
    form_of,
    fuse,
    fuse_gated,
    read_global_matrix,
)
from pipeserve.models.rotary import rotary_frequencies

Shapes = dict[str, tuple[int, ...]]


def read_llama_config(gguf_file: GGUFFile) -> ModelConfig:
    """Raises GGUFFormatError or UnsupportedModelError, as read_config."""
    num_experts = gguf_file.metadata_int("llama.expert_count", 0)
    if num_experts > 0:
        raise UnsupportedModelError(
            gguf_file.path,
            f"llama.expert_count is {num_experts}; mixtures of experts are not built in",
        )
    return read_config(gguf_file)


def required_tensors(config: ModelConfig) -> Shapes:
    """Every tensor that a Llama model must have, with its shape."""
    shapes = _global_shapes(config)
    for layer in range(config.num_layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes


def optional_tensors(config: ModelConfig) -> Shapes:
    """Tensors that a Llama model may have: biases and Llama 3's frequency divisors."""
    shapes: Shapes = {"rope_freqs.weight": (config.rope_dim // 2,)}
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config).items():
            if len(shape) == 2:
                shapes[f"blk.{layer}.{_bias_name(name)}"] = shape[:1]
    return shapes


def load_llama(config: ModelConfig, layers: LayerRange, weights: WeightReader) -> Decoder:
    """Load one stage's share; errors as WeightReader.tensor."""
    embedding = read_global_matrix(weights, "token_embd.weight") if layers.is_first else None
    return Decoder(
        config=config,
        backend=weights.backend,
        embedding=None if embedding is None else make_embedding(embedding, weights.backend),
        layers=[_load_layer(config, index, weights) for index in range(layers.first, layers.end)],
        head=_load_head(config, weights, embedding) if layers.is_last else None,
        rotary_frequencies=rotary_frequencies(config, weights.optional("rope_freqs.weight")).to(
            weights.device
        ),
    )


def _global_shapes(config: ModelConfig) -> Shapes:
    shapes: Shapes = {
        "token_embd.weight": (config.vocab_size, config.hidden_size),
        "output_norm.weight": (config.hidden_size,),
    }
    if not config.has_tied_head:
        shapes["output.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig) -> Shapes:
    hidden, ffn = config.hidden_size, config.ffn_size
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (config.attention_size, hidden),
        "attn_k.weight": (config.kv_size, hidden),
        "attn_v.weight": (config.kv_size, hidden),
        "attn_output.weight": (hidden, config.attention_size),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (ffn, hidden),
        "ffn_up.weight": (ffn, hidden),
        "ffn_down.weight": (hidden, ffn),
    }


def _bias_name(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "bias"


def _load_layer(config: ModelConfig, index: int, weights: WeightReader) -> DecoderLayer:
    prefix = f"blk.{index}."
    return DecoderLayer(
        attention_norm_D=weights.tensor(f"{prefix}attn_norm.weight"),
        qkv=_load_qkv(config, prefix, weights),
        output=_load_linear(config, weights, f"{prefix}attn_output.weight"),
        ffn_norm_D=weights.tensor(f"{prefix}ffn_norm.weight"),
        gate_up=_load_gated(config, weights, f"{prefix}ffn_gate.weight", f"{prefix}ffn_up.weight"),
        down=_load_linear(config, weights, f"{prefix}ffn_down.weight"),
    )


def _load_qkv(config: ModelConfig, prefix: str, weights: WeightReader) -> Linear:
    parts, biases = _load_rows(weights, [f"{prefix}attn_{part}.weight" for part in "qkv"])
    for index, num_heads in enumerate((config.num_heads, config.num_kv_heads)):
        values = halves_from_pairs(parts[index].values, num_heads, config.rope_dim)
        parts[index] = dataclasses.replace(parts[index], values=values)
        bias = biases[index]
        if bias is not None:
            biases[index] = halves_from_pairs(bias, num_heads, config.rope_dim)
    form = form_of(f"{prefix}attn_q.weight", weights.backend, config.num_layers)
    return fuse(parts, biases, weights.backend, form)


def halves_from_pairs(rows: Tensor, num_heads: int, rope_dim: int) -> Tensor:
    """Undo the row order of attn_q and attn_k, in which the two entries of a rotated pair meet.

    GGUF's converter interleaves them (LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py);
    the rotary kernel takes entry i and entry i + R / 2, as all other families store them. Only
    whole rows move, so quantised blocks move alike.
    """
    heads = rows.view(num_heads, -1, *rows.shape[1:])
    pairs = heads[:, :rope_dim].unflatten(1, (rope_dim // 2, 2))
    halves = pairs.transpose(1, 2).flatten(1, 2)
    return torch.cat((halves, heads[:, rope_dim:]), dim=1).view(rows.shape)


def _load_linear(config: ModelConfig, weights: WeightReader, *names: str) -> Linear:
    form = form_of(names[0], weights.backend, config.num_layers)
    return fuse(*_load_rows(weights, names), weights.backend, form)


def _load_gated(config: ModelConfig, weights: WeightReader, *names: str) -> GatedLinear:
    form = form_of(names[0], weights.backend, config.num_layers)
    return fuse_gated(*_load_rows(weights, names), weights.backend, form)


def _load_rows(
    weights: WeightReader, names: Sequence[str]
) -> tuple[list[Rows], list[Tensor | None]]:
    parts = [weights.rows(name) for name in names]
    return parts, [weights.optional(_bias_name(name)) for name in names]


def _load_head(config: ModelConfig, weights: WeightReader, embedding: Matrix | None) -> Head:
    if not config.has_tied_head:
        output = read_global_matrix(weights, "output.weight")
    elif embedding is not None:
        output = embedding
    else:
        output = read_global_matrix(weights, "token_embd.weight")
    return Head(
        norm_D=weights.tensor("output_norm.weight"),
        output=make_head(output, weights.optional("output.bias"), weights.backend),
    )
