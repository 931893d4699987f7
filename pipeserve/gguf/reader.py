"""GGUFFile: a checked, memory-mapped GGUF file, or all files of a sharded set.

Nothing of a tensor is read before its bytes are touched or asked for, so each stage pays for its
own only.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from pipeserve.errors import GGUFFormatError, MissingTensorError
from pipeserve.gguf.header import Header, MetadataValue, TensorInfo, parse_header

_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

Value = TypeVar("Value")
_Maps = Mapping[Path, npt.NDArray[np.uint8]]


class GGUFFile:
    """Metadata and tensors of a model file. Immutable; may be read from any thread.

    Views that `raw` gave out stay valid after `close`.
    """

    def __init__(self, *, path: Path, headers: Mapping[Path, Header], maps: _Maps) -> None:
        """Use GGUFFile.open; `headers` and `maps` hold one entry per shard, in order."""
        self.path = path
        self.metadata: Mapping[str, MetadataValue] = MappingProxyType(headers[path].metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge_tensors(headers))
        self.file_size = sum(data.size for data in maps.values())
        """Bytes of all shards together."""
        self._maps = maps
        self._files: dict[Path, int] = {}
        self._files_lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Map the file at `path`; of a sharded set (-00001-of-0000N.gguf) all N files.

        Raises:
            GGUFFormatError: a file is missing, unreadable, broken, or not the shard it should be.
        """
        path = Path(path)
        shards = _shard_paths(path)
        maps = {shard: _map_file(shard) for shard in shards}
        headers = {shard: parse_header(shard, maps[shard].data) for shard in shards}
        _check_shards(shards, headers)
        return cls(path=path, headers=headers, maps=maps)

    def close(self) -> None:
        """Let go of the files; the system unmaps them when the last view is gone."""
        self._maps = {}
        with self._files_lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [rows, bytes per row]: a read-only view of the mapped file.

        Raises:
            MissingTensorError: the file has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise MissingTensorError(self.path, f"lacks the tensor {name}")
        assert self._maps, "the file was closed"
        data = self._maps[info.shard][info.offset : info.offset + info.num_bytes]
        return data.reshape(info.num_rows, -1)

    def read_into(self, name: str, first_byte: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `first_byte` on, past the mapping.

        The GIL is free meanwhile, and no page fault stands between the disk and the buffer.

        Raises:
            GGUFFormatError: the file cannot be read, or has become shorter since it was opened.
        """
        info = self.tensors[name]
        assert 0 <= first_byte <= info.num_bytes - len(buffer), f"{name} has {info.num_bytes} bytes"
        offset, filled = info.offset + first_byte, 0
        try:
            descriptor = self._descriptor(info.shard)
            while filled < len(buffer):
                count = os.preadv(descriptor, [buffer[filled:]], offset + filled)
                if count == 0:
                    raise GGUFFormatError(
                        info.shard,
                        f"ends inside the tensor {name}, at byte {offset + filled}; it has become "
                        "shorter since it was opened, fetch it again",
                    )
                filled += count
        except OSError as error:
            raise GGUFFormatError(info.shard, f"cannot be read: {error.strerror}") from None

    def _descriptor(self, shard: Path) -> int:
        with self._files_lock:
            assert self._maps, "the file was closed"
            if shard not in self._files:
                self._files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[shard]

    def metadata_int(self, key: str, default: int | None = None) -> int:
        """An integer; `default` where the key is absent.

        Raises:
            GGUFFormatError: the value is of another type, or absent and there is no default.
        """
        return self._typed(key, int, default)

    def metadata_float(self, key: str, default: float | None = None) -> float:
        """A number, as metadata_int."""
        value = self.metadata.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return self._typed(key, float, default)

    def metadata_bool(self, key: str, default: bool | None = None) -> bool:
        """A truth value, as metadata_int."""
        return self._typed(key, bool, default)

    def metadata_str(self, key: str, default: str | None = None) -> str:
        """A text, as metadata_int."""
        return self._typed(key, str, default)

    def metadata_strings(self, key: str) -> list[str]:
        """An array of texts, as metadata_int."""
        values = self._typed(key, list, None)
        if not all(isinstance(value, str) for value in values):
            raise GGUFFormatError(self.path, f"the metadata key {key} is not an array of texts")
        return values

    def metadata_array(self, key: str) -> npt.NDArray[Any]:
        """An array of numbers, as metadata_int."""
        return self._typed(key, np.ndarray, None)

    def _typed(self, key: str, kind: type[Value], default: Value | None) -> Value:
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                raise GGUFFormatError(self.path, f"lacks the metadata key {key}")
            return default
        # bool is a subclass of int, but a truth value is no number here.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise GGUFFormatError(
                self.path,
                f"the metadata key {key} is of type {type(value).__name__}, not {kind.__name__}",
            )
        return value


def _shard_paths(path: Path) -> list[Path]:
    """All files of the set that `path` begins; just itself where its name is no shard's."""
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    names = [f"{match['stem']}-{index:05}-of-{count:05}.gguf" for index in range(1, count + 1)]
    if number != 1 or count < 1:
        raise GGUFFormatError(path, f"is named shard {number} of {count}; give the first shard")
    return [path.with_name(name) for name in names]


def _map_file(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:
            raise GGUFFormatError(path, "is empty; fetch it again")
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise GGUFFormatError(path, f"cannot be read: {error.strerror}") from None


def _check_shards(shards: list[Path], headers: Mapping[Path, Header]) -> None:
    """Compare what each file says about its place in the set (split.no, split.count)."""
    for index, shard in enumerate(shards):
        metadata = headers[shard].metadata
        count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
        is_whole = isinstance(count, int) and count <= 1 and len(shards) == 1
        is_in_place = (
            isinstance(count, int)
            and isinstance(number, int)
            and ((count, number) == (len(shards), index))
        )
        if not is_whole and not is_in_place:
            raise GGUFFormatError(
                shard,
                f"says that it is shard {number} (from 0) of {count}, but its name makes it shard "
                f"{index} of {len(shards)}; rename the files as they were published",
            )


def _merge_tensors(headers: Mapping[Path, Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise GGUFFormatError(shard, f"the tensor {name} is in {tensors[name].shard} too")
            tensors[name] = info
    return tensors
