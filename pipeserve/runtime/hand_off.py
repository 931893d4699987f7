"""The transfers of a pipeline, each by the fastest way that is known to work.

Decided on the loading thread, before the stages start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from pipeserve.core.batch import PipelineFacts
from pipeserve.core.loading import LoadNotice, OnProgress
from pipeserve.errors import ConfigError
from pipeserve.runtime.peer_check import copies_arrive
from pipeserve.runtime.plan import PipelinePlan
from pipeserve.runtime.transfer import Parcels, Transfer, make_transfer

Way = Literal["auto", "peer", "staged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTransfers:
    """What crosses between the stages of one pipeline."""

    hidden: tuple[Transfer, ...]
    """Of hidden states, from each stage but the last to the next."""
    token_ids: Transfer
    """From the last stage to the first."""


def make_transfers(plan: PipelinePlan, way: Way, on_progress: OnProgress) -> PipelineTransfers:
    """Try each ordered pair of cards that hand over, and set up rings.

    Raises:
        ConfigError: peer copies were asked for, but do not arrive.
    """
    facts, devices = plan.facts, plan.devices
    pairs = [*pairwise(devices), (devices[-1], devices[0])]
    use_peer = {pair: _use_peer(*pair, way, on_progress) for pair in dict.fromkeys(pairs)}

    def make(parcels: Parcels, pair: tuple[torch.device, torch.device]) -> Transfer:
        return make_transfer(parcels, *pair, use_peer=use_peer[pair])

    hidden = Parcels(
        shape=(facts.max_batch_tokens, plan.model.hidden_size),
        dtype=torch.float32,
        depth=_ring_depth(facts),
    )
    token_ids = Parcels(shape=(facts.num_rows,), dtype=torch.int64, depth=_ring_depth(facts))
    return PipelineTransfers(
        hidden=tuple(make(hidden, pair) for pair in pairs[:-1]),
        token_ids=make(token_ids, pairs[-1]),
    )


def _ring_depth(facts: PipelineFacts) -> int:
    """As many micro-batches as are in flight, and the one being filled."""
    return facts.num_stages + facts.num_look_ahead + 1


def _use_peer(
    source: torch.device,
    target: torch.device,
    way: Way,
    on_progress: OnProgress,
    *,
    arrive: Callable[[torch.device, torch.device], bool] = copies_arrive,
) -> bool:
    if source == target or not source.type == target.type == "cuda":
        return False
    if way == "staged":
        return False
    if arrive(source, target):
        return True
    problem = f"copies from {source} straight to {target} do not arrive as they were sent"
    if way == "peer":
        raise ConfigError(f'{problem}: set hand_off to "auto" or "staged"')
    on_progress(LoadNotice(text=f"{problem}; they go through the host's memory, which is slower"))
    return False
