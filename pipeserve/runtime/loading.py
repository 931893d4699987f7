"""Loading: every stage's share of the model file, several stages at a time.

Runs before the stage threads exist, on threads of its own that end with it.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pipeserve.config import Config
from pipeserve.core.loading import LoadNotice, OnProgress, StageProgress
from pipeserve.errors import ConfigError
from pipeserve.gguf.header import TensorInfo
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import Backend, backend_for
from pipeserve.kernels.quant_layout import LAYOUTS
from pipeserve.kernels.tuned_files import TunedTableError, own_folder
from pipeserve.models.config import ModelConfig
from pipeserve.models.layers import Decoder
from pipeserve.models.linear import planar_weights
from pipeserve.models.loader import (
    FLOATS,
    LayerRange,
    WeightReader,
    device_bytes,
    is_uploaded,
    stage_tensors,
)
from pipeserve.models.registry import Family, find_family
from pipeserve.runtime.devices import gib
from pipeserve.runtime.upload import Uploader

_FP8_CAPABILITY = (8, 9)


def stage_backend(device: torch.device, config: Config) -> Backend:
    """The kernels of a stage, of the precision that the options name.

    Raises:
        ConfigError: the card cannot multiply 8-bit floats, or the user's own table of measured
            choices for it cannot be read.
    """
    if config.weights == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.cuda is None or capability < _FP8_CAPABILITY:
            raise ConfigError(
                'weights is "fp8", which takes an NVIDIA card of compute capability 8.9 or later; '
                f"{device} ({torch.cuda.get_device_name(device)}) has "
                f'{capability[0]}.{capability[1]}: set weights to "quantised" or "bf16"'
            )
    try:
        return backend_for(
            device,
            weights=config.weights,
            activations=config.activations,
            tuned_folder=own_folder(config.cache_dir),
        )
    except TunedTableError as problem:
        raise ConfigError(str(problem)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one stage loads."""

    layers: LayerRange
    device: torch.device
    backend: Backend
    tensors: Sequence[TensorInfo]
    """In about the order in which they are loaded."""

    @property
    def device_bytes(self) -> int:
        """What they take on the device once loaded."""
        num_layers = self.layers.num_layers
        return sum(device_bytes(info, self.backend, num_layers) for info in self.tensors)


def plan_shares(
    gguf_file: GGUFFile,
    model: ModelConfig,
    ranges: Sequence[LayerRange],
    *,
    devices: Sequence[torch.device],
    config: Config,
) -> list[Share]:
    """Each stage's tensors, before any is read; raises as stage_backend."""
    family = find_family(gguf_file)
    wanted = (*family.required_tensors(model), *family.optional_tensors(model))
    names = [name for name in wanted if name in gguf_file.tensors]
    return [
        Share(
            layers=layers,
            device=device,
            backend=stage_backend(device, config),
            tensors=[
                gguf_file.tensors[name]
                for name in stage_tensors(names, layers, has_tied_head=model.has_tied_head)
            ],
        )
        for layers, device in zip(ranges, devices, strict=True)
    ]


def load_decoders(
    gguf_file: GGUFFile,
    model: ModelConfig,
    ranges: Sequence[LayerRange],
    *,
    devices: Sequence[torch.device],
    config: Config,
    on_progress: OnProgress,
) -> list[Decoder]:
    """Each stage's layers on its device, in the order of the stages.

    Raises:
        ModelError: a tensor cannot be read or dequantised, or leaves float16's range.
        ConfigError: a card cannot compute with these weights or has no room for them.
    """
    shares = plan_shares(gguf_file, model, ranges, devices=devices, config=config)
    for device in dict.fromkeys(devices):
        _check_room(shares, device, config)
    for text in notices(shares, config):
        on_progress(LoadNotice(text=text))
    family, lock = find_family(gguf_file), threading.Lock()

    def load(stage: int) -> Decoder:
        share = shares[stage]
        progress = _Progress(share, stage, len(shares), on_progress=on_progress, lock=lock)
        try:
            return _load_share(gguf_file, family, model, share, progress)
        except torch.OutOfMemoryError:
            raise _out_of_memory(shares, share.device, config) from None

    num_workers = min(len(shares), os.cpu_count() or 1)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="load") as executor:
        decoders = list(executor.map(load, range(len(shares))))
    for problem in dict.fromkeys(map(prepare_kernels, decoders)):
        if problem is not None:
            on_progress(LoadNotice(text=problem))
    if any(device.type == "cuda" for device in devices):
        torch.cuda.empty_cache()  # who sizes the KV cache asks the driver what is free
    return decoders


