"""Workloads of real stages: how many sequences of which lengths, submitted when.

Values only; imports no torch, so that the command line can build them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeserve.bench import arrivals
from pipeserve.bench.arrivals import Lengths, Shape, Trace
from pipeserve.bench.chained import Chained
from pipeserve.config import Config
from pipeserve.errors import ConfigError

REQUESTS_PER_CLIENT = 4
ARRIVALS_S = 30.0
"""For so long requests arrive at a rate, where their number is not given."""
LEAST_ROWS = 64
"""max_num_seqs where neither an option nor the workload asks for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A closed batch: all sequences are submitted at once, and the run ends with the last."""

    num_sequences: int

    @property
    def num_concurrent(self) -> int:
        return self.num_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """A closed loop: each client submits its next sequence when its last one has ended."""

    num_clients: int
    num_sequences: int
    """Of all clients together."""

    @property
    def num_concurrent(self) -> int:
        return self.num_clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent arrivals, whether those before have ended or not."""

    rate_per_s: float
    """On average."""
    num_sequences: int

    @property
    def num_concurrent(self) -> None:
        """Whatever the rate makes it."""
        return None


Load = Batch | Clients | Poisson


def timed_clients(num_clients: int) -> Clients:
    """For a run that time ends: more requests than will be sent, but no more than need be made
    up."""
    return Clients(num_clients=num_clients, num_sequences=max(12 * num_clients, 512))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Runs that follow each other on one engine, all with lengths of the same kind."""

    prompt: Lengths
    output: Lengths
    """No token ends a sequence early."""
    loads: tuple[Load, ...]
    num_shared_tokens: int = 0
    """All prompts that are longer begin with the same so many tokens."""
    seed: int = 0
    """Of lengths and arrivals."""
    traced: tuple[int, ...] = ()
    """After the runs, a steady decode of so many sequences is traced kernel by kernel."""
    chained: Chained | None = None
    """Of each batch, so many sequences are drawn by a chain of samplers."""

    def make_trace(self, load: Load) -> Trace:
        """The requests of one of its runs."""
        shape = Shape(
            num_requests=load.num_sequences, prompt=self.prompt, output=self.output, seed=self.seed
        )
        match load:
            case Batch():
                return arrivals.bursts(load.num_sequences, 1.0, shape)
            case Clients():
                return arrivals.clients(load.num_clients, shape)
            case Poisson():
                return arrivals.poisson(load.rate_per_s, shape)

    def describe(self, load: Load) -> str:
        """One of its runs, for people."""
        match load:
            case Batch():
                kind = f"{load.num_sequences} sequences at once"
            case Clients():
                kind = f"{load.num_clients} clients"
            case Poisson():
                kind = f"{load.rate_per_s:g} requests/s"
        return f"{kind}, {self.describe_lengths()}"

    def describe_lengths(self) -> str:
        """Of all its runs, for people."""
        shared = f" ({self.num_shared_tokens} shared)" if self.num_shared_tokens else ""
        chained = self.chained
        beside = f", {chained.num_sequences} sequences by {chained.name}" if chained else ""
        return f"{self.prompt} prompt{shared} + {self.output} output tokens{beside}"


def make_workload(
    *,
    prompt: Lengths,
    output: Lengths,
    batches: tuple[int, ...],
    num_clients: int | None,
    num_requests: int | None,
    rate_per_s: float | None = None,
    num_shared_tokens: int = 0,
    chained: Chained | None = None,
) -> Workload:
    """Batches one after another, or clients where num_clients is given, or arrivals at a rate.

    Raises:
        ConfigError: requests without clients and rate, too few for a steady state, or no rate; or
            chained beside either, or more than a batch.
    """
    if num_clients is None and rate_per_s is None and num_requests is not None:
        raise ConfigError("requests is for a closed loop or arrivals: give clients or poisson too")
    loads: tuple[Load, ...] = tuple(Batch(num_sequences=size) for size in batches)
    if rate_per_s is not None:
        if not 0 < rate_per_s < float("inf"):
            raise ConfigError(f"poisson is {rate_per_s}; give arrivals per second above 0")
        num_sequences = num_requests or max(1, round(ARRIVALS_S * rate_per_s))
        loads = (Poisson(rate_per_s=rate_per_s, num_sequences=num_sequences),)
    if num_clients is not None:
        num_sequences = num_requests or REQUESTS_PER_CLIENT * num_clients
        if num_sequences < 2 * num_clients:
            raise ConfigError(
                f"requests is {num_sequences} and clients {num_clients}; a steady state needs at "
                "least 2 requests per client"
            )
        loads = (Clients(num_clients=num_clients, num_sequences=num_sequences),)
    if chained is not None and any(
        not isinstance(load, Batch) or load.num_sequences < chained.num_sequences for load in loads
    ):
        raise ConfigError(
            f"samplers is for {chained.num_sequences} sequences of each batch: give no clients "
            "or poisson, and larger batches"
        )
    return Workload(
        prompt=prompt,
        output=output,
        loads=loads,
        num_shared_tokens=num_shared_tokens,
        chained=chained,
    )


def missing_options(workload: Workload, config: Config) -> dict[str, int]:
    """Options that nobody set and that must fit this workload."""
    sizes = [load.num_concurrent for load in workload.loads if load.num_concurrent is not None]
    if config.max_num_seqs is not None or not sizes:
        return {}
    return {"max_num_seqs": max(LEAST_ROWS, *sizes)}
