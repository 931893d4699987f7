"""Workloads of `pipeserve bench engine`: how many sequences of which lengths, submitted when.

Values only; imports no torch, so that the command line can build them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeserve.config import Config
from pipeserve.errors import ConfigError

REQUESTS_PER_CLIENT = 4
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


Load = Batch | Clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Runs that follow each other on one engine, all of the same lengths."""

    num_prompt_tokens: int
    num_output_tokens: int
    """Of every sequence: no token ends one early."""
    loads: tuple[Load, ...]
    traced: tuple[int, ...] = ()
    """After the runs, a steady decode of so many sequences is traced kernel by kernel."""

    @property
    def num_concurrent(self) -> int:
        """Most sequences that run at once in any of the runs."""
        return max(load.num_concurrent for load in self.loads)

    def describe(self, load: Load) -> str:
        """One of its runs, for people."""
        kind = "clients" if isinstance(load, Clients) else "sequences at once"
        return (
            f"{load.num_concurrent} {kind}, {self.num_prompt_tokens} prompt + "
            f"{self.num_output_tokens} output tokens"
        )


def make_workload(
    *,
    num_prompt_tokens: int,
    num_output_tokens: int,
    batches: tuple[int, ...],
    num_clients: int | None,
    num_requests: int | None,
) -> Workload:
    """Batches one after another, or clients where num_clients is given.

    Raises:
        ConfigError: requests without clients, or too few for a steady state.
    """
    if num_clients is None and num_requests is not None:
        raise ConfigError("requests is for a closed loop: give clients too")
    loads: tuple[Load, ...] = tuple(Batch(num_sequences=size) for size in batches)
    if num_clients is not None:
        num_sequences = num_requests or REQUESTS_PER_CLIENT * num_clients
        if num_sequences < 2 * num_clients:
            raise ConfigError(
                f"requests is {num_sequences} and clients {num_clients}; a steady state needs at "
                "least 2 requests per client"
            )
        loads = (Clients(num_clients=num_clients, num_sequences=num_sequences),)
    return Workload(
        num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens, loads=loads
    )


def missing_options(workload: Workload, config: Config) -> dict[str, int]:
    """Options that nobody set and that must fit this workload."""
    if config.max_num_seqs is not None:
        return {}
    return {"max_num_seqs": max(LEAST_ROWS, workload.num_concurrent)}
