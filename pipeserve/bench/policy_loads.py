"""Loads under which policies are compared on real stages, and what is left out under each.

Values only; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeserve.bench.arrivals import Lengths
from pipeserve.bench.policies import OURS
from pipeserve.bench.workload import Clients, Load, Poisson, Workload, timed_clients
from pipeserve.core.batch import PipelineFacts
from pipeserve.errors import ConfigError

POISSON_SHARE = 0.8
"""Of the requests per second that the first policy completed for the clients of the first load."""
TIGHT_SHARE = 0.25
"""Of the KV that all clients of the load "tight" would want at most."""
CPU_SHORTER = 8
"""So many times shorter than on GPUs are all lengths where a stage is on a CPU."""
CPU_CLIENTS = 8
GPU_CLIENTS = 128
"""For each stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoad:
    """What the clients send, and which policies it tells apart."""

    name: str
    prompt: str
    output: str
    """Both as Lengths.parse, for GPUs."""
    policies: tuple[str, ...]
    """Ours first."""
    num_shared: int = 0
    """Tokens that all prompts begin with."""
    is_open: bool = False
    """Requests come at a rate that ours can serve, whoever is still waiting."""
    is_tight: bool = False
    """The KV cache holds fewer sequences than there are clients."""
    lasts: int = 1
    """Times as long as other loads: until every client has its first token, it is not steady."""


LOADS = (
    PolicyLoad(name="uniform", prompt="512", output="128", policies=(OURS, "plain")),
    PolicyLoad(
        name="varied",
        prompt="512",
        output="64-256",
        policies=(OURS, "plain", "no-throttling", "no-mixing", "no-balancing", "no-look-ahead"),
    ),
    PolicyLoad(
        name="mixed",
        prompt="64-8192",
        output="64-256",
        policies=(OURS, "plain", "no-throttling", "no-attention-cost"),
        lasts=2,
    ),
    PolicyLoad(name="poisson", prompt="512", output="128", policies=(OURS, "plain"), is_open=True),
    PolicyLoad(
        name="shared",
        prompt="512",
        output="128",
        policies=(OURS, "no-prefix-cache"),
        num_shared=448,
    ),
    PolicyLoad(
        name="tight",
        prompt="512",
        output="64-1024",
        policies=(OURS, "no-reserve"),
        is_tight=True,
    ),
)


def choose_loads(text: str) -> list[PolicyLoad]:
    """The loads of a list with commas, in the order of LOADS.

    Raises:
        ConfigError: one of them is unknown, or has no rate without the first.
    """
    wanted = [name.strip() for name in text.split(",")]
    known = [load.name for load in LOADS]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"loads has {name!r}; the known are {', '.join(known)}")
    chosen = [load for load in LOADS if load.name in wanted]
    if any(load.is_open for load in chosen) and LOADS[0] not in chosen:
        raise ConfigError(
            f"loads is {text!r}; the rate of arrivals is a share of what {LOADS[0].name} gives: "
            "add that"
        )
    return chosen


def shorten(lengths: str, factor: int) -> Lengths:
    """So many times shorter, but not below 1."""
    parsed = Lengths.parse(lengths)
    return replace(parsed, choices=tuple(max(1, each // factor) for each in parsed.choices))


def make_workload(
    load: PolicyLoad, *, num_clients: int, shorter: int, rate_per_s: float | None, run_s: float
) -> Workload:
    """One run; run_s: of a load that lasts once. rate_per_s: that of an open load."""
    how: Load = timed_clients(num_clients)
    if load.is_open:
        assert rate_per_s is not None, "an open load has a rate"
        num_sequences = max(2, round(rate_per_s * run_s * load.lasts))
        how = Poisson(rate_per_s=rate_per_s, num_sequences=num_sequences)
    return Workload(
        prompt=shorten(load.prompt, shorter),
        output=shorten(load.output, shorter),
        loads=(how,),
        num_shared_tokens=load.num_shared // shorter,
    )


def longest_sequence(loads: Iterable[PolicyLoad], shorter: int) -> int:
    """Tokens of the longest prompt and output that may come together."""
    return max(
        shorten(load.prompt, shorter).longest + shorten(load.output, shorter).longest
        for load in loads
    )


def limit_facts(facts: PipelineFacts, load: PolicyLoad, workload: Workload) -> PipelineFacts:
    """With the KV cache of a tight load; it never has less than one sequence can want."""
    (clients,) = workload.loads
    if not load.is_tight or not isinstance(clients, Clients):
        return facts
    row_blocks = -(-(workload.prompt.longest + workload.output.longest) // facts.block_size)
    wanted = round(TIGHT_SHARE * clients.num_clients * row_blocks)
    num_blocks = min(facts.num_blocks, max(row_blocks, wanted))
    context_length = min(facts.context_length, num_blocks * facts.block_size)
    return replace(facts, num_blocks=num_blocks, context_length=context_length)


def default_clients(devices: Sequence[str]) -> int:
    """For all stages together."""
    on_cpu = "cpu" in devices
    return len(devices) * (CPU_CLIENTS if on_cpu else GPU_CLIENTS)


def default_shorter(devices: Sequence[str]) -> int:
    """By what lengths are divided."""
    return CPU_SHORTER if "cpu" in devices else 1
