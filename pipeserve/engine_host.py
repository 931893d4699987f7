"""EngineHost: where the engine half lives, on threads of this process or in one of its own.

Decides which from the options. Must not import torch before an engine on threads is loaded.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.layout import LayoutSurvey
from pipeserve.core.loading import OnProgress
from pipeserve.engine.engine import Inbox
from pipeserve.engine.messages import EngineMessage, FrontMessage, Load, SetLogLevel, SurveyLayouts
from pipeserve.engine_process import EngineProcess
from pipeserve.toolchain import keep_kernels_in

if TYPE_CHECKING:
    from pipeserve.engine_half import EngineHalf

Deliver = Callable[[Sequence[EngineMessage]], None]

GPU_NODES = tuple(map(Path, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
"""One of them is there where a driver for NVIDIA's or AMD's GPUs, or WSL's, is loaded."""


class EngineHost(Protocol):
    """One engine half from its load to its end."""

    def load(self, on_progress: OnProgress) -> PipelineFacts:
        """Load the model; blocks. on_progress gets what the runtime reports, on this thread or
        another.

        Raises:
            PipeserveError: the model cannot be served here.
        """
        ...

    def start(self, deliver: Deliver) -> None:
        """After `load`: take messages. `deliver` is called on a thread of the host."""

    def post(self, message: FrontMessage) -> None:
        """Send a message to the engine; returns at once."""

    def close(self, timeout_s: float) -> None:
        """Wait for the end that a Shutdown or a failure began, or break `load` off; blocks."""


class EngineThreads:
    """The engine half on threads of this process."""

    def __init__(self, order: Load) -> None:
        self._order = order
        self._inbox: Inbox = queue.SimpleQueue()
        self._half: EngineHalf | None = None

    def load(self, on_progress: OnProgress) -> PipelineFacts:
        keep_kernels_in(self._order.config.cache_dir)
        from pipeserve.engine_half import EngineHalf  # brings torch and Triton

        self._half = EngineHalf.load(self._order, inbox=self._inbox, on_progress=on_progress)
        return self._half.facts

    def start(self, deliver: Deliver) -> None:
        assert self._half is not None, "load comes first"
        self._half.start(lambda message: deliver((message,)))

    def post(self, message: FrontMessage) -> None:
        if not isinstance(message, SetLogLevel):  # this process has it
            self._inbox.put(message)

    def close(self, timeout_s: float) -> None:
        """A `load` that has not returned goes on until the process ends."""
        if self._half is not None:
            self._half.close(timeout_s)


def make_host(order: Load) -> EngineHost:
    """Not loaded yet, but a process of its own is started."""
    return EngineProcess(order) if takes_two_processes(order.config) else EngineThreads(order)


class LayoutSurveyor:
    """Asks the engine half what the choice of a layout needs to know, wherever that lives."""

    def __init__(self, order: SurveyLayouts) -> None:
        self._order = order
        self._process = EngineProcess(order) if takes_two_processes(order.config) else None

    def survey(self) -> LayoutSurvey:
        """Blocks; `close` breaks it off where it runs in a process of its own.

        Raises:
            PipeserveError: the model cannot be served here, or the process died.
        """
        if self._process is not None:
            return self._process.survey()
        keep_kernels_in(self._order.config.cache_dir)
        from pipeserve.engine_half import survey  # brings torch and Triton

        return survey(self._order)

    def close(self) -> None:
        if self._process is not None:
            self._process.close(0.0)


def takes_two_processes(
    config: Config,
    *,
    gpu_nodes: Sequence[Path] = GPU_NODES,
    environ: Mapping[str, str] = os.environ,
) -> bool:
    """What the option `processes` means for these devices.

    Without torch it cannot be known which GPUs `devices = ["auto"]` will find. A driver that is
    there counts as a GPU: where it is not, two processes serve CPU stages, which costs little.
    """
    if config.processes != "auto":
        return config.processes == "two"
    if config.idle_unload_s is not None:
        return True  # only a process that ends gives all of a device's memory back
    if config.devices != ("auto",):
        return any(device != "cpu" for device in config.devices)
    return may_have_gpus(gpu_nodes=gpu_nodes, environ=environ)


def may_have_gpus(
    *, gpu_nodes: Sequence[Path] = GPU_NODES, environ: Mapping[str, str] = os.environ
) -> bool:
    """False where there are certainly none."""
    is_hidden = environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not is_hidden and any(node.exists() for node in gpu_nodes)


def may_have_several_gpus(
    *, folder: Path = Path("/dev"), environ: Mapping[str, str] = os.environ
) -> bool:
    """False where there is certainly none or only one."""
    gpu_nodes = [folder / node.name for node in GPU_NODES]
    if not may_have_gpus(gpu_nodes=gpu_nodes, environ=environ):
        return False
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return "," in visible
    # Of AMD's GPUs and of WSL's there are no such files, and nothing is known.
    return len(list(folder.glob("nvidia[0-9]*"))) != 1
