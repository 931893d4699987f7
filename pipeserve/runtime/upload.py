"""Uploader: tensors' bytes from the file to a card, read ahead by threads of its own.

Each reader fills a pinned buffer and copies it on the uploader's stream, so that disk, bus and the
repacking on the loading thread's stream work at the same time. Used by one loading thread; knows
neither types nor layouts.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pipeserve.gguf.reader import GGUFFile

NUM_READERS = 4
"""Threads per stage: enough requests in flight for an NVMe disk, and copies out of the page cache
at several times a thread's speed."""
BUFFER_BYTES = 8 * 1024**2
"""Of one read and one copy; each reader has two buffers, one filling while one is copied."""
READ_AHEAD_BYTES = 256 * 1024**2
"""Of tensors that are on their way or wait on the card before they are asked for."""


@dataclass(slots=True)
class _Buffer:
    """Pinned memory, and when the copy out of it is done."""

    bytes: Tensor
    copied: torch.cuda.Event | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Upload:
    """A tensor on its way."""

    target: Tensor
    """uint8 [rows * bytes per row] on the device."""
    reads: list[Future[None]]


class Uploader:
    """Hands out tensors as bytes on the device, in about the order that it was told.

    A context: leaving it ends the threads. On a CPU "device" nothing is pinned or asynchronous.
    """

    def __init__(
        self,
        gguf_file: GGUFFile,
        names: Iterable[str],
        device: torch.device,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
    ) -> None:
        """names: of what will be taken, each once, in order; it is read before it is asked for."""
        self._file = gguf_file
        self._coming = deque(names)
        self._device = device
        self._read_ahead_bytes = read_ahead_bytes
        self._on_the_way: dict[str, _Upload] = {}
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._buffer_bytes = buffer_bytes
        memory = torch.empty(2 * NUM_READERS * buffer_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for part in memory.split(buffer_bytes):
            self._free.put(_Buffer(part, None))
        self._readers = ThreadPoolExecutor(
            NUM_READERS, thread_name_prefix="read", initializer=self._stand_on_device
        )

    def _stand_on_device(self) -> None:
        """Of a reader thread: or leaving a stream's context would set up the first card as well."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()  # a tensor that nobody took must not be freed under a copy
        self._on_the_way.clear()

    def take(self, name: str) -> Tensor:
        """uint8 [rows, bytes of a row] on the device, for use on the current stream.

        Raises:
            GGUFFormatError: as GGUFFile.read_into.
            torch.OutOfMemoryError: the card is full.
        """
        self._read_ahead(name)
        upload = self._on_the_way.pop(name)
        for read in upload.reads:
            read.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            upload.target.record_stream(current)
        return upload.target.view(self._file.tensors[name].num_rows, -1)

    def _read_ahead(self, name: str) -> None:
        """Start `name`, and what comes next as far as there is room."""
        if name not in self._on_the_way:
            with suppress(ValueError):
                self._coming.remove(name)
            self._start(name)
        num_ahead = sum(upload.target.nbytes for upload in self._on_the_way.values())
        while self._coming and num_ahead < self._read_ahead_bytes:
            num_ahead += self._start(self._coming.popleft())

    def _start(self, name: str) -> int:
        """Queue the reads of one tensor; returns its bytes."""
        num_bytes = self._file.tensors[name].num_bytes
        # Allocated on the stream that writes it: what is freed comes back to this stream when the
        # taker's kernels are done, and does not leave holes between the weights that stay.
        with torch.cuda.stream(self._stream):
            target = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        reads = [
            self._readers.submit(self._read, name, first, target)
            for first in range(0, num_bytes, self._buffer_bytes)
        ]
        self._on_the_way[name] = _Upload(target=target, reads=reads)
        return num_bytes

    def _read(self, name: str, first: int, target: Tensor) -> None:
        """Read and copy one piece of a tensor; runs on a reader thread."""
        piece = target[first : first + self._buffer_bytes]
        buffer = self._free.get()
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            filled = buffer.bytes[: len(piece)]
            self._file.read_into(name, first, filled.numpy().data)
            if self._stream is None:
                piece.copy_(filled)
                return
            with torch.cuda.stream(self._stream):
                piece.copy_(filled, non_blocking=True)
                buffer.copied = self._stream.record_event()
        finally:
            self._free.put(buffer)
