"""PipelinePlan: what a model becomes on these devices, before a weight is read.

Pure decisions about options, model and devices; runs on the loading thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.errors import ConfigError
from pipeserve.models.config import ModelConfig
from pipeserve.models.loader import LayerRange
from pipeserve.runtime import kv_cache
from pipeserve.runtime.loading import stage_backend

CPU_ROWS, CPU_BATCH_TOKENS = 64, 256
"""max_num_seqs and max_num_batched_tokens where they are left out and a stage is on a CPU."""
GPU_ROWS, GPU_BATCH_TOKENS = 256, 2048
"""The same where all stages are on GPUs: rows for each GPU, since their KV caches add up."""
LARGE_GPU_BYTES, LARGE_GPU_BATCH_TOKENS = 64 * 1024**3, 4096
"""On cards with so much memory, which are also fast: a dequantised matrix serves more tokens."""

_GRAPH_BYTES = 512 * 1024**2
"""Expected of a GPU stage's CUDA graphs; what they take is measured once the weights are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """Devices, layers and sizes."""

    model: ModelConfig
    devices: tuple[torch.device, ...]
    ranges: tuple[LayerRange, ...]
    kv_dtypes: tuple[torch.dtype, ...]
    """Of each stage's KV cache."""
    kv_bytes: tuple[int | None, ...]
    """Of each stage's; None: what its GPU has left once weights, steps and graphs are there."""
    facts: PipelineFacts
    """num_blocks and context_length are the most that can be used where a GPU's KV cache takes
    what the rest leaves free."""


def plan_pipeline(
    model: ModelConfig,
    config: Config,
    devices: Sequence[torch.device],
    split: Sequence[int],
    *,
    rooms: Sequence[int | None] | None = None,
) -> PipelinePlan:
    """What stages with so many layers become on these devices, as far as options decide it.

    rooms: for KV cache and steps of each stage, where memory_limit_bytes says so.

    Raises:
        ConfigError: options do not fit the model or this machine.
    """
    kv_dtypes = tuple(
        kv_cache.storage_dtype(config.kv_cache_dtype, stage_backend(device, config).dtype)
        for device in devices
    )
    facts = first_facts(model, config, devices)
    kv_bytes = tuple(
        _kv_bytes(model, config, facts, device, room)
        for device, room in zip(devices, rooms or [None] * len(devices), strict=True)
    )
    plan = PipelinePlan(
        model=model,
        devices=tuple(devices),
        ranges=layer_ranges(split),
        kv_dtypes=kv_dtypes,
        kv_bytes=kv_bytes,
        facts=facts,
    )
    return size_caches(plan, config, kv_bytes)


def first_facts(
    model: ModelConfig, config: Config, devices: Sequence[torch.device]
) -> PipelineFacts:
    """With num_blocks 0 and the context_length that is wanted: what layers decide comes later.

    Raises:
        ConfigError: options do not fit the model or each other.
    """
    num_rows, max_batch_tokens = _choose_batch_limits(config, devices)
    return PipelineFacts(
        num_stages=len(devices),
        num_rows=num_rows,
        num_blocks=0,
        block_size=config.block_size,
        context_length=_wanted_context(model, config),
        max_batch_tokens=max_batch_tokens,
        num_look_ahead=config.num_look_ahead,
        vocab_size=model.vocab_size,
        # On a CPU whatever runs beside a step slows it down.
        samples_late=devices[-1].type == "cuda",
    )


def layer_ranges(split: Sequence[int]) -> tuple[LayerRange, ...]:
    """The layers of each stage, from their numbers."""
    num_layers = sum(split)
    return tuple(
        LayerRange(first=first, end=end, num_layers=num_layers)
        for first, end in pairwise(accumulate(split, initial=0))
    )


def default_kv_bytes(device: torch.device) -> int | None:
    """KV cache of a stage where kv_cache_bytes is left out; None: what its GPU has left."""
    return kv_cache.DEFAULT_CPU_BYTES if device.type == "cpu" else None


