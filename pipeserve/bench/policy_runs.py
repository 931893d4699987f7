"""`pipeserve bench policies`: every load under every policy, in wall time, on one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeserve.bench.arrivals import Lengths
from pipeserve.bench.engine import check_room
from pipeserve.bench.policies import OURS
from pipeserve.bench.policy_loads import (
    LOADS,
    POISSON_SHARE,
    PolicyLoad,
    limit_facts,
    make_workload,
)
from pipeserve.bench.recording import Moment, Recording
from pipeserve.bench.rig import Rig, loaded_rig
from pipeserve.bench.schedule_figures import ScheduleFigures, make_figures
from pipeserve.bench.schedule_record import make_run
from pipeserve.bench.workload import Batch, Workload
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the command."""

    loads: Sequence[PolicyLoad]
    policies: Sequence[str] | None
    """Under every load; None: those of each load."""
    num_clients: int
    shorter: int
    """All lengths are divided by it."""
    run_s: float
    """Clients submit for so long, times what the load lasts; then what runs comes to its end."""
    num_rounds: int
    """Runs of each policy, in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCase:
    """One load under one policy, once."""

    load: str
    about: str
    policy: str
    round: int
    figures: ScheduleFigures
    """Latencies are of the steady time."""
    cached_share: float
    """Of the prompt tokens, those that were read from the prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """Everything that one command measured."""

    about: str
    facts: PipelineFacts
    run_s: float
    cases: tuple[PolicyCase, ...]


def compare(
    config: Config, options: Options, *, on_case: Callable[[PolicyCase], None]
) -> PolicyResult:
    """Load the model and run everything; on_case sees each run at once.

    Raises:
        PipeserveError: the model cannot be had or served, options or loads do not fit it, or a
            stage failed.
    """
    with loaded_rig(config) as rig:
        cases = []
        for case in compare_on(rig, options):
            on_case(case)
            cases.append(case)
        return PolicyResult(
            about=rig.describe(), facts=rig.facts, run_s=options.run_s, cases=tuple(cases)
        )


def compare_on(rig: Rig, options: Options) -> Iterator[PolicyCase]:
    """The runs, in the order of the loads."""
    _warm_up(rig, options)
    rate_per_s: float | None = None
    for load in options.loads:
        workload = make_workload(
            load,
            num_clients=options.num_clients,
            shorter=options.shorter,
            rate_per_s=rate_per_s,
            run_s=options.run_s,
        )
        for case in _run_load(rig, load, workload, options):
            if load is LOADS[0] and rate_per_s is None:
                rate_per_s = round(POISSON_SHARE * _requests_per_s(case.figures, workload), 3)
            yield case


def _warm_up(rig: Rig, options: Options) -> None:
    """Once for all: the first load's prompts at once, and the longest prompt of any load."""
    first = make_workload(
        LOADS[0],
        num_clients=options.num_clients,
        shorter=options.shorter,
        rate_per_s=None,
        run_s=options.run_s,
    )
    workloads = [
        make_workload(
            load,
            num_clients=1,
            shorter=options.shorter,
            rate_per_s=1.0,
            run_s=options.run_s,
        )
        for load in options.loads
    ]
    for workload in workloads:
        check_room(workload, rig.facts)
    longest = max(workload.prompt.longest for workload in workloads)
    with rig.running(OURS) as runner:
        runner.warm_up(first, Batch(num_sequences=options.num_clients))
        runner.warm_up(replace(first, prompt=Lengths(choices=(longest,))), Batch(num_sequences=1))


def _run_load(
    rig: Rig, load: PolicyLoad, workload: Workload, options: Options
) -> Iterator[PolicyCase]:
    (how,) = workload.loads
    facts = limit_facts(rig.facts, load, workload)
    about = workload.describe(how)
    if load.is_tight:
        about += f", {facts.num_blocks * facts.block_size} KV tokens"
    for index in range(options.num_rounds):
        for policy in options.policies or load.policies:
            with rig.running(policy, facts) as runner:
                recording = runner.run(workload, how, most_s=options.run_s * load.lasts)
            run = make_run(recording, rig.timeline.steps())
            preemptions, cached_share = _counted(recording)
            yield PolicyCase(
                load=load.name,
                about=about,
                policy=policy,
                round=index,
                figures=make_figures(run, num_preemptions=preemptions, skips_start=True),
                cached_share=cached_share,
            )


def _requests_per_s(figures: ScheduleFigures, workload: Workload) -> float:
    """Of a load whose requests are all alike."""
    return figures.steady_tokens_per_s / (workload.prompt.longest + workload.output.longest)


def _counted(recording: Recording) -> tuple[int, float]:
    """Preemptions, and the share of prompt tokens that was cached."""
    stats = recording.marks[Moment.END].stats  # of an engine that ran nothing before
    return stats.num_preemptions, stats.num_prefix_hits / max(1, stats.num_prefix_queries)
