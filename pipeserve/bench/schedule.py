"""`pipeserve bench schedule`: traces through the real scheduler and simulated stages.

In virtual time, so that a minute of two GPUs takes seconds here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeserve.bench import arrivals
from pipeserve.bench.arrivals import Lengths, Shape, Trace
from pipeserve.bench.policies import POLICIES, choose_policies
from pipeserve.bench.schedule_costs import H200_8B, CostModel, parse_costs, split_costs
from pipeserve.bench.schedule_figures import ScheduleFigures, make_figures
from pipeserve.bench.schedule_fit import Fit, fit_costs
from pipeserve.bench.schedule_policy import SimulatedPolicy
from pipeserve.bench.schedule_record import RecordedRun, read_runs
from pipeserve.bench.schedule_run import Run
from pipeserve.bench.schedule_simulator import simulate
from pipeserve.bench.workload import REQUESTS_PER_CLIENT
from pipeserve.core.batch import PipelineFacts
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.errors import ConfigError

MEASURED = "measured"
"""In place of a policy: what was recorded."""

DEFAULT_FACTS = PipelineFacts(
    num_stages=2,
    num_rows=256,
    num_blocks=16384,
    block_size=16,
    context_length=16,
    max_batch_tokens=2048,
    num_look_ahead=1,
    vocab_size=1,
)
"""Options of a GPU pipeline that are left out, and room for 262,144 tokens."""

DEFAULT_ADMISSION = AdmissionPolicy()

DEFAULT_REQUESTS = 1000
"""Of a trace without clients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the command; one of clients, poisson, bursts, trace and replay is given."""

    clients: int | None = None
    poisson: float | None = None
    """Arrivals per second."""
    bursts: str | None = None
    """N/S: so many arrivals at once, every so many seconds."""
    trace: Path | None = None
    replay: Path | None = None
    requests: int | None = None
    prompt: str = "512"
    output: str = "128"
    """Both as Lengths.parse."""
    seed: int = 0
    fit: Path | None = None
    costs: str | None = None
    """As parse_costs."""
    split: tuple[int, ...] | None = None
    policies: str = "ours,plain"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_tokens: int | None = None
    num_look_ahead: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One trace under one policy."""

    about: str
    policy: str
    """A key of POLICIES, or MEASURED."""
    figures: ScheduleFigures
    run: Run


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleResult:
    """Everything that one command found out."""

    costs: CostModel
    stage_errors: tuple[float, ...] | None
    """Of the fit; None where the costs were given."""
    cases: tuple[Case, ...]

    @property
    def simulated(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.policy != MEASURED)


def run(options: Options) -> ScheduleResult:
    """The command.

    Raises:
        ConfigError: an option or a file cannot be used; the text names it.
    """
    policies = choose_policies(options.policies)
    fitted = () if options.fit is None else read_runs(options.fit)
    fit = fit_costs([each.run for each in fitted]) if fitted else None
    costs = _choose_costs(options, fit)
    if options.replay is not None:
        recorded = read_runs(options.replay)
        cases = [case for each in recorded for case in replay(each, options, costs, policies)]
    else:
        about, trace = make_trace(options)
        facts = fitted[0].facts if fitted else DEFAULT_FACTS
        cases = list(run_trace(about, trace, change_facts(facts, options), costs, policies))
    errors = None if fit is None else fit.stage_errors
    return ScheduleResult(costs=costs, stage_errors=errors, cases=tuple(cases))


def _choose_costs(options: Options, fit: Fit | None) -> CostModel:
    if fit is None:
        whole = H200_8B if options.costs is None else parse_costs(options.costs)
        return split_costs(whole, options.split or (1, 1))
    if options.split is not None:
        raise ConfigError(
            f"split is {','.join(map(str, options.split))}, but --fit gives each stage's own "
            "costs; leave one of the two out"
        )
    return fit.costs


