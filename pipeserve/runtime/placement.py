"""Placement: which device computes which layers, and why.

Runs on the loading thread, before a stage is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeserve.config import Config
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.config import ModelConfig
from pipeserve.runtime import partition
from pipeserve.runtime.cost_model import OUTPUT_TOKENS, PROMPT_TOKENS
from pipeserve.runtime.devices import gib, resolve_devices
from pipeserve.runtime.loading import plan_shares
from pipeserve.runtime.partition import Partition
from pipeserve.runtime.plan import layer_ranges
from pipeserve.runtime.survey import Survey, memory_limit, survey_devices

_STEP = 1.4
"""Between the numbers of sequences that cuts are tried for where memory is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The stages, in order."""

    devices: tuple[torch.device, ...]
    order: tuple[int, ...]
    """Which entry of the option `devices` each stage got."""
    split: tuple[int, ...]
    rooms: tuple[int | None, ...]
    """What memory_limit_bytes leaves each stage for KV cache and steps; None: no limit."""
    reason: str | None
    """Why so, for people; None where there was nothing to choose."""


def place(
    gguf_file: GGUFFile,
    model: ModelConfig,
    config: Config,
    devices: Sequence[str],
    *,
    slowdowns: Sequence[float] | None = None,
) -> Placement:
    """Choose the stages' devices and layers; the user's layer_split is taken as it is.

    slowdowns: for tests, by how much each of `devices` is made slower.

    Raises:
        ConfigError: options do not fit the model or this machine, or no cut fits the memory.
        ModelError: a tensor cannot be read or dequantised, or leaves float16's range.
    """
    targets = resolve_devices(devices, num_layers=model.num_layers)
    check_options(model, config, num_stages=len(targets))
    order: tuple[int, ...] = (0,)
    split: tuple[int, ...] = (model.num_layers,)
    reason = None
    if len(targets) > 1:
        survey = survey_devices(gguf_file, model, config, targets, slowdowns=slowdowns)
        cut, best = choose(survey, config)
        order, split, reason = cut.order, cut.split, explain(survey, cut, best)
    shares = plan_shares(
        gguf_file,
        model,
        layer_ranges(split),
        devices=[targets[which] for which in order],
        config=config,
    )
    return Placement(
        devices=tuple(share.device for share in shares),
        order=order,
        split=split,
        rooms=tuple(
            _beside(share.device_bytes, memory_limit(config, which))
            for share, which in zip(shares, order, strict=True)
        ),
        reason=reason,
    )


def check_options(model: ModelConfig, config: Config, *, num_stages: int) -> None:
    """Raises ConfigError where there are too many stages, or lists of another length."""
    partition.check_stages(num_stages, num_layers=model.num_layers)
    if config.layer_split is not None:
        partition.check_split(
            config.layer_split, num_layers=model.num_layers, num_stages=num_stages
        )
    limits = config.memory_limit_bytes or (0,)
    if len(limits) not in (1, num_stages):
        raise ConfigError(
            f"memory_limit_bytes has {len(limits)} values for {num_stages} devices; give one for "
            "each device, or one for all"
        )


def choose(survey: Survey, config: Config) -> tuple[Partition, Partition | None]:
    """The cut to take, and the best of all (None where none fits).

    Raises:
        ConfigError: there is no layer_split, and no cut fits the memory.
    """
    best = best_cut(survey)
    if config.layer_split is not None:
        own = partition.price(survey.costs(survey.facts.num_rows), config.layer_split)
        return survey.price(own), best
    if best is None:
        raise _no_room(survey)
    return best, best


def best_cut(survey: Survey) -> Partition | None:
    """The cut, in any order of the devices, that takes the least time per output token and holds a
    whole context on every stage; None where none fits. Where the options ask for no context_length,
    that is halved until a cut holds it."""
    block_size = survey.facts.block_size
    least_tokens = _whole_blocks(survey.facts.context_length, block_size)
    best = _best_holding(survey, least_tokens)
    while best is None and survey.wanted_tokens is None and least_tokens > block_size:
        least_tokens = _whole_blocks(least_tokens // 2, block_size)
        best = _best_holding(survey, least_tokens)
    return best


def _best_holding(survey: Survey, least_tokens: int) -> Partition | None:
    """More sequences at once make a token cheaper, but need more KV cache than the fastest cut may
    leave: try for several numbers of them the fastest cut that holds as many."""
    best: Partition | None = None
    facts = survey.facts
    most_tokens = facts.num_rows * _whole_blocks(facts.context_length, facts.block_size)
    num_sequences = facts.num_rows
    while num_sequences > 0:
        costs, needed = survey.costs(num_sequences), num_sequences * survey.sequence_tokens
        cuts = [
            partition.best_partition(costs, least_tokens=least, most_tokens=most_tokens)
            for least in (max(least_tokens, needed), least_tokens)
        ]
        for priced in (survey.price(cut) for cut in cuts if cut is not None):
            if best is None or priced.slowest_s < best.slowest_s * (1.0 - partition.SLACK):
                best = priced
        if cuts[0] == cuts[1]:  # memory is no limit, neither here nor for fewer sequences
            return best
        num_sequences = int(num_sequences / _STEP)
    return best


def explain(survey: Survey, cut: Partition, best: Partition | None) -> str:
    """One line for the log."""
    times = " + ".join(f"{1e6 * each_s:.1f}" for each_s in cut.times_s)
    text = (
        f"{describe(survey, cut)} take {times} us per output token (with {PROMPT_TOKENS} prompt "
        f"for {OUTPUT_TOKENS} output tokens and {survey.num_running(cut)} sequences)"
    )
    if best is None:
        return f"{text}; by what was estimated, no cut fits the memory"
    if (cut.order, cut.split) == (best.order, best.split):
        return f"{text}: the slowest stage is as fast as in any cut that fits the memory"
    slower = cut.slowest_s / best.slowest_s - 1.0
    return f"{text}: {max(0.0, slower):.0%} slower than {describe(survey, best)}"


def describe(survey: Survey, cut: Partition) -> str:
    """Such as "17 + 13 layers on cuda:0 + cuda:1"."""
    layers = " + ".join(map(str, cut.split))
    return f"{layers} layers on {' + '.join(str(survey.devices[i].device) for i in cut.order)}"


def _beside(weight_bytes: int, limit: int | None) -> int | None:
    return None if limit is None else limit - weight_bytes


def _whole_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size) * block_size


def _no_room(survey: Survey) -> ConfigError:
    rooms = ", ".join(
        f"{each.device} {'any' if each.room_bytes is None else gib(max(0, each.room_bytes))}"
        for each in survey.devices
    )
    weights = survey.devices[0].weights
    num_bytes = sum(weights.layers) + weights.embedding + weights.head
    kv = f"{survey.wanted_tokens or survey.facts.block_size} tokens of KV cache"
    return ConfigError(
        f"no cut of the {survey.model.num_layers} layers fits: weights take {gib(num_bytes)} GiB, "
        f"and every stage holds {kv}; for these there are, beside what steps are expected to take, "
        f"on {rooms} GiB; list more devices, raise memory_limit_bytes or kv_cache_bytes, lower "
        'context_length, max_num_seqs or max_num_batched_tokens, set kv_cache_dtype = "int8", or '
        "take a smaller quantisation"
    )
