"""Parses and checks the header of one GGUF file: metadata, tensor table, where the data lies.

Trusts nothing in the file: every count and offset is checked against the file's size before it is
used. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from pipeserve.errors import GGUFFormatError

MetadataValue = bool | int | float | str | list[Any] | npt.NDArray[Any]
"""A metadata value: arrays of numbers are numpy arrays, arrays of strings or arrays are lists."""

MAX_HEADER_BYTES = 128 * 1024**2
"""Far above any real header (a 262k vocabulary takes 6 MB): bounds the work on a broken file."""

MAX_DIMENSIONS = 4
MAX_ARRAY_DEPTH = 4

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SMALLEST_METADATA_ENTRY = 8 + 4 + 1
_SMALLEST_TENSOR_ENTRY = 8 + 4 + 8 + 4 + 8

_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("<u1"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of the file; its bytes come from GGUFFile.raw."""

    name: str
    shape: tuple[int, ...]
    """In torch's order, rows first: the reverse of the order in the file."""
    type: GGMLQuantizationType
    num_bytes: int
    shard: Path
    """The file that holds it."""
    offset: int
    """Bytes from the start of that file."""

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What one file says before its tensor data begins."""

    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]


def parse_header(path: Path, data: memoryview) -> Header:
    """Read and check the header of the file at `path`, whose bytes are `data`.

    Raises:
        GGUFFormatError: not a GGUF file, truncated, or inconsistent in itself.
    """
    cursor = _Cursor(path, data)
    _check_magic_and_version(cursor)
    num_tensors = cursor.unsigned64("the number of tensors")
    num_entries = cursor.unsigned64("the number of metadata entries")
    cursor.require(num_entries * _SMALLEST_METADATA_ENTRY, f"{num_entries} metadata entries")
    metadata = _read_metadata(cursor, num_entries)
    cursor.require(num_tensors * _SMALLEST_TENSOR_ENTRY, f"{num_tensors} tensors")
    tensors = _read_tensor_table(cursor, num_tensors)
    alignment = _alignment(path, metadata)
    data_start = math.ceil(cursor.position / alignment) * alignment
    return Header(
        metadata=metadata,
        tensors=_place_tensors(path, tensors, data_start, alignment, len(data)),
    )


class _Cursor:
    """A position in the file's bytes that cannot pass their end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.position = 0
        self._data = data[:MAX_HEADER_BYTES]
        self._file_size = len(data)

    def error(self, problem: str) -> GGUFFormatError:
        return GGUFFormatError(self.path, problem)

    def require(self, num_bytes: int, what: str) -> None:
        """Raise unless `num_bytes` more bytes can be read for `what`."""
        if num_bytes <= len(self._data) - self.position:
            return
        if len(self._data) < self._file_size:
            raise self.error(f"{what} would make the header larger than {MAX_HEADER_BYTES} bytes")
        raise self.error(
            f"the file ends inside {what}: {num_bytes} bytes are needed at byte {self.position}, "
            f"the file has {self._file_size}; fetch it again"
        )

    def take(self, num_bytes: int, what: str) -> memoryview:
        self.require(num_bytes, what)
        start, self.position = self.position, self.position + num_bytes
        return self._data[start : self.position]

    def unsigned32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def unsigned64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        length = self.unsigned64(what)
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 text: {error.reason}") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings; a loop of its own, since a vocabulary holds hundreds of thousands."""
        self.require(count * 8, what)
        unpack = struct.Struct("<Q").unpack_from
        data, entry = self._data, self.position
        texts: list[str] = []
        try:
            for _ in range(count):
                start = entry + 8
                end = start + unpack(data, entry)[0]
                if end > len(data):
                    break
                texts.append(str(data[start:end], "utf-8"))
                entry = end
        except (struct.error, UnicodeDecodeError):
            pass
        self.position = entry
        if len(texts) < count:
            self.string(f"entry {len(texts)} of {what}")  # raises, and knows what is wrong
        return texts


def _check_magic_and_version(cursor: _Cursor) -> None:
    if cursor.take(4, "the magic number") != _MAGIC:
        raise cursor.error("is not a GGUF file: it does not begin with the letters GGUF")
    version = cursor.unsigned32("the version")
    if version in _VERSIONS:
        return
    if version & 0xFFFF == 0:
        raise cursor.error("is a big-endian GGUF; convert the model again for a little-endian host")
    raise cursor.error(
        f"has GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} can be read"
    )


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(count):
        key = cursor.string(f"the key of metadata entry {index}")
        if key in metadata:
            raise cursor.error(f"the metadata key {key} occurs twice")
        value_type = cursor.unsigned32(f"the type of {key}")
        metadata[key] = _read_value(cursor, key, value_type, depth=0)
    return metadata


