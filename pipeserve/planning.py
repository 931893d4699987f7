"""`pipeserve plan`: what a model would become on these devices, and do there, before it is loaded.

Runs in the command's own process; must not know engine and HTTP.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch

from pipeserve.config import Config
from pipeserve.core.layout import LayoutSurvey
from pipeserve.gguf.reader import GGUFFile
from pipeserve.hub import resolve_model
from pipeserve.layout import Layout, choose_layout, is_open, needs_survey
from pipeserve.models.registry import check_model
from pipeserve.runtime.cost_model import OUTPUT_TOKENS, PROMPT_TOKENS
from pipeserve.runtime.devices import resolve_devices
from pipeserve.runtime.forecast import (
    Alternative,
    Forecast,
    find_alternatives,
    find_limits,
    forecast,
)
from pipeserve.runtime.layouts import find_devices, survey_layouts
from pipeserve.runtime.placement import check_options, choose, explain
from pipeserve.runtime.survey import survey_devices
from pipeserve.toolchain import check_toolchain

Rows = list[tuple[str, ...]]

LEGEND = f"""\
KV tokens   that a stage could hold; all stages hold the same, so the least of them counts
us/token    of a stage per output token, with {PROMPT_TOKENS} prompt for {OUTPUT_TOKENS} output
            tokens and as many sequences at once as can run
busy        share of the slowest stage's time
running     sequences at once, as far as max_num_seqs and the KV cache allow
Times of layers and head are measured on each kind of device and kept in cache_dir. What steps and
graphs take of a GPU is estimated here, and measured when the model is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that the command prints; of several replicas, what concerns the first."""

    model: str
    num_layers: int
    max_num_seqs: int
    max_num_batched_tokens: int
    reason: str
    forecast: Forecast
    limits: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    """Each with the best cut that it allows."""
    layout: str | None = None
    """How many replicas there are, and why; None where nothing else was to be had."""
    other_replicas: tuple[Plan, ...] = ()

    @property
    def output_tokens_per_s(self) -> float:
        """Of all replicas together."""
        each = (plan.forecast.output_tokens_per_s for plan in (self, *self.other_replicas))
        return sum(each)


def make_plan(config: Config) -> Plan:
    """Fetch the model where it is not here yet, measure where times are not known, and choose.

    Raises:
        PipeserveError: the model cannot be had or served, or options do not fit it.
    """
    path = resolve_model(config.model, cache_dir=config.cache_dir)
    with GGUFFile.open(path) as gguf_file:
        layout, is_given = _lay_out(gguf_file, config)
        first, *others = (_plan_replica(path.name, gguf_file, each) for each in layout.replicas)
    if is_given and not others:
        return first
    count = "one replica" if not others else f"{len(layout.replicas)} replicas"
    reason = f"{count} ({layout.reason})"
    return dataclasses.replace(first, layout=reason, other_replicas=tuple(others))


def _lay_out(gguf_file: GGUFFile, config: Config) -> tuple[Layout, bool]:
    """As the daemon does, and whether there was nothing to find out for it."""
    may_have_several_gpus = torch.cuda.device_count() > 1
    if not needs_survey(config, may_have_several_gpus=may_have_several_gpus):
        return choose_layout(config, None), True
    devices = find_devices(gguf_file, config)
    survey = LayoutSurvey(devices=devices, forecasts=())
    if is_open(config, devices):
        check_toolchain()
        survey = survey_layouts(gguf_file, config)
    return choose_layout(config, survey), False


def _plan_replica(name: str, gguf_file: GGUFFile, config: Config) -> Plan:
    model = check_model(gguf_file)
    targets = resolve_devices(config.devices, num_layers=model.num_layers)
    check_options(model, config, num_stages=len(targets))
    if any(device.type == "cuda" for device in targets):
        check_toolchain()
    survey = survey_devices(gguf_file, model, config, targets)
    cut, best = choose(survey, config)
    return Plan(
        model=name,
        num_layers=model.num_layers,
        max_num_seqs=survey.facts.num_rows,
        max_num_batched_tokens=survey.facts.max_batch_tokens,
        reason=explain(survey, cut, best),
        forecast=forecast(survey, cut),
        limits=find_limits(survey, cut),
        alternatives=find_alternatives(survey, cut),
    )


def as_json(plan: Plan) -> str:
    """Every figure under its name in Plan and Forecast."""
    return json.dumps(dataclasses.asdict(plan), indent=2)


def as_text(plan: Plan) -> str:
    """Tables for people."""
    parts = [] if plan.layout is None else [plan.layout, ""]
    replicas = (plan, *plan.other_replicas)
    for index, replica in enumerate(replicas):
        if len(replicas) > 1:
            parts.append(f"replica {index}:")
        parts += [*_replica_lines(replica), ""]
    if len(replicas) > 1:
        parts += [f"together {_rate(plan.output_tokens_per_s)} output tokens/s", ""]
    return "\n".join((*parts, LEGEND))


def _replica_lines(plan: Plan) -> list[str]:
    expected = plan.forecast
    head = (
        f"{plan.model}, {plan.num_layers} layers, max_num_seqs {plan.max_num_seqs}, "
        f"max_num_batched_tokens {plan.max_num_batched_tokens}"
    )
    rates = (
        f"prefill {_rate(expected.prefill_tokens_per_s)} tokens/s; {PROMPT_TOKENS} + "
        f"{OUTPUT_TOKENS} tokens with all that can run: {_rate(expected.output_tokens_per_s)} "
        "output tokens/s"
    )
    return [
        head,
        plan.reason,
        "",
        *_table(_stage_rows(expected)),
        "",
        *_table(_load_rows(expected)),
        rates,
        "",
        *(f"limited by {limit}" for limit in plan.limits),
        "",
        *_table(_alternative_rows(plan)),
    ]


def _stage_rows(expected: Forecast) -> Rows:
    rows: Rows = [("stage", "device", "layers", "weights", "KV tokens", "us/token", "busy")]
    for index, stage in enumerate(expected.stages):
        rows.append(
            (
                str(index),
                stage.device,
                str(stage.num_layers),
                f"{stage.weight_bytes / 1024**3:.2f} GiB",
                "any" if stage.kv_tokens is None else str(stage.kv_tokens),
                f"{stage.time_us:.1f}",
                f"{stage.busy:.0%}",
            )
        )
    return rows


def _load_rows(expected: Forecast) -> Rows:
    rows: Rows = [("sequences", "running", "decode tokens/s")]
    for load in expected.loads:
        rate = _rate(load.decode_tokens_per_s)
        rows.append((str(load.num_sequences), str(load.num_running), rate))
    return rows


def _alternative_rows(plan: Plan) -> Rows:
    loads = [load.num_sequences for load in plan.forecast.loads]
    decode = (f"decode {load}" for load in (loads[0], loads[-1]))
    rows: Rows = [("", "layers", "KV tokens", *decode, "prefill", "output")]
    for change, expected in (
        ("this plan", plan.forecast),
        *((each.change, each.forecast) for each in plan.alternatives),
    ):
        rows.append(
            (
                change,
                "+".join(map(str, expected.layer_split)),
                str(expected.kv_tokens),
                _rate(expected.loads[0].decode_tokens_per_s),
                _rate(expected.loads[-1].decode_tokens_per_s),
                _rate(expected.prefill_tokens_per_s),
                _rate(expected.output_tokens_per_s),
            )
        )
    return rows


def _table(rows: Rows) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 100.0 else f"{tokens_per_s:.1f}"
