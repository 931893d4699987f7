"""Partition: which layers each stage computes, so that the slowest stage is as fast as possible.

Pure functions of costs, whatever their unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from pipeserve.errors import ConfigError
from pipeserve.models.config import ModelConfig
from pipeserve.models.loader import LayerRange

_LAYER_OVERHEAD = 2_500_000
"""Weights that could be read in the time of a layer's norms, attention and calls. Measured on one
core at 4 rows: 1.7 ms for a layer of 3.5 M weights, 8.4 ms for a head of 28.3 M; rounded up, since
prefill passes through the layers with many rows and through the head with few."""


def layer_cost(model: ModelConfig) -> int:
    """What one layer's time on a CPU follows, in weights: its products read each one once."""
    rows = 2 * (model.attention_size + model.kv_size) + 3 * model.ffn_size
    return model.hidden_size * rows + _LAYER_OVERHEAD


def head_cost(model: ModelConfig) -> int:
    """The output head's, in the same unit. The embedding reads one line per token: nothing."""
    return model.hidden_size * model.vocab_size


def cut_layers(
    layer_costs: Sequence[float], *, head_cost: float, num_stages: int
) -> tuple[int, ...]:
    """Layers per stage, in order, with the least possible cost of the dearest stage.

    Every stage gets at least one layer, the last one the head as well. Of equally good cuts the
    one with fewer layers on earlier stages is taken.

    Raises:
        ConfigError: more stages than layers.
    """
    num_layers = len(layer_costs)
    if num_stages > num_layers:
        raise ConfigError(
            f"devices lists {num_stages} stages, but the model has {num_layers} layers; "
            f"list at most {num_layers} devices"
        )
    before = list(accumulate(layer_costs, initial=0.0))
    # best[end]: the cost of the dearest stage so far and where each ends, if they share [0, end).
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        extra = head_cost if stage == num_stages - 1 else 0.0
        best = {
            end: min(
                (max(dearest, before[end] - before[start] + extra), (*ends, end))
                for start, (dearest, ends) in best.items()
                if start < end
            )
            for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
        }
    _, ends = best[num_layers]
    return tuple(end - start for start, end in pairwise((0, *ends)))


def check_split(layer_split: Sequence[int], *, num_layers: int, num_stages: int) -> None:
    """Raises ConfigError where the user's split does not fit the model or the devices."""
    shown = ", ".join(map(str, layer_split))
    if len(layer_split) != num_stages:
        raise ConfigError(
            f"layer_split is [{shown}], {len(layer_split)} numbers for {num_stages} devices; "
            "give one number per device"
        )
    if min(layer_split) < 1:
        raise ConfigError(f"layer_split is [{shown}]; every stage needs at least 1 layer")
    if sum(layer_split) != num_layers:
        raise ConfigError(
            f"layer_split is [{shown}], {sum(layer_split)} layers together, but the model has "
            f"{num_layers}"
        )


def layer_ranges(layer_split: Sequence[int]) -> tuple[LayerRange, ...]:
    """The layers of each stage, from their numbers."""
    num_layers = sum(layer_split)
    return tuple(
        LayerRange(first=first, end=end, num_layers=num_layers)
        for first, end in pairwise(accumulate(layer_split, initial=0))
    )