def make_trace(options: Options) -> tuple[str, Trace]:
    """What the options describe, in words and in full.

    Raises:
        ConfigError: a value is malformed or out of its range.
    """
    if options.trace is not None:
        return str(options.trace), arrivals.read_trace(options.trace)
    num_requests = options.requests or DEFAULT_REQUESTS
    if options.clients is not None:
        num_requests = options.requests or REQUESTS_PER_CLIENT * options.clients
    shape = Shape(
        num_requests=num_requests,
        prompt=Lengths.parse(options.prompt),
        output=Lengths.parse(options.output),
        seed=options.seed,
    )
    lengths = f"{options.prompt} prompt + {options.output} output tokens"
    if options.clients is not None:
        if num_requests < 2 * options.clients:
            raise ConfigError(
                f"requests is {num_requests} and clients {options.clients}; a steady state needs "
                "at least 2 requests per client"
            )
        return f"{options.clients} clients, {lengths}", arrivals.clients(options.clients, shape)
    if options.poisson is not None:
        if not 0 < options.poisson < float("inf"):
            raise ConfigError(f"poisson is {options.poisson}; give arrivals per second above 0")
        return f"{options.poisson:g} requests/s, {lengths}", arrivals.poisson(
            options.poisson, shape
        )
    size, period_s = _parse_bursts(options.bursts or "")
    return f"{size} requests every {period_s:g} s, {lengths}", arrivals.bursts(
        size, period_s, shape
    )


def _parse_bursts(text: str) -> tuple[int, float]:
    size, _, period = text.partition("/")
    try:
        values = (int(size), float(period))
    except ValueError:
        values = (0, 0.0)
    if values[0] < 1 or not 0 < values[1] < float("inf"):
        raise ConfigError(f"bursts is {text!r}; give arrivals/seconds, such as 64/2.5")
    return values


def change_facts(facts: PipelineFacts, options: Options) -> PipelineFacts:
    """With the options that are given."""
    kv_tokens = options.kv_tokens
    num_rows = options.max_num_seqs or facts.num_rows
    return replace(
        facts,
        num_rows=num_rows,
        max_batch_tokens=max(num_rows, options.max_num_batched_tokens or facts.max_batch_tokens),
        num_blocks=facts.num_blocks if kv_tokens is None else -(-kv_tokens // facts.block_size),
        num_look_ahead=(
            facts.num_look_ahead if options.num_look_ahead is None else options.num_look_ahead
        ),
    )


def fit_facts(facts: PipelineFacts, trace: Trace, *, num_stages: int) -> PipelineFacts:
    """The facts with that many stages and a context that holds every request.

    Raises:
        ConfigError: the KV cache does not hold the longest request.
    """
    longest = max(r.num_prompt_tokens + r.num_output_tokens for r in trace.requests)
    if longest > facts.num_blocks * facts.block_size:
        raise ConfigError(
            f"a request has {longest} tokens and the KV cache holds "
            f"{facts.num_blocks * facts.block_size}; raise --kv-tokens or shorten the requests"
        )
    return replace(facts, num_stages=num_stages, context_length=longest)


def run_trace(
    about: str,
    trace: Trace,
    facts: PipelineFacts,
    costs: CostModel,
    policies: Sequence[str],
    *,
    admission: AdmissionPolicy = DEFAULT_ADMISSION,
) -> tuple[Case, ...]:
    """The trace once under each policy. admission: what these are made from."""
    facts = fit_facts(facts, trace, num_stages=len(costs.stages))
    return tuple(
        _run_case(about, name, trace, SimulatedPolicy(POLICIES[name](facts, admission)), costs)
        for name in policies
    )


def replay(
    recorded: RecordedRun, options: Options, costs: CostModel, policies: Sequence[str]
) -> tuple[Case, ...]:
    """The recorded run, and the same requests simulated; clients of a closed loop send their next
    request when the simulated one has ended.

    Raises:
        ConfigError: the run has another number of stages than the costs.
    """
    if recorded.run.num_stages != len(costs.stages):
        raise ConfigError(
            f"the recorded run ({recorded.about}) has {recorded.run.num_stages} stages and the "
            f"costs are for {len(costs.stages)}; fit them to a run of as many, or give --split"
        )
    measured = Case(
        about=recorded.about,
        policy=MEASURED,
        figures=make_figures(recorded.run, costs=costs),
        run=recorded.run,
    )
    facts = change_facts(recorded.facts, options)
    trace = recorded.run.trace
    cases = run_trace(recorded.about, trace, facts, costs, policies, admission=recorded.policy)
    return (measured, *cases)


def _run_case(
    about: str, name: str, trace: Trace, policy: SimulatedPolicy, costs: CostModel
) -> Case:
    run = simulate(trace, policy, costs)
    figures = make_figures(run, costs=costs, num_preemptions=policy.num_preemptions)
    return Case(about=about, policy=name, figures=figures, run=run)
