"""Layout: one pipeline over all devices, or replicas of the model on shares of them.

Decides from the options and what was found out about the devices; loads and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeserve.config import Config
from pipeserve.core.layout import LayoutForecast, LayoutSurvey
from pipeserve.errors import ConfigError

LEAST_GAIN = 1.05
"""Of output tokens/s over a layout with fewer replicas, which hold fewer copies of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What is to be loaded."""

    replicas: tuple[Config, ...]
    """The options of each replica."""
    reason: str
    """For people."""


def needs_survey(config: Config, *, may_have_several_gpus: bool) -> bool:
    """Whether the options leave open what only a look at the devices can tell.

    may_have_several_gpus: False where devices = ["auto"] is known to mean one GPU or CPU stages.
    """
    if config.devices != ("auto",):
        return is_open(config, config.devices)
    if config.layout == "replicas" or config.replicas is not None or config.stages is not None:
        return True  # on how many devices?
    return may_have_several_gpus and is_open(config, config.devices)


def is_open(config: Config, devices: Sequence[str]) -> bool:
    """Whether layout = "auto" may choose: every device is a GPU of its own, and no layer_split was
    made for all of them."""
    are_gpus = "cpu" not in devices and len(set(devices)) == len(devices)
    is_several = len(devices) > 1 or devices == ("auto",)
    return (
        config.layout == "auto"
        and config.replicas is None
        and config.stages is None
        and config.layer_split is None
        and are_gpus
        and is_several
    )


def choose_layout(config: Config, survey: LayoutSurvey | None) -> Layout:
    """How many replicas there are, and the options of each; devices are dealt out in order.

    survey: where needs_survey asked for one.

    Raises:
        ConfigError: replicas, stages and memory limits do not go with the devices that were found,
            or replicas share a GPU without a limit.
    """
    devices = config.devices if survey is None else survey.devices
    if devices == ("auto",):
        return Layout(replicas=(config,), reason="nothing asks for replicas")
    try:
        wanted = config.count_replicas(len(devices))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if wanted is not None:
        reason = f"the options ask for it on {len(devices)} devices"
        return Layout(replicas=_deal_out(config, devices, wanted), reason=reason)
    if survey is None or not survey.forecasts:
        reason = "devices are not GPUs of their own, or layer_split is given"
        return Layout(replicas=(config,), reason=reason)
    best = _best(survey.forecasts)
    reason = "; ".join(_describe(each, len(devices)) for each in survey.forecasts)
    return Layout(replicas=_deal_out(config, devices, best.num_replicas), reason=reason)


def _best(forecasts: Sequence[LayoutForecast]) -> LayoutForecast:
    """The fewest replicas that nothing beats by LEAST_GAIN; one where nothing is known to fit."""
    best, *others = sorted(forecasts, key=lambda each: each.num_replicas)
    for other in others:
        rate, best_rate = other.output_tokens_per_s, best.output_tokens_per_s
        if rate is not None and (best_rate is None or rate > LEAST_GAIN * best_rate):
            best = other
    return best


def _describe(forecast: LayoutForecast, num_devices: int) -> str:
    num_stages = num_devices // forecast.num_replicas
    what = f"{forecast.num_replicas} x {num_stages} stages"
    if forecast.num_replicas == 1:
        what = f"a pipeline of {num_stages} stages"
    elif num_stages == 1:
        what = f"{forecast.num_replicas} replicas"
    rate = forecast.output_tokens_per_s
    if rate is None:
        return f"{what}: no room for the weights and a full context"
    return f"{what}: {rate:.0f} output tokens/s expected at saturation"


def _deal_out(config: Config, devices: Sequence[str], num_replicas: int) -> tuple[Config, ...]:
    if num_replicas == 1:
        return (config,)
    _check_sharing(config, devices)
    _check_limits(config, devices)
    size = len(devices) // num_replicas
    limits = config.memory_limit_bytes
    shares = []
    for first in range(0, len(devices), size):
        own = limits[first : first + size] if limits and len(limits) > 1 else limits
        shares.append(
            config.model_copy(
                update={
                    "devices": tuple(devices[first : first + size]),
                    "memory_limit_bytes": own,
                    "layout": "pipeline",
                    "replicas": None,
                    "stages": None,
                }
            )
        )
    return tuple(shares)


def _check_limits(config: Config, devices: Sequence[str]) -> None:
    """Before they are dealt out: a share would not tell that it got those of other devices."""
    count = len(config.memory_limit_bytes or (0,))
    if count not in (1, len(devices)):
        raise ConfigError(
            f"memory_limit_bytes has {count} values for {len(devices)} devices; give one for each "
            "device of all replicas, or one for all"
        )


def _check_sharing(config: Config, devices: Sequence[str]) -> None:
    """A replica that loads sees what is free on its GPUs, but not what others are about to take."""
    shared = [device for device in devices if device != "cpu" and devices.count(device) > 1]
    if shared and config.kv_cache_bytes is None and config.memory_limit_bytes is None:
        raise ConfigError(
            f"devices lists {shared[0]} more than once for replicas, each of which would take all "
            "of its memory; set kv_cache_bytes or memory_limit_bytes, or list it once"
        )
