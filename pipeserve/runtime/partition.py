"""Partition: which layers each stage computes, and on which device, so that the slowest stage is as
fast as possible and every one fits its device.

Pure numbers; knows neither torch nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeserve.errors import ConfigError

SLACK = 0.01
"""Of cuts that are this close to the fastest, the one that holds most KV tokens is taken."""

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """What a model's weights take on a device."""

    layers: tuple[int, ...]
    embedding: int
    """Of the first stage."""
    head: int
    """Of the last stage."""
    shared: int
    """Of embedding and head together, where one stage has both and they are tied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCosts:
    """What layers cost on one device. Equal ones are interchangeable."""

    layer_s: tuple[float, ...]
    """Of each layer of the model; per output token of the mix, as all times here."""
    head_s: float
    """Paid by the last stage; negative where that spares it more of its last layer."""
    stage_s: float
    """Paid by every stage."""
    weights: WeightBytes
    kv_token_bytes: int
    """Keys and values of one token in one layer."""
    room_bytes: int | None
    """For weights and KV cache; None: more than enough."""
    kv_bytes: int | None
    """For the KV cache, as far as room_bytes has it; None: all that is left."""
    least_kv_bytes: int = 0
    """That must be left for it: what the options ask for."""

    def stage_times(self) -> Matrix:
        """[L + 1, L + 1]: seconds of layers [i, j), with the head where j is L."""
        times = _differences(self.layer_s) + self.stage_s
        times[:, -1] += self.head_s
        return times

    def stage_bytes(self) -> Matrix:
        """[L + 1, L + 1]: weights of layers [i, j), of embedding and head where they belong."""
        weights = self.weights
        num_bytes = _differences(weights.layers)
        num_bytes[0, :] += weights.embedding
        num_bytes[:, -1] += weights.head
        num_bytes[0, -1] -= weights.shared
        return num_bytes

    def stage_tokens(self) -> Matrix:
        """[L + 1, L + 1]: whole tokens of KV that fit beside layers [i, j), infinite without
        limits, below 0 where the memory is too small."""
        num_layers = len(self.layer_s)
        rooms = np.full((num_layers + 1, num_layers + 1), np.inf)
        if self.room_bytes is not None:
            rooms = self.room_bytes - self.stage_bytes()
            rooms = np.where(rooms < self.least_kv_bytes, np.minimum(rooms, -1.0), rooms)
        if self.kv_bytes is not None:
            rooms = np.minimum(rooms, self.kv_bytes)
        lengths = np.maximum(1, _differences((1,) * num_layers))
        return np.floor(rooms / (lengths * self.kv_token_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Stages in order."""

    order: tuple[int, ...]
    """Which of the devices each stage gets."""
    split: tuple[int, ...]
    """How many layers."""
    times_s: tuple[float, ...]
    """Of each stage, per output token."""
    tokens: tuple[float, ...]
    """Of KV that each stage can hold; below 0 where its memory is too small."""

    @property
    def slowest_s(self) -> float:
        return max(self.times_s)

    @property
    def num_tokens(self) -> float:
        """Of KV that all stages can hold."""
        return min(self.tokens)


def price(
    devices: Sequence[DeviceCosts], split: Sequence[int], order: Sequence[int] | None = None
) -> Partition:
    """What a split costs on these devices, in this order or their own."""
    order = tuple(range(len(split)) if order is None else order)
    spans = list(pairwise((0, *map(int, np.cumsum(split)))))
    return Partition(
        order=order,
        split=tuple(split),
        times_s=tuple(
            float(devices[which].stage_times()[span])
            for which, span in zip(order, spans, strict=True)
        ),
        tokens=tuple(
            float(devices[which].stage_tokens()[span])
            for which, span in zip(order, spans, strict=True)
        ),
    )


