"""Tiny random Llama models: the same weights as a GGUF file and as a transformers model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

Array = np.ndarray

ENOUGH_BLOCKS = 400
"""Different blocks per random matrix; more would only take longer to find."""

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(**changes: object) -> LlamaConfig:
    """A model of three small layers, with some fields changed."""
    values = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        # Far above a trained model's: random logits must differ, and attention must not be flat.
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**values, **changes})


def random_llama(config: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    """Random float32 weights, norms and biases too."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    tokens: int | None = None,
    without: tuple[str, ...] = (),
    replaced: dict[str, Array] | None = None,
    metadata: dict[str, object] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write the model as a converter would. The keyword arguments make the file wrong on purpose:
    another number of tokens, tensors left out or replaced, metadata added or changed."""
    writer = GGUFWriter(path, architecture)
    write_metadata(writer, model.config, tokens=tokens, changes=metadata or {})
    tensors = gguf_tensors(model) | (replaced or {})
    for name, values in tensors.items():
        if name not in without:
            writer.add_tensor(name, np.ascontiguousarray(values))
    return finish(writer, path)


def finish(writer: GGUFWriter, path: Path) -> Path:
    """Write what the writer holds."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(
    writer: GGUFWriter,
    config: LlamaConfig,
    *,
    tokens: int | None = None,
    changes: dict[str, object] | None = None,
) -> None:
    """The keys that llama.cpp's converter writes."""
    rope = config.rope_parameters
    values: dict[str, object] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": rope["rope_theta"],
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values["llama.rope.scaling.type"] = rope["rope_type"]
        values["llama.rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        values["llama.rope.scaling.original_context_length"] = original
    values |= changes or {}
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(tokens or config.vocab_size)])


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, Array]:
    """All tensors under their GGUF names, queries and keys in GGUF's order of rows."""
    config, state = model.config, model.state_dict()
    names = dict(GLOBAL_NAMES)
    if config.tie_word_embeddings:
        del names["output.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"blk.{layer}.{ours}.{kind}"] = f"model.layers.{layer}.{theirs}.{kind}"
    tensors = {ours: state[theirs].numpy() for ours, theirs in names.items() if theirs in state}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, values in tensors.items():
        for part, num_heads in heads.items():
            if f".{part}." in name:
                tensors[name] = pairs_from_halves(values, num_heads)
    divisors = llama3_divisors(config)
    return tensors if divisors is None else tensors | {"rope_freqs.weight": divisors}


def pairs_from_halves(values: Array, num_heads: int) -> Array:
    """What the converter does to queries and keys: row j of the first half, row j of the second."""
    half = values.shape[0] // num_heads // 2
    order = [
        head * 2 * half + side * half + index
        for head in range(num_heads)
        for index in range(half)
        for side in range(2)
    ]
    return values[order]


def llama3_divisors(config: LlamaConfig) -> Array | None:
    """The tensor rope_freqs of a Llama 3 file: one divisor per pair of a head."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for index in range(config.head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * index / config.head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1.0 / ((1.0 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def random_blocks(
    shape: tuple[int, int], kind: GGMLQuantizationType, rng: np.random.Generator
) -> Array:
    """Raw bytes of a random matrix in a type: random blocks whose values are of sane size."""
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
        values = rng.normal(0.0, 0.1, shape).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_wanted = shape[0] * shape[1] // block_size
    found = np.empty((0, block_bytes), dtype=np.uint8)
    while len(found) < min(num_wanted, ENOUGH_BLOCKS):
        blocks = rng.integers(0, 256, (8192, block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(blocks, kind)
            largest = np.abs(values).max(axis=1)
        sane = np.isfinite(values).all(axis=1) & (largest < 0.5) & (largest > 0.01)
        found = np.concatenate((found, blocks[sane]))
    chosen = rng.choice(len(found), num_wanted, replace=num_wanted > len(found))
    return found[chosen].reshape(shape[0], -1)
