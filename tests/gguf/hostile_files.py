"""A whole small model as a file of bytes, of which every part can be made hostile."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import gguf

from tests.gguf.small_files import array, entry, raw_gguf, tensor, text
from tests.text.small_vocabularies import byte_letters

Kind = gguf.GGUFValueType

SIZE, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 4, 2, 8, 32
TOKENS = [*byte_letters(), "<|im_start|>", "<|im_end|>", "he", "<unk>"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

Entries = dict[str, bytes]
Tensors = dict[str, tuple[int, ...]]


def uint32(value: int) -> tuple[Kind, bytes]:
    return Kind.UINT32, struct.pack("<I", value)


def uint64(value: int) -> tuple[Kind, bytes]:
    return Kind.UINT64, struct.pack("<Q", value)


def int32(value: int) -> tuple[Kind, bytes]:
    return Kind.INT32, struct.pack("<i", value)


def float32(value: float) -> tuple[Kind, bytes]:
    return Kind.FLOAT32, struct.pack("<f", value)


def string(value: str) -> tuple[Kind, bytes]:
    return Kind.STRING, text(value)


def strings(values: list[str]) -> tuple[Kind, bytes]:
    return Kind.ARRAY, array(Kind.STRING, len(values), b"".join(map(text, values)))


def numbers(kind: Kind, form: str, values: list[float]) -> tuple[Kind, bytes]:
    return Kind.ARRAY, array(kind, len(values), struct.pack(f"<{len(values)}{form}", *values))


def metadata() -> dict[str, tuple[Kind, bytes]]:
    """Of a model that can be served."""
    types = [1] * 256 + [3, 3, 1, 2]
    return {
        "general.architecture": string("llama"),
        "llama.block_count": uint32(1),
        "llama.context_length": uint32(64),
        "llama.embedding_length": uint32(SIZE),
        "llama.feed_forward_length": uint32(FFN),
        "llama.attention.head_count": uint32(HEADS),
        "llama.attention.head_count_kv": uint32(KV_HEADS),
        "llama.attention.key_length": uint32(HEAD_DIM),
        "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
        "llama.rope.freq_base": float32(10000.0),
        "llama.rope.dimension_count": uint32(HEAD_DIM),
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("smollm"),
        "tokenizer.ggml.tokens": strings(TOKENS),
        "tokenizer.ggml.token_type": numbers(Kind.INT32, "i", types),
        "tokenizer.ggml.scores": numbers(Kind.FLOAT32, "f", [0.0] * len(TOKENS)),
        "tokenizer.ggml.merges": strings(["h e"]),
        "tokenizer.ggml.bos_token_id": uint32(256),
        "tokenizer.ggml.eos_token_id": uint32(257),
        "tokenizer.chat_template": string(TEMPLATE),
    }


def tensors(num_layers: int = 1) -> Tensors:
    """Name -> dimensions in the file's order."""
    shapes: Tensors = {"token_embd.weight": (SIZE, len(TOKENS)), "output_norm.weight": (SIZE,)}
    for layer in range(num_layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (SIZE,),
                "attn_q": (SIZE, HEADS * HEAD_DIM),
                "attn_k": (SIZE, KV_HEADS * HEAD_DIM),
                "attn_v": (SIZE, KV_HEADS * HEAD_DIM),
                "attn_output": (HEADS * HEAD_DIM, SIZE),
                "ffn_norm": (SIZE,),
                "ffn_gate": (SIZE, FFN),
                "ffn_up": (SIZE, FFN),
                "ffn_down": (FFN, SIZE),
            }.items()
        }
    return shapes


def model_bytes(
    changes: Mapping[str, tuple[Kind, bytes] | None] | None = None,
    shapes: Tensors | None = None,
) -> bytes:
    """The file, with metadata changed or (None) left out, and other tensors."""
    values = {**metadata(), **(changes or {})}
    entries = tuple(entry(key, *value) for key, value in values.items() if value is not None)
    table, offset = [], 0
    for name, dimensions in (tensors() if shapes is None else shapes).items():
        table.append(tensor(name, dimensions=dimensions, offset=offset))
        num_values = 1
        for size in dimensions:
            num_values *= size
        offset += -(-num_values * 4 // 32) * 32
    return raw_gguf(metadata=entries, tensors=tuple(table), data=bytes(offset))
