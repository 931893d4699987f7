"""What each way to share several GPUs out is expected to bring: the numbers behind layout = "auto".

Runs before a model is loaded, in the process that has torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeserve.config import Config
from pipeserve.core.layout import LayoutForecast, LayoutSurvey
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from pipeserve.runtime.cost_model import OUTPUT_TOKENS, PROMPT_TOKENS
from pipeserve.runtime.devices import resolve_devices
from pipeserve.runtime.placement import best_cut, check_options
from pipeserve.runtime.plan import first_facts
from pipeserve.runtime.survey import Survey, survey_devices


def find_devices(gguf_file: GGUFFile, config: Config) -> tuple[str, ...]:
    """The names of those that the option `devices` means for this model here.

    Raises:
        ConfigError, ModelError: a device is not here, or the file cannot be served.
    """
    model = check_model(gguf_file)
    return tuple(map(str, resolve_devices(config.devices, num_layers=model.num_layers)))


def survey_layouts(gguf_file: GGUFFile, config: Config) -> LayoutSurvey:
    """Measure the devices, as far as their times are not known, and forecast every layout.

    Raises:
        ConfigError: options do not fit the model or this machine.
        ModelError: the file cannot be served.
    """
    model = check_model(gguf_file)
    targets = resolve_devices(config.devices, num_layers=model.num_layers)
    check_options(model, config, num_stages=len(targets))
    survey = survey_devices(gguf_file, model, config, targets)
    return LayoutSurvey(
        devices=tuple(map(str, targets)), forecasts=forecast_layouts(survey, config)
    )


def forecast_layouts(survey: Survey, config: Config) -> tuple[LayoutForecast, ...]:
    """Of every number of replicas that divides the devices evenly, the pipeline (1) first."""
    num_devices = len(survey.devices)
    return tuple(
        LayoutForecast(
            num_replicas=num_replicas,
            output_tokens_per_s=_total(_shares(survey, config, num_devices // num_replicas)),
        )
        for num_replicas in range(1, num_devices + 1)
        if num_devices % num_replicas == 0
    )


def _shares(survey: Survey, config: Config, size: int) -> list[Survey]:
    """Of replicas of so many devices, with the rows that each of them would have."""
    parts = [survey.devices[first : first + size] for first in range(0, len(survey.devices), size)]
    return [
        replace(
            survey,
            devices=part,
            facts=first_facts(survey.model, config, [each.device for each in part]),
        )
        for part in parts
    ]


def _total(shares: Sequence[Survey]) -> float | None:
    rates = [_output_tokens_per_s(each) for each in shares]
    fitting = [rate for rate in rates if rate is not None]
    return sum(fitting) if len(fitting) == len(rates) else None


def _output_tokens_per_s(share: Survey) -> float | None:
    """At saturation: with as many rows in use as the KV cache holds sequences of the usual length;
    None where it does not hold one of the whole context."""
    cut = best_cut(share)
    if cut is None or cut.num_tokens < share.facts.context_length:
        return None
    num_rows = min(share.facts.num_rows, cut.num_tokens // (PROMPT_TOKENS + OUTPUT_TOKENS))
    facts = replace(share.facts, num_rows=max(1, int(num_rows)))
    saturated = replace(share, facts=facts)
    cut = best_cut(saturated)
    return None if cut is None else 1.0 / cut.slowest_s
