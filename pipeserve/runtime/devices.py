"""Devices: the names of the option `devices` to torch devices that exist here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeserve.errors import ConfigError


def resolve_devices(names: Sequence[str], *, num_layers: int) -> tuple[torch.device, ...]:
    """One device per stage. ("auto",) is every GPU, or two CPU stages where there is none.

    Raises:
        ConfigError: a name is malformed or there is no such device.
    """
    if tuple(names) == ("auto",):
        count = torch.cuda.device_count()
        found = [torch.device("cuda", index) for index in range(count)]
        return tuple(found or [torch.device("cpu")] * 2)[:num_layers]
    if not names:
        raise ConfigError("devices is empty; list one device per stage, or auto")
    return tuple(_resolve(name) for name in names)


def _resolve(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _unknown(name) from None
    if name == "cpu":
        return device
    # torch's annotation says int, but a name without a number has none.
    index = device.index or 0
    if device.type != "cuda" or index >= torch.cuda.device_count():
        raise _unknown(name)
    return torch.device("cuda", index)


def _unknown(name: str) -> ConfigError:
    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return ConfigError(
        f"devices names {name}, which is not here; there are {', '.join(known)}, and auto"
    )


def stage_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for steps or their graphs. It comes before whatever is done beside steps, which is
    in streams of the default priority, the least."""
    return torch.cuda.Stream(device, priority=-1)


def gib(num_bytes: int) -> str:
    """For messages."""
    return f"{num_bytes / 1024**3:.2f}"


def int_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """A message's integers as int64 on a device: the type that torch indexes by.

    Always a copy, since a message may be read-only. To a GPU it is on its way, in the order of the
    current stream; torch keeps the pinned memory until it has arrived.
    """
    tensor = torch.from_numpy(array.astype(np.int64))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def send_ints(array: np.ndarray, there: Tensor) -> None:
    """int_tensor to a GPU, into a tensor that is there."""
    there.copy_(torch.from_numpy(array.astype(np.int64)).pin_memory(), non_blocking=True)