def _read_value(cursor: _Cursor, key: str, value_type: int, *, depth: int) -> MetadataValue:
    if value_type == GGUFValueType.STRING:
        return cursor.string(key)
    if value_type == GGUFValueType.ARRAY:
        return _read_array(cursor, key, depth=depth + 1)
    if value_type not in _SCALARS:
        raise cursor.error(f"the metadata key {key} has the unknown type {value_type}")
    value = _read_numbers(cursor, key, GGUFValueType(value_type), 1)[0].item()
    assert isinstance(value, bool | int | float)
    return value


def _read_array(cursor: _Cursor, key: str, *, depth: int) -> MetadataValue:
    if depth > MAX_ARRAY_DEPTH:
        raise cursor.error(f"the arrays of {key} are nested more than {MAX_ARRAY_DEPTH} deep")
    element_type = cursor.unsigned32(f"the element type of {key}")
    count = cursor.unsigned64(f"the length of {key}")
    if element_type == GGUFValueType.STRING:
        return cursor.strings(count, key)
    if element_type == GGUFValueType.ARRAY:
        cursor.require(count * (4 + 8), key)
        return [_read_array(cursor, key, depth=depth + 1) for _ in range(count)]
    if element_type not in _SCALARS:
        raise cursor.error(f"the array {key} has the unknown element type {element_type}")
    return _read_numbers(cursor, key, GGUFValueType(element_type), count)


def _read_numbers(
    cursor: _Cursor, key: str, value_type: GGUFValueType, count: int
) -> npt.NDArray[Any]:
    dtype = _SCALARS[value_type]
    numbers = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype=dtype)
    # Copies, so that no metadata keeps the file mapped.
    return numbers != 0 if value_type == GGUFValueType.BOOL else numbers.copy()


def _read_tensor_table(cursor: _Cursor, count: int) -> list[TensorInfo]:
    """The table as written: offsets still count from the start of the tensor data."""
    tensors = []
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}")
        num_dimensions = cursor.unsigned32(f"the dimensions of tensor {name}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise cursor.error(
                f"tensor {name} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible"
            )
        dimensions = [cursor.unsigned64(f"the shape of {name}") for _ in range(num_dimensions)]
        tensor_type = _tensor_type(cursor, name, cursor.unsigned32(f"the type of {name}"))
        tensors.append(
            TensorInfo(
                name=name,
                shape=tuple(reversed(dimensions)),
                type=tensor_type,
                num_bytes=_num_bytes(cursor.error, name, dimensions, tensor_type),
                shard=cursor.path,
                offset=cursor.unsigned64(f"the offset of {name}"),
            )
        )
    return tensors


def _tensor_type(cursor: _Cursor, name: str, raw_type: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(raw_type)
    except ValueError:
        raise cursor.error(
            f"tensor {name} has type {raw_type}, which the installed gguf package does not know"
        ) from None


def _num_bytes(
    error: Callable[[str], GGUFFormatError],
    name: str,
    dimensions: list[int],
    tensor_type: GGMLQuantizationType,
) -> int:
    block_size, bytes_per_block = GGML_QUANT_SIZES[tensor_type]
    if 0 in dimensions:
        raise error(f"tensor {name} has an empty dimension: {dimensions}")
    if dimensions[0] % block_size:
        raise error(
            f"tensor {name} has rows of {dimensions[0]} values, which is no multiple of "
            f"{tensor_type.name}'s block of {block_size}"
        )
    return math.prod(dimensions) // block_size * bytes_per_block


def _alignment(path: Path, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    is_power_of_two = (
        isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    )
    if not is_power_of_two:
        raise GGUFFormatError(path, f"general.alignment is {alignment!r}, not a power of two")
    assert isinstance(alignment, int)
    return alignment


def _place_tensors(
    path: Path, tensors: list[TensorInfo], data_start: int, alignment: int, file_size: int
) -> dict[str, TensorInfo]:
    """The table with offsets from the start of the file, each tensor inside it and on its own."""
    placed: dict[str, TensorInfo] = {}
    previous_end, previous_name = data_start, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        name, start = tensor.name, data_start + tensor.offset
        if name in placed:
            raise GGUFFormatError(path, f"the tensor {name} occurs twice")
        if tensor.offset % alignment:
            raise GGUFFormatError(path, f"tensor {name} is not aligned to {alignment} bytes")
        if start + tensor.num_bytes > file_size:
            raise GGUFFormatError(
                path,
                f"the file ends inside tensor {name}: it takes bytes {start} to "
                f"{start + tensor.num_bytes}, the file has {file_size}; fetch it again",
            )
        if start < previous_end:
            raise GGUFFormatError(path, f"the tensors {previous_name} and {name} overlap")
        previous_end, previous_name = start + tensor.num_bytes, name
        placed[name] = replace(tensor, offset=start)
    return {tensor.name: placed[tensor.name] for tensor in tensors}