def best_partition(
    devices: Sequence[DeviceCosts], *, least_tokens: int, most_tokens: int
) -> Partition | None:
    """Of all orders of the devices and all cuts, the one whose slowest stage is the fastest, with
    room for least_tokens of KV on every stage; None where there is no such cut.

    Every device gets a stage and every stage a layer. Among cuts within SLACK of the fastest the
    one that holds most KV is taken, and of those again the fastest. most_tokens: more is of no use.

    Raises:
        ConfigError: more devices than layers.
    """
    check_stages(len(devices), num_layers=len(devices[0].layer_s))
    kinds = list(dict.fromkeys(devices))
    counts = tuple(devices.count(kind) for kind in kinds)
    times = [kind.stage_times() for kind in kinds]
    tokens = [np.minimum(kind.stage_tokens(), most_tokens) for kind in kinds]

    def fastest(least: float) -> tuple[float, list[_Stage]] | None:
        fits = [
            np.where(own >= least, time, np.inf) for time, own in zip(times, tokens, strict=True)
        ]
        return _least_maximum(fits, counts)

    first = fastest(least_tokens)
    if first is None:
        return None
    bound_s = first[0] * (1 + SLACK)
    lacking = [
        np.where((time <= bound_s) & (own >= least_tokens), -own, np.inf)
        for time, own in zip(times, tokens, strict=True)
    ]
    roomiest = _least_maximum(lacking, counts)
    assert roomiest is not None, "the fastest is among them"
    final = fastest(-roomiest[0])
    assert final is not None, "the roomiest is among them"
    split = tuple(stage.end - stage.first for stage in final[1])
    order = _assign([stage.kind for stage in final[1]], [kinds.index(each) for each in devices])
    return price(devices, split, order)


@dataclass(frozen=True, slots=True)
class _Stage:
    kind: int
    first: int
    end: int


def _least_maximum(
    values: Sequence[Matrix], counts: tuple[int, ...]
) -> tuple[float, list[_Stage]] | None:
    """The way to cut [0, L) into one piece for each device, of which there are counts[k] of each
    kind k, in any order, that makes the largest of the pieces' values least.

    values: [L + 1, L + 1] of each kind, of the piece [i, j); infinite where it must not be. By
    dynamic programming over how many devices of each kind are used, and the layers they share.
    None if every way has an infinite piece.
    """
    num_layers = len(values[0]) - 1
    lower = np.tril_indices(num_layers + 1)
    values = [value.copy() for value in values]
    for value in values:
        value[lower] = np.inf  # a piece has at least one layer
    none_used = (0,) * len(counts)
    best = {none_used: np.where(np.arange(num_layers + 1) == 0, -np.inf, np.inf)}
    last_pieces: dict[tuple[int, ...], list[_Stage]] = {}
    for used in _subsets(counts):
        if used != none_used:
            best[used], last_pieces[used] = _add_piece(values, best, used)
    least = float(best[counts][num_layers])
    if not np.isfinite(least):
        return None
    stages, used, end = [], counts, num_layers
    while end > 0:
        stages.append(last_pieces[used][end])
        used, end = _without(used, stages[-1].kind), stages[-1].first
    return least, stages[::-1]


def _add_piece(
    values: Sequence[Matrix], best: Mapping[tuple[int, ...], Vector], used: tuple[int, ...]
) -> tuple[Vector, list[_Stage]]:
    """For each end: the least possible maximum where these devices share [0, end), and the last
    piece of that way."""
    ends = np.arange(len(values[0]))
    least = np.full(len(ends), np.inf)
    firsts, kinds = np.zeros_like(ends), np.zeros_like(ends)
    for kind in reversed(range(len(used))):  # of equals, the order that was given
        if used[kind] == 0:
            continue
        largest = np.maximum(best[_without(used, kind)][:, None], values[kind])
        starts = largest.argmin(axis=0)
        found = largest[starts, ends]
        better = found < least
        least = np.where(better, found, least)
        firsts[better], kinds[better] = starts[better], kind
    pieces = zip(kinds.tolist(), firsts.tolist(), ends.tolist(), strict=True)
    return least, [_Stage(kind, first, end) for kind, first, end in pieces]


def _subsets(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ways to use some of them, smaller ones before those they are part of."""
    return [tuple(map(int, used)) for used in np.ndindex(*(count + 1 for count in counts))]


def _without(used: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*used[:kind], used[kind] - 1, *used[kind + 1 :])


def _assign(kinds: Sequence[int], kind_of_device: Sequence[int]) -> tuple[int, ...]:
    """A device of its kind for each stage, equal ones in the order in which they were given."""
    left = list(range(len(kind_of_device)))
    order = []
    for kind in kinds:
        device = next(index for index in left if kind_of_device[index] == kind)
        left.remove(device)
        order.append(device)
    return tuple(order)


def _differences(values: Sequence[float]) -> Matrix:
    """[L + 1, L + 1]: the sum of values [i, j)."""
    before = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    return before[None, :] - before[:, None]


def check_stages(num_stages: int, *, num_layers: int) -> None:
    """Raises ConfigError where there are more stages than layers."""
    if num_stages > num_layers:
        raise ConfigError(
            f"devices lists {num_stages} stages, but the model has {num_layers} layers; "
            f"list at most {num_layers} devices"
        )


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