def _load_share(
    gguf_file: GGUFFile, family: Family, model: ModelConfig, share: Share, progress: _Progress
) -> Decoder:
    device, backend = share.device, share.backend
    if device.type == "cpu":
        weights = WeightReader(gguf_file, device=device, backend=backend, on_read=progress.add)
        return family.load(model, share.layers, weights)
    ahead = [
        info.name
        for info in share.tensors
        if len(info.shape) == 2 and is_uploaded(info, device, backend)
    ]
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device(device):
        with Uploader(gguf_file, ahead, device) as uploader:
            weights = WeightReader(
                gguf_file,
                device=device,
                backend=backend,
                on_read=progress.add,
                upload=uploader.take,
            )
            decoder = family.load(model, share.layers, weights)
        torch.cuda.synchronize(device)  # stage threads use the weights on streams of their own
    return decoder


def prepare_kernels(decoder: Decoder) -> str | None:
    """Compile what the decoder's matrices take; what the user should know of it."""
    linears = [
        linear
        for layer in decoder.layers
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
    ]
    weights = [weight for linear in linears for weight in planar_weights(linear)]
    heads = [] if decoder.head is None else planar_weights(decoder.head.output)
    return decoder.backend.prepare(weights, heads)


def notices(shares: Sequence[Share], config: Config) -> list[str]:
    """What loading will do that the user may not expect."""
    texts = []
    is_on_cpu = any(share.device.type == "cpu" for share in shares)
    for option, value in (("weights", config.weights), ("activations", config.activations)):
        if is_on_cpu and value != type(config).model_fields[option].default:
            texts.append(f'{option} is "{value}", but CPU stages always compute in float32')
    in_file: Counter[str] = Counter()
    on_card: Counter[str] = Counter()
    for share in shares:
        for info in share.tensors:
            is_known = info.type.name in LAYOUTS or info.type.name in FLOATS
            keeps_types = share.backend.weight_form in ("planar", "both")
            if keeps_types and len(info.shape) == 2 and not is_known:
                in_file[info.type.name] += info.num_bytes
                on_card[info.type.name] += device_bytes(
                    info, share.backend, share.layers.num_layers
                )
    texts += [
        f"weights of type {name} have no kernel and are held as float16: {on_card[name]:,} bytes "
        f"on the card instead of {num_bytes:,}, {on_card[name] / num_bytes:.1f} times as many"
        for name, num_bytes in in_file.items()
    ]
    return texts


def _check_room(shares: Sequence[Share], device: torch.device, config: Config) -> None:
    """Raises ConfigError where the weights alone are more than what is free."""
    if device.type == "cpu":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if sum(share.device_bytes for share in shares if share.device == device) > free:
        raise _out_of_memory(shares, device, config)


def _out_of_memory(shares: Sequence[Share], device: torch.device, config: Config) -> ConfigError:
    needed = sum(share.device_bytes for share in shares if share.device == device)
    free, total = torch.cuda.mem_get_info(device)
    form = "" if config.weights == "quantised" else ' set weights = "quantised",'
    return ConfigError(
        f"the weights of {device} take {gib(needed)} GiB, but {gib(free)} of its {gib(total)} "
        f"GiB are free:{form} list more devices, move layers away by layer_split, take a file "
        "of a smaller quantisation, or end what else uses the card"
    )


class _Progress:
    """Counts one stage's tensors, each once."""

    def __init__(
        self,
        share: Share,
        stage: int,
        num_stages: int,
        *,
        on_progress: OnProgress,
        lock: threading.Lock,
    ) -> None:
        """lock: of all stages together, so that on_progress is called once at a time."""
        self._left = {info.name: info.num_bytes for info in share.tensors}
        self._num_bytes = sum(self._left.values())
        self._num_read = 0
        self._stage = stage
        self._num_stages = num_stages
        self._on_progress = on_progress
        self._lock = lock

    def add(self, name: str) -> None:
        self._num_read += self._left.pop(name, 0)
        event = StageProgress(
            stage=self._stage,
            num_stages=self._num_stages,
            num_read=self._num_read,
            num_bytes=self._num_bytes,
        )
        with self._lock:
            self._on_progress(event)
