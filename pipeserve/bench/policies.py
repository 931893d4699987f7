"""Policies to compare: our scheduler, the same without one of its parts, and the plain one.

The same objects schedule in the simulator and on real stages. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from pipeserve.bench.plain_scheduler import PlainScheduler
from pipeserve.core.batch import PipelineFacts
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.scheduler import Scheduler
from pipeserve.errors import ConfigError

MakeScheduler = Callable[[PipelineFacts, AdmissionPolicy], Scheduler]

OURS = "ours"


def _without(**left_out: bool) -> MakeScheduler:
    def make(facts: PipelineFacts, policy: AdmissionPolicy) -> Scheduler:
        return Scheduler(facts, replace(policy, **left_out))

    return make


def _without_look_ahead(facts: PipelineFacts, policy: AdmissionPolicy) -> Scheduler:
    return Scheduler(replace(facts, num_look_ahead=0), policy)


POLICIES: Mapping[str, MakeScheduler] = MappingProxyType(
    {
        OURS: Scheduler,
        "no-balancing": _without(balances_cohorts=False),
        "no-throttling": _without(throttles_prefill=False),
        "no-attention-cost": _without(weighs_attention=False),
        "no-mixing": _without(mixes_prefill=False),
        "no-look-ahead": _without_look_ahead,
        "no-reserve": _without(keeps_reserve=False),
        "no-prefix-cache": _without(shares_prefixes=False),
        "plain": PlainScheduler,
    }
)
"""By the names that the commands take. What is left out: cohorts of equal size; prompts spread over
the micro-batches to come; smaller chunks late in a long prompt; prompt chunks beside decode rows;
steps queued ahead of their tokens; KV held back for outputs; reading others' prompt blocks."""


def choose_policies(text: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        ConfigError: one of them is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"policies has {name!r}; the known are {', '.join(POLICIES)}")
    return names
