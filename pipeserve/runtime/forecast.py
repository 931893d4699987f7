"""Forecast: what a cut is expected to do under load, what limits it, and what would change that.

Numbers from a survey; measures nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from pipeserve.runtime import kv_cache
from pipeserve.runtime.cost_model import decode_tokens_per_s, prefill_tokens_per_s
from pipeserve.runtime.partition import Partition
from pipeserve.runtime.placement import best_cut
from pipeserve.runtime.plan import GPU_ROWS
from pipeserve.runtime.survey import Survey, SurveyedDevice

LOADS = (1, 8, 32, 128, 256)
"""Sequences at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForecast:
    """One stage."""

    device: str
    num_layers: int
    weight_bytes: int
    kv_tokens: int | None
    """That it could hold; None: nothing limits them."""
    time_us: float
    """Per output token of the mix."""
    busy: float
    """Share of the slowest stage's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadForecast:
    """So many sequences of the expected mix at once."""

    num_sequences: int
    num_running: int
    """Of them, as far as rows and KV cache allow."""
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one cut."""

    stages: tuple[StageForecast, ...]
    kv_tokens: int
    """That can be used: the least of all stages', and no more than all rows need."""
    loads: tuple[LoadForecast, ...]
    prefill_tokens_per_s: float
    output_tokens_per_s: float
    """Of the mix, while prompts of others come in and as many rows decode as can."""

    @property
    def layer_split(self) -> tuple[int, ...]:
        return tuple(stage.num_layers for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What would be with another card or option."""

    change: str
    forecast: Forecast


def forecast(survey: Survey, cut: Partition) -> Forecast:
    """What is to be expected; see decode_tokens_per_s, prefill_tokens_per_s and Mix for how."""
    facts, stages = survey.facts, survey.stages(cut)
    kv_tokens = int(min(cut.num_tokens, facts.num_rows * facts.context_length))
    most_running = survey.num_running(cut)
    return Forecast(
        stages=_stage_forecasts(survey, cut),
        kv_tokens=max(0, kv_tokens),
        loads=tuple(
            LoadForecast(
                num_sequences=load,
                num_running=min(load, most_running),
                decode_tokens_per_s=decode_tokens_per_s(stages, min(load, most_running)),
            )
            for load in LOADS
        ),
        prefill_tokens_per_s=prefill_tokens_per_s(stages, facts.max_batch_tokens),
        output_tokens_per_s=1.0 / cut.slowest_s,
    )


def _stage_forecasts(survey: Survey, cut: Partition) -> tuple[StageForecast, ...]:
    costs = survey.costs(survey.num_running(cut))
    return tuple(
        StageForecast(
            device=str(survey.devices[which].device),
            num_layers=span[1] - span[0],
            weight_bytes=int(costs[which].stage_bytes()[span]),
            kv_tokens=None if tokens == float("inf") else max(0, int(tokens)),
            time_us=1e6 * time_s,
            busy=time_s / cut.slowest_s,
        )
        for which, span, time_s, tokens in zip(
            cut.order,
            pairwise(accumulate(cut.split, initial=0)),
            cut.times_s,
            cut.tokens,
            strict=True,
        )
    )


def find_limits(survey: Survey, cut: Partition) -> tuple[str, ...]:
    """What keeps the cut from doing more, in words."""
    names = [f"stage {i} ({survey.devices[which].device})" for i, which in enumerate(cut.order)]
    limits = [f"time: {names[cut.times_s.index(cut.slowest_s)]} is the slowest"]
    if not _has_cores(survey):
        limits.append(
            f"cores: CPU stages share {os.cpu_count()}, so that none is as fast as foretold"
        )
    tokens, rows = cut.num_tokens, survey.facts.num_rows
    where = names[cut.tokens.index(tokens)]
    if tokens < 0:
        limits.append(f"memory: weights and KV cache of {where} are not expected to fit")
    elif survey.num_running(cut) < rows:
        limits.append(
            f"memory: the KV cache of {where} holds {survey.num_running(cut)} sequences of "
            f"{survey.sequence_tokens} tokens, and max_num_seqs is {rows}"
        )
    return tuple(limits)


def find_alternatives(survey: Survey, cut: Partition) -> tuple[Alternative, ...]:
    """Other cuts, options and numbers of devices, each with the best cut that it allows."""
    last = survey.devices[-1]
    surveys = {}
    best = best_cut(survey)
    if best is not None and (best.order, best.split) != (cut.order, cut.split):
        surveys["layer_split left out"] = survey
    int8 = replace(survey, devices=tuple(_with_int8(survey, each) for each in survey.devices))
    if int8 != survey:
        surveys['kv_cache_dtype = "int8"'] = int8
    if len(survey.devices) > 1:
        fewer = _with_devices(survey, survey.devices[:-1])
        surveys[f"without the last device ({last.device})"] = fewer
    more = _with_devices(survey, (*survey.devices, last), num_new=1)
    if len(more.devices) <= survey.model.num_layers and _has_cores(more):
        surveys[f"one more device like the last ({last.device})"] = more
    cuts = ((change, other, best_cut(other)) for change, other in surveys.items())
    return tuple(
        Alternative(change=change, forecast=forecast(other, found))
        for change, other, found in cuts
        if found is not None
    )


def _with_devices(
    survey: Survey, devices: tuple[SurveyedDevice, ...], *, num_new: int = 0
) -> Survey:
    """With the rows that these would have where the options leave that to the devices. num_new: of
    the devices, cards beside those that are named."""
    facts = replace(survey.facts, num_stages=len(devices))
    if survey.has_default_rows and all(each.device.type == "cuda" for each in survey.devices):
        num_rows = GPU_ROWS * (len({each.device for each in devices}) + num_new)
        most = max(facts.max_batch_tokens, num_rows)
        facts = replace(facts, num_rows=num_rows, max_batch_tokens=most)
    return replace(survey, devices=devices, facts=facts)


def _has_cores(survey: Survey) -> bool:
    """Whether every compute thread of CPU stages can have a core of its own."""
    num_stages = sum(each.device.type == "cpu" for each in survey.devices)
    return num_stages * survey.threads_per_stage <= (os.cpu_count() or 1)


def _with_int8(survey: Survey, device: SurveyedDevice) -> SurveyedDevice:
    """With another size of the KV cache; its speed is taken to be the same."""
    return replace(device, kv_token_bytes=kv_cache.block_bytes(survey.model, 1, torch.int8))
