"""Survey: what a model's layers take on each device in time and memory, before a stage is loaded.

Runs on the loading thread; measures where the times are not known yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import Backend
from pipeserve.models.config import ModelConfig
from pipeserve.models.loader import device_bytes
from pipeserve.runtime import kv_cache, partition
from pipeserve.runtime.cost_model import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    DeviceTimes,
    Mix,
    StageTimes,
)
from pipeserve.runtime.layer_times import layer_kinds, measure_device
from pipeserve.runtime.loading import stage_backend
from pipeserve.runtime.memory import MARGIN
from pipeserve.runtime.partition import DeviceCosts, Partition, WeightBytes
from pipeserve.runtime.plan import default_kv_bytes, first_facts, step_bytes
from pipeserve.runtime.timing_cache import cached_times, device_name, timing_key


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedDevice:
    """One entry of the option `devices`."""

    device: torch.device
    times: DeviceTimes
    kinds: tuple[str, ...]
    """Of the model's layers on this device."""
    weights: WeightBytes
    kv_token_bytes: int
    room_bytes: int | None
    kv_bytes: int | None
    least_kv_bytes: int

    def costs(self, mix: Mix) -> DeviceCosts:
        """What the partition is made from."""
        return DeviceCosts(
            layer_s=tuple(mix.layer_s(self.times.layers[kind]) for kind in self.kinds),
            head_s=mix.head_s(self.times),
            stage_s=mix.step_s(self.times),
            weights=self.weights,
            kv_token_bytes=self.kv_token_bytes,
            room_bytes=self.room_bytes,
            kv_bytes=self.kv_bytes,
            least_kv_bytes=self.least_kv_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Everything that a cut is chosen from."""

    model: ModelConfig
    facts: PipelineFacts
    """num_blocks is not known yet."""
    devices: tuple[SurveyedDevice, ...]
    wanted_tokens: int | None
    """Of KV, where the options ask for a context_length."""
    has_default_rows: bool
    """Whether max_num_seqs is left out, so that rows follow from the devices."""
    threads_per_stage: int
    """Of CPU stages."""

    @property
    def sequence_tokens(self) -> int:
        """Of KV that a sequence of the expected mix comes to hold."""
        return min(PROMPT_TOKENS + OUTPUT_TOKENS, self.facts.context_length)

    def costs(self, num_sequences: int) -> list[DeviceCosts]:
        """Of each device while so many run, in as many cohorts as there are stages."""
        mix = Mix(
            rows=max(1, num_sequences // len(self.devices)),
            chunk_tokens=self.facts.max_batch_tokens,
        )
        return [each.costs(mix) for each in self.devices]

    def num_running(self, cut: Partition) -> int:
        """Sequences of the expected mix that can run at once: as rows and KV cache allow."""
        return int(max(1, min(self.facts.num_rows, cut.num_tokens // self.sequence_tokens)))

    def price(self, cut: Partition) -> Partition:
        """The cut with what it costs while as many sequences run as can."""
        return partition.price(self.costs(self.num_running(cut)), cut.split, cut.order)

    def stages(self, cut: Partition) -> list[StageTimes]:
        """What the stages of a cut take."""
        stages, first = [], 0
        for which, num_layers in zip(cut.order, cut.split, strict=True):
            device, end = self.devices[which], first + num_layers
            kinds = device.kinds[first:end]
            has_head = end == self.model.num_layers
            stages.append(StageTimes(times=device.times, kinds=kinds, has_head=has_head))
            first = end
        return stages


def survey_devices(
    gguf_file: GGUFFile,
    model: ModelConfig,
    config: Config,
    targets: Sequence[torch.device],
    *,
    slowdowns: Sequence[float] | None = None,
) -> Survey:
    """Measure, or remember, what layers take on each device; once for devices of one name.

    slowdowns: for tests, by how much each device is made slower.

    Raises:
        ConfigError: a card cannot compute with these weights, or options contradict each other.
        ModelError: a tensor cannot be read or dequantised, or leaves float16's range.
    """
    facts = first_facts(model, config, targets)
    by_name: dict[str, DeviceTimes] = {}
    for device in targets:
        name = device_name(device)
        if name not in by_name:
            by_name[name] = _times(gguf_file, model, device, config, facts)
    surveyed = []
    for index, device in enumerate(targets):
        backend = stage_backend(device, config)
        kv_dtype = kv_cache.storage_dtype(config.kv_cache_dtype, backend.dtype)
        times = by_name[device_name(device)]
        surveyed.append(
            SurveyedDevice(
                device=device,
                times=times if slowdowns is None else times.scaled(slowdowns[index]),
                kinds=layer_kinds(gguf_file, model.num_layers, backend),
                weights=weight_bytes(gguf_file, model, backend),
                kv_token_bytes=kv_cache.block_bytes(model, 1, kv_dtype),
                room_bytes=_room_bytes(model, config, facts, targets, index),
                kv_bytes=config.kv_cache_bytes or default_kv_bytes(device),
                least_kv_bytes=config.kv_cache_bytes or 0,
            )
        )
    return Survey(
        model=model,
        facts=facts,
        devices=tuple(surveyed),
        wanted_tokens=config.context_length,
        has_default_rows=config.max_num_seqs is None,
        threads_per_stage=config.threads_per_stage,
    )


def weight_bytes(gguf_file: GGUFFile, model: ModelConfig, backend: Backend) -> WeightBytes:
    """On a device with these kernels."""
    layers, embedding, head = [0] * model.num_layers, 0, 0
    for name, info in gguf_file.tensors.items():
        num_bytes = device_bytes(info, backend, model.num_layers)
        match name.split(".", 2):
            case ["blk", number, _] if int(number) < model.num_layers:
                layers[int(number)] += num_bytes
            case ["token_embd", *_]:
                embedding += num_bytes
            case ["output" | "output_norm", *_]:
                head += num_bytes
    shared = embedding if model.has_tied_head else 0
    return WeightBytes(layers=tuple(layers), embedding=embedding, head=head + shared, shared=shared)


def memory_limit(config: Config, index: int) -> int | None:
    """Of one entry of the option `devices`."""
    limits = config.memory_limit_bytes
    if limits is None:
        return None
    return limits[index if len(limits) > 1 else 0]


def _times(
    gguf_file: GGUFFile,
    model: ModelConfig,
    device: torch.device,
    config: Config,
    facts: PipelineFacts,
) -> DeviceTimes:
    def measure() -> DeviceTimes:
        return measure_device(gguf_file, model, device, config=config, facts=facts)

    if not are_kept(device):
        return measure()
    key = timing_key(gguf_file, model, device, config=config, facts=facts)
    return cached_times(config.cache_dir.expanduser() / "timings", key, measure)


def are_kept(device: torch.device) -> bool:
    """Whether times are worth a file: a CPU's take a second, and whatever else it did meanwhile
    would be kept with them."""
    return device.type != "cpu"


def _room_bytes(
    model: ModelConfig,
    config: Config,
    facts: PipelineFacts,
    targets: Sequence[torch.device],
    index: int,
) -> int | None:
    """For weights and KV cache; stages of one GPU share it in equal parts."""
    device, room = targets[index], memory_limit(config, index)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = (free - int(MARGIN * total)) // targets.count(device)
        room = share if room is None else min(room, share)
    return None if room is None else room - step_bytes(model, facts, device)
