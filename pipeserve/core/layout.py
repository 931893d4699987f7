"""What was found out about the ways to lay a model out over several devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutForecast:
    """One way: so many replicas, each a pipeline over its share of the devices."""

    num_replicas: int
    output_tokens_per_s: float | None
    """Of all replicas at saturation; None where a share cannot hold the model and the KV cache
    of a full context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSurvey:
    """What must be known before a layout is chosen."""

    devices: tuple[str, ...]
    """Those that the option `devices` means here."""
    forecasts: tuple[LayoutForecast, ...]
    """Of every way to share the devices out evenly; empty where there is nothing to choose."""
