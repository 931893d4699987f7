"""Transfer: the way of tensors from one device to another, through rings of fixed buffers.

`send` runs on the sending stage's thread and stream, `Arrival.take` on the receiver's. Copies
between cards run on side streams, so that both compute meanwhile; no thread waits for a GPU, but
that of a CPU stage for what comes from one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrival:
    """A tensor that is on its way."""

    tensor: Tensor
    """On the receiver's device; valid until as many more were sent as the ring is deep."""
    event: torch.cuda.Event | None
    """Recorded behind the last copy; None where there was nothing to wait for."""

    @property
    def is_there(self) -> bool:
        """Whether taking it would wait for nothing."""
        return self.event is None or self.event.query()

    def take(self) -> Tensor:
        """The tensor: a GPU's current stream waits for it, for a CPU this thread does."""
        if self.event is None:
            return self.tensor
        if self.tensor.device.type == "cuda":
            torch.cuda.current_stream(self.tensor.device).wait_event(self.event)
        else:
            self.event.synchronize()
        return self.tensor


class Transfer(Protocol):
    """One way between two devices."""

    def send(self, tensor: Tensor) -> Arrival:
        """Send a tensor on; the sender may overwrite it in its stream's next operation."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcels:
    """What a transfer must hold."""

    shape: tuple[int, ...]
    """Of the largest tensor; others have fewer lines."""
    dtype: torch.dtype
    depth: int
    """Tensors that may be on their way or in use at once, plus one."""


class HostTransfer:
    """Between threads of the host: a fresh tensor changes hands."""

    def send(self, tensor: Tensor) -> Arrival:
        return Arrival(tensor=tensor, event=None)


class CardTransfer:
    """Within one card: a copy on the sender's stream, for which the receiver's stream waits."""

    def __init__(self, parcels: Parcels, device: torch.device) -> None:
        self._inbox = _Ring(parcels, device)

    def send(self, tensor: Tensor) -> Arrival:
        slot = self._inbox.fill(tensor)
        return Arrival(tensor=slot, event=_record())


class PeerTransfer:
    """From one card straight to another.

    torch's copy between devices runs on the source's current stream and makes the current streams
    of both wait for each other (aten/src/ATen/native/cuda/Copy.cu): both are set to side streams.
    """

    def __init__(self, parcels: Parcels, source: torch.device, target: torch.device) -> None:
        self._outbox, self._inbox = _Ring(parcels, source), _Ring(parcels, target)
        self._sending, self._receiving = torch.cuda.Stream(source), torch.cuda.Stream(target)

    def send(self, tensor: Tensor) -> Arrival:
        outgoing = self._outbox.fill(tensor)
        self._sending.wait_event(_record())
        with torch.cuda.stream(self._receiving), torch.cuda.stream(self._sending):
            incoming = self._inbox.fill(outgoing)
        return Arrival(tensor=incoming, event=_record(self._receiving))


class StagedTransfer:
    """From or to a card through pinned memory of the host; one end may be the host itself."""

    def __init__(self, parcels: Parcels, source: torch.device, target: torch.device) -> None:
        is_from_card, is_to_card = source.type == "cuda", target.type == "cuda"
        self._outbox = _Ring(parcels, source) if is_from_card else None
        self._pinned = _Ring(parcels, torch.device("cpu"), pin_memory=True)
        self._inbox = _Ring(parcels, target) if is_to_card else None
        self._sending = torch.cuda.Stream(source) if is_from_card else None
        self._receiving = torch.cuda.Stream(target) if is_to_card else None

    def send(self, tensor: Tensor) -> Arrival:
        arrival = self._to_host(tensor)
        if self._inbox is None or self._receiving is None:
            return arrival
        with torch.cuda.stream(self._receiving):
            if arrival.event is not None:
                self._receiving.wait_event(arrival.event)
            incoming = self._inbox.fill(arrival.tensor)
        return Arrival(tensor=incoming, event=_record(self._receiving))

    def _to_host(self, tensor: Tensor) -> Arrival:
        if self._outbox is None or self._sending is None:
            return Arrival(tensor=self._pinned.fill(tensor), event=None)
        outgoing = self._outbox.fill(tensor)
        self._sending.wait_event(_record())
        with torch.cuda.stream(self._sending):
            slot = self._pinned.fill(outgoing)
        return Arrival(tensor=slot, event=_record(self._sending))


class _Ring:
    """Buffers on one device that are filled in turn."""

    def __init__(self, parcels: Parcels, device: torch.device, *, pin_memory: bool = False) -> None:
        self._slots = torch.zeros(
            (parcels.depth, *parcels.shape),
            dtype=parcels.dtype,
            device=device,
            pin_memory=pin_memory,
        )
        self._num_filled = 0

    def fill(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into the next buffer, on the current stream; returns the filled part."""
        slot = self._slots[self._num_filled % len(self._slots)][: len(tensor)]
        self._num_filled += 1
        return slot.copy_(tensor, non_blocking=True)


def _record(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """An event behind what was queued so far; without a stream, on the thread's current one."""
    event = torch.cuda.Event()
    event.record(stream or torch.cuda.current_stream())
    return event


def make_transfer(
    parcels: Parcels, source: torch.device, target: torch.device, *, use_peer: bool
) -> Transfer:
    """The fastest way between two devices; without use_peer, cards send through the host."""
    if source.type == target.type == "cpu":
        return HostTransfer()
    if source == target:
        return CardTransfer(parcels, source)
    if source.type == target.type == "cuda" and use_peer:
        return PeerTransfer(parcels, source, target)
    return StagedTransfer(parcels, source, target)
