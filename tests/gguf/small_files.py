"""Writes small valid GGUF files, and broken ones, for the tests of the reader."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np

ROWS, COLUMNS = 4, 64


def write_small_gguf(path: Path) -> dict[str, np.ndarray]:
    """A file with every kind of metadata and a few tensors; returns their values in float32."""
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_uint8("small.uint8", 200)
    writer.add_int8("small.int8", -100)
    writer.add_uint64("small.uint64", 2**63)
    writer.add_float32("small.float32", 0.5)
    writer.add_float64("small.float64", 0.25)
    writer.add_bool("small.bool", True)
    writer.add_string("small.text", "grüße 🙂")
    writer.add_array("small.numbers", [1, 2, 3])
    writer.add_array("small.bools", [True, False])
    writer.add_array("small.texts", ["a", "", "ß"])
    writer.add_array("small.nested", [["a", "b"], ["c"]])
    values = {}
    rng = np.random.default_rng(1)
    for name, kind in (
        ("weights.q8", gguf.GGMLQuantizationType.Q8_0),
        ("weights.q4", gguf.GGMLQuantizationType.Q4_0),
        ("weights.f32", gguf.GGMLQuantizationType.F32),
    ):
        weights = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
        blocks = gguf.quants.quantize(weights, kind)
        values[name] = gguf.quants.dequantize(blocks, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.add_tensor("bias.f32", np.arange(COLUMNS, dtype=np.float32))
    values["bias.f32"] = np.arange(COLUMNS, dtype=np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def entry(key: str, value_type: gguf.GGUFValueType, value: bytes) -> bytes:
    """One metadata entry as it lies in the file."""
    return text(key) + struct.pack("<I", value_type) + value


def array(element_type: gguf.GGUFValueType, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", element_type, count) + values


def tensor(
    name: str,
    *,
    dimensions: tuple[int, ...] = (32,),
    tensor_type: int = gguf.GGMLQuantizationType.F32,
    offset: int = 0,
) -> bytes:
    """One line of the tensor table as it lies in the file."""
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", tensor_type, offset)


def raw_gguf(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    metadata: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    num_metadata: int | None = None,
    num_tensors: int | None = None,
    data: bytes = bytes(4096),
) -> bytes:
    """A whole file put together by hand, counts true unless told otherwise."""
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(metadata) if num_metadata is None else num_metadata,
    )
    header += b"".join(metadata) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data
