"""The transfers of a pipeline, each by the fastest way that is known to work.

Decided on the loading thread, before the stages start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Literal

import torch

from pipeserve.core.batch import PipelineFacts
from pipeserve.core.loading import LoadNotice, OnProgress
from pipeserve.errors import ConfigError
from pipeserve.runtime.peer_check import copies_arrive
from pipeserve.runtime.plan import PipelinePlan
from pipeserve.runtime.transfer import Parcels, Transfer, make_transfer

Way = Literal["auto", "peer", "staged"]
Pair = tuple[torch.device, torch.device]
"""From the first to the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTransfers:
    """What crosses between the stages of one pipeline."""

    hidden: tuple[Transfer, ...]
    """Of hidden states, from each stage but the last to the next."""
    token_ids: Transfer
    """From the last stage to the first."""


def make_transfers(plan: PipelinePlan, way: Way, on_progress: OnProgress) -> PipelineTransfers:
    """Try peer copies between all of the plan's cards, and set up rings.

    Raises:
        ConfigError: peer copies were asked for, but do not arrive.
    """
    facts, devices = plan.facts, plan.devices
    pairs = [*pairwise(devices), (devices[-1], devices[0])]
    peers = _find_peers(pairs, way, on_progress)

    def make(parcels: Parcels, pair: Pair) -> Transfer:
        return make_transfer(parcels, *pair, use_peer=pair in peers)

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


def _find_peers(
    pairs: Collection[Pair],
    way: Way,
    on_progress: OnProgress,
    *,
    arrive: Callable[[torch.device, torch.device], bool] = copies_arrive,
) -> frozenset[Pair]:
    """The ordered pairs of cards between which peer copies are to be used.

    pairs: which hand over. All pairs of their cards are tried, whatever hands over between them: a
    card that corrupts data is worth knowing of before the split or the order changes.
    """
    if way == "staged":  # the way out where merely trying does harm
        return frozenset()
    cards = dict.fromkeys(device for pair in pairs for device in pair if device.type == "cuda")
    peers = set()
    for pair in permutations(cards, 2):
        if arrive(*pair):
            peers.add(pair)
            continue
        problem = f"copies from {pair[0]} straight to {pair[1]} do not arrive as they were sent"
        if pair not in pairs:
            effect = "no stage hands over that way"
        elif way == "peer":
            raise ConfigError(f'{problem}: set hand_off to "auto" or "staged"')
        else:
            effect = "they go through the host's memory, which is slower"
        on_progress(LoadNotice(text=f"{problem}; {effect}"))
    return frozenset(peers)