def step_bytes(model: ModelConfig, facts: PipelineFacts, device: torch.device) -> int:
    """What the dearest steps of a stage with the head are expected to take: hidden states, a
    dequantised matrix, logits with their copies and what penalties count; on a GPU also graphs."""
    activations = facts.max_batch_tokens * (16 * model.hidden_size + 6 * model.ffn_size)
    logits = facts.num_rows * model.vocab_size * (3 * 4 + 5)
    if device.type == "cpu":
        return 2 * activations + logits
    return activations + 4 * model.hidden_size * model.ffn_size + logits + _GRAPH_BYTES


def _kv_bytes(
    model: ModelConfig, config: Config, facts: PipelineFacts, device: torch.device, room: int | None
) -> int | None:
    wanted = config.kv_cache_bytes or default_kv_bytes(device)
    if room is None or device.type == "cuda":  # there, room is measured once weights are loaded
        return wanted
    room = max(0, room - step_bytes(model, facts, device))
    if room < (config.kv_cache_bytes or 1):
        asked = f", but kv_cache_bytes asks for {config.kv_cache_bytes}" * bool(
            config.kv_cache_bytes
        )
        raise ConfigError(
            f"memory_limit_bytes leaves {room} bytes for the KV cache of a stage, beside its "
            f"weights and what steps take{asked}; raise it, lower kv_cache_bytes, or list more "
            "devices"
        )
    return room if wanted is None else min(wanted, room)


def size_caches(plan: PipelinePlan, config: Config, kv_bytes: Sequence[int | None]) -> PipelinePlan:
    """The plan with as many blocks as fit every stage's kv_bytes (None: without a limit), and the
    context that they hold.

    Raises:
        ConfigError: not one block fits, or not the context_length that was asked for.
    """
    facts, wanted = plan.facts, _wanted_context(plan.model, config)
    shape = kv_cache.KVShape(
        num_rows=facts.num_rows, context_length=wanted, block_size=facts.block_size
    )
    fitting = [
        kv_cache.count_blocks(
            shape,
            bytes_per_block=len(layers)
            * kv_cache.block_bytes(plan.model, facts.block_size, kv_dtype),
            kv_cache_bytes=num_bytes,
        )
        for layers, kv_dtype, num_bytes in zip(plan.ranges, plan.kv_dtypes, kv_bytes, strict=True)
        if num_bytes is not None
    ]
    num_blocks = min(fitting, default=shape.most_blocks)
    capacity = num_blocks * facts.block_size
    if config.context_length is not None and capacity < config.context_length:
        raise ConfigError(
            f"context_length is {wanted}, but kv_cache_bytes holds {capacity} tokens on the stage "
            "with the most layers; raise kv_cache_bytes or lower context_length"
        )
    facts = replace(facts, num_blocks=num_blocks, context_length=min(wanted, capacity))
    return replace(plan, facts=facts)


def _wanted_context(model: ModelConfig, config: Config) -> int:
    wanted = config.context_length or model.context_length
    if wanted > model.context_length:
        raise ConfigError(
            f"context_length is {wanted}, but the model was trained for {model.context_length} "
            "tokens; set at most that, or leave it out"
        )
    return wanted


def _choose_batch_limits(config: Config, devices: Sequence[torch.device]) -> tuple[int, int]:
    """Rows, and tokens of a micro-batch; a pipeline with a CPU stage moves at its pace."""
    num_rows, max_batch_tokens = CPU_ROWS, CPU_BATCH_TOKENS
    if all(device.type == "cuda" for device in devices):
        num_rows = GPU_ROWS * len(set(devices))
        are_large = all(_memory_bytes(device) >= LARGE_GPU_BYTES for device in devices)
        max_batch_tokens = LARGE_GPU_BATCH_TOKENS if are_large else GPU_BATCH_TOKENS
    num_rows = config.max_num_seqs or num_rows
    max_batch_tokens = config.max_num_batched_tokens or max(num_rows, max_batch_tokens)
    if max_batch_tokens < num_rows:
        raise ConfigError(
            f"max_num_batched_tokens is {max_batch_tokens} and max_num_seqs {num_rows}: a "
            "micro-batch must hold a token of every running sequence; raise the one or lower the "
            "other"
        )
    return num_rows, max_batch_tokens


def _memory_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
