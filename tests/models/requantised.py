"""The demo model with every matrix in a type of choice, and its float32 reference.

Types of 256 weights per block do not divide its 576 columns: for them the model is put into a
wider one that computes the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

from pipeserve.gguf.quants import dequantise
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from tests.models import tiny
from tests.models.block_quantisers import SUPER_BLOCK, Array, quantise

ALL_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "F16", "BF16", "F32"),
)
"""Every type that a card holds in its own size."""


EVERY_LAYER_OF = {Kind.Q2_K: 10}
"""Which layers have their matrices in the type, besides the embedding; else all.

Rounded to two bits throughout, so small a model is led so far astray that it makes more of any
further rounding: with activations in int8 and nothing else rounded its divergence is 0.2.
"""


@dataclass(frozen=True, kw_only=True)
class FloatModel:
    """A Llama model's shape and its float32 tensors under their GGUF names."""

    config: LlamaConfig
    tensors: dict[str, Array]


def read_model(path: Path) -> FloatModel:
    """Dequantise a whole file."""
    with GGUFFile.open(path) as file:
        model = check_model(file)
        tensors = {name: dequantise(info, file.raw(name)) for name, info in file.tensors.items()}
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.context_length,
        rms_norm_eps=model.rms_eps,
        tie_word_embeddings=model.has_tied_head,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        attn_implementation="eager",
    )
    return FloatModel(config=config, tensors=tensors)


def widen(model: FloatModel) -> FloatModel:
    """The same model with rows of a multiple of 256 columns, filled up with zeros.

    More columns of zeros make the mean square of a row smaller by the ratio of the widths, so
    the norms' weights shrink by its root and their eps by itself. The new heads, three to a new kv
    head as before, have zeros for values.
    """
    old = model.config
    hidden_size = -(-old.hidden_size // SUPER_BLOCK) * SUPER_BLOCK
    num_kv_heads = hidden_size // old.head_dim * old.num_key_value_heads // old.num_attention_heads
    ratio = old.hidden_size / hidden_size
    config = LlamaConfig(
        **{
            **old.to_dict(),
            "hidden_size": hidden_size,
            "num_attention_heads": hidden_size // old.head_dim,
            "num_key_value_heads": num_kv_heads,
            "rms_norm_eps": old.rms_norm_eps * ratio,
        },
        attn_implementation="eager",
    )
    sizes = {
        old.hidden_size: hidden_size,
        old.num_key_value_heads * old.head_dim: num_kv_heads * old.head_dim,
    }
    tensors = {}
    for name, values in model.tensors.items():
        scaled = values * np.float32(math.sqrt(ratio)) if "norm" in name else values
        widths = [(0, sizes.get(size, size) - size) for size in values.shape]
        tensors[name] = np.pad(scaled, widths)
    return FloatModel(config=config, tensors=tensors)


def write_in_type(path: Path, model: FloatModel, kind: Kind) -> Path:
    """A file with every vector in float32 and every matrix in this type (but see EVERY_LAYER_OF:
    the others are Q8_0), widened where the type needs that."""
    if gguf.GGML_QUANT_SIZES[kind][0] > 32:
        model = widen(model)
    writer = GGUFWriter(path, "llama")
    tiny.write_metadata(writer, model.config)
    for name, values in model.tensors.items():
        used = Kind.F32 if values.ndim == 1 else _matrix_type(name, kind)
        blocks = quantise(np.atleast_2d(values), used)
        writer.add_tensor(name, blocks.reshape(*values.shape[:-1], -1), raw_dtype=used)
    return tiny.finish(writer, path)


def _matrix_type(name: str, kind: Kind) -> Kind:
    if not name.startswith("blk."):
        return kind
    layer = int(name.split(".")[1])
    return kind if layer % EVERY_LAYER_OF.get(kind, 1) == 0 else Kind.Q8_0


def reference_model(model: FloatModel, device: torch.device) -> LlamaForCausalLM:
    """transformers' Llama with these weights, in float32.

    On a GPU as well: its products there differ from a CPU's by the order of their sums only, as
    long as no matrix library rounds to TF32 first.
    """
    assert torch.get_float32_matmul_precision() == "highest", "no TF32"
    with torch.device(device):
        reference = LlamaForCausalLM(model.config).eval()
    state = transformers_state(model)
    missing = reference.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    return reference


def transformers_state(model: FloatModel) -> dict[str, torch.Tensor]:
    """The tensors under transformers' names, queries and keys in its order of rows."""
    config = model.config
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in tiny.LAYER_NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, values in model.tensors.items():
        if name in tiny.GLOBAL_NAMES:
            state[tiny.GLOBAL_NAMES[name]] = torch.from_numpy(values)
            continue
        _, layer, part = name.split(".", 2)
        num_heads = heads.get(part.removesuffix(".weight"))
        if num_heads is not None:
            values = _halves_from_pairs(values, num_heads)
        state[f"model.layers.{layer}.{names[part]}"] = torch.from_numpy(values)
    return state


def _halves_from_pairs(values: Array, num_heads: int) -> Array:
    """The inverse of tiny.pairs_from_halves."""
    order = tiny.pairs_from_halves(np.arange(values.shape[0]), num_heads)
    return values[np.argsort(order)]
