"""Recipes: which quantisation each tensor of a Llama file gets. Names and shapes only, no data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pipeserve.errors import ConfigError
from pipeserve.models.config import ModelConfig
from pipeserve.models.llama import required_tensors

Kind = GGMLQuantizationType

Q4_K_M = "q4_k_m"

PURE_TYPES: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name.lower(): kind
        for kind in (
            *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
            *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
            *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4, Kind.F16, Kind.BF16, Kind.F32),
        )
    }
)
"""Recipes that give every matrix one type, the embedding and the output head too."""

RECIPES = (Q4_K_M, *PURE_TYPES)

_FALLBACKS: Mapping[Kind, Kind] = MappingProxyType(
    {
        Kind.Q2_K: Kind.Q4_0,
        Kind.Q3_K: Kind.Q4_0,
        Kind.Q4_K: Kind.Q5_0,
        Kind.Q5_K: Kind.Q5_1,
        Kind.Q6_K: Kind.Q8_0,
        Kind.IQ4_XS: Kind.IQ4_NL,
    }
)
"""For rows that are no multiple of 256 weights (tensor_type_fallback of llama.cpp)."""

_NUM_LAYERS_70B = 80
"""llama.cpp takes a Llama of this many layers for the 70B model."""


def tensor_types(recipe: str, shape: ModelConfig) -> dict[str, Kind]:
    """The type of every tensor that a Llama of this shape must have; vectors stay F32.

    Raises:
        ConfigError: there is no such recipe, or a matrix has no type of it that fits its rows.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"the recipe {recipe} is not built in; known are {', '.join(RECIPES)}")
    types: dict[str, Kind] = {}
    for name, dimensions in required_tensors(shape).items():
        if len(dimensions) == 1:
            types[name] = Kind.F32
            continue
        wanted = _q4_k_m_type(name, shape) if recipe == Q4_K_M else PURE_TYPES[recipe]
        types[name] = _fitting(wanted, name, num_columns=dimensions[1])
    return types


def use_more_bits(layer: int, num_layers: int) -> bool:
    """The layers whose attn_v and ffn_down are more precise: the first and the last eighth, and
    every third in between (use_more_bits of llama.cpp's src/llama-quant.cpp)."""
    eighth = num_layers // 8
    is_outer = layer < eighth or layer >= 7 * num_layers // 8
    return is_outer or (layer - eighth) % 3 == 2


def _q4_k_m_type(name: str, shape: ModelConfig) -> Kind:
    """What llama_tensor_get_type_impl of llama.cpp's src/llama-quant.cpp decides for Q4_K_M."""
    head = "token_embd.weight" if shape.has_tied_head else "output.weight"
    if name == head:
        return Kind.Q6_K
    if not name.endswith(("attn_v.weight", "ffn_down.weight")):
        return Kind.Q4_K
    if use_more_bits(int(name.split(".")[1]), shape.num_layers):
        return Kind.Q6_K
    is_70b_value = name.endswith("attn_v.weight") and shape.num_layers == _NUM_LAYERS_70B
    return Kind.Q5_K if is_70b_value else Kind.Q4_K


def _fitting(wanted: Kind, name: str, *, num_columns: int) -> Kind:
    kind = _FALLBACKS.get(wanted, wanted) if num_columns % _block_size(wanted) else wanted
    if num_columns % _block_size(kind):
        raise ConfigError(
            f"{name} has rows of {num_columns} weights, no multiple of {kind.name}'s block of "
            f"{_block_size(kind)}; take another shape, or the recipe f16"
        )
    return kind


def _block_size(kind: Kind) -> int:
    return GGML_QUANT_SIZES[kind][0]
