"""`pipeserve bench prediction`: whether the simulator foretells one real load from another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeserve.bench.arrivals import Lengths
from pipeserve.bench.engine import check_room
from pipeserve.bench.policies import OURS
from pipeserve.bench.rig import Rig, loaded_rig
from pipeserve.bench.schedule import MEASURED, replay
from pipeserve.bench.schedule import Options as ScheduleOptions
from pipeserve.bench.schedule_figures import ScheduleFigures
from pipeserve.bench.schedule_fit import fit_costs
from pipeserve.bench.schedule_record import RecordedRun, append_run, check_record, make_run
from pipeserve.bench.workload import Workload, timed_clients
from pipeserve.config import Config

THROUGHPUT_BOUND = 0.10
TTFT_BOUND = 0.20
"""By how much a prediction may be off, of the measured value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the command."""

    clients: Sequence[int]
    """Of each load, a closed loop."""
    prompt: Lengths
    output: Lengths
    run_s: float
    """Clients submit for so long."""
    record: Path | None = None
    """The runs are appended to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One load, foretold from the costs of another."""

    fitted_to: str
    foretold: str
    is_own_load: bool
    """Foretold from itself: what the fit, rather than the other load, is to blame for."""
    measured: ScheduleFigures
    predicted: ScheduleFigures
    stage_errors: tuple[float, ...]
    """Of the fit: mean absolute error of a step's time over the mean time, per stage."""

    @property
    def throughput_error(self) -> float:
        return self.predicted.total_tokens_per_s / self.measured.total_tokens_per_s - 1

    @property
    def ttft_error(self) -> float:
        """Of the median."""
        return self.predicted.ttft_p50_ms / self.measured.ttft_p50_ms - 1

    @property
    def is_within_bounds(self) -> bool:
        return abs(self.throughput_error) <= THROUGHPUT_BOUND and abs(self.ttft_error) <= TTFT_BOUND


def measure(
    config: Config, options: Options, *, on_run: Callable[[RecordedRun], None]
) -> list[Prediction]:
    """Load the model, run and record every load, and foretell each from each.

    Raises:
        PipeserveError: the model cannot be had or served, options or loads do not fit it, a stage
            failed, or a run had too few steps.
    """
    if options.record is not None:
        check_record(options.record)
    with loaded_rig(config) as rig:
        runs = [_record(rig, num_clients, options) for num_clients in options.clients]
    for run in runs:
        on_run(run)
        if options.record is not None:
            append_run(options.record, run)
    return foretell(runs)


def _record(rig: Rig, num_clients: int, options: Options) -> RecordedRun:
    load = timed_clients(num_clients)
    workload = Workload(prompt=options.prompt, output=options.output, loads=(load,))
    check_room(workload, rig.facts)
    with rig.running(OURS) as runner:
        runner.warm_up(workload, load)
        recording = runner.run(workload, load, most_s=options.run_s)
    return RecordedRun(
        about=workload.describe(load),
        facts=rig.facts,
        policy=rig.admission,
        run=make_run(recording, rig.timeline.steps()),
    )


def foretell(runs: Sequence[RecordedRun]) -> list[Prediction]:
    """Each run from the costs of each, of itself too."""
    predictions = []
    for fitted in runs:
        fit = fit_costs([fitted.run])
        for other in runs:
            cases = replay(other, ScheduleOptions(), fit.costs, [OURS])
            figures = {case.policy: case.figures for case in cases}
            predictions.append(
                Prediction(
                    fitted_to=fitted.about,
                    foretold=other.about,
                    is_own_load=fitted is other,
                    measured=figures[MEASURED],
                    predicted=figures[OURS],
                    stage_errors=fit.stage_errors,
                )
            )
    return predictions


def as_json(predictions: Sequence[Prediction]) -> str:
    """Every figure under its name in ScheduleFigures, and the errors."""
    values = [
        asdict(each)
        | {
            "throughput_error": each.throughput_error,
            "ttft_error": each.ttft_error,
            "is_within_bounds": each.is_within_bounds,
        }
        for each in predictions
    ]
    return json.dumps(values, indent=2)


def as_markdown(predictions: Sequence[Prediction]) -> str:
    """A line for each."""
    columns = (
        *("fitted to", "foretold", "fit's error", "tokens/s", "foretold", "off"),
        *("TTFT p50, ms", "foretold", "off", "within"),
    )
    lines = ["| " + " | ".join(columns) + " |", "|---|---|---|--:|--:|--:|--:|--:|--:|---|"]
    lines += ["| " + " | ".join(_cells(each)) + " |" for each in predictions]
    bounds = (
        f"within: {THROUGHPUT_BOUND:.0%} in tokens/s and {TTFT_BOUND:.0%} in the median TTFT, both "
        "of the whole run"
    )
    return "\n".join((*lines, "", bounds))


def _cells(each: Prediction) -> tuple[str, ...]:
    measured, predicted = each.measured, each.predicted
    return (
        each.fitted_to,
        "itself" if each.is_own_load else each.foretold,
        " / ".join(f"{error:.1%}" for error in each.stage_errors),
        f"{measured.total_tokens_per_s:,.0f}",
        f"{predicted.total_tokens_per_s:,.0f}",
        f"{each.throughput_error:+.1%}",
        f"{measured.ttft_p50_ms:.1f}",
        f"{predicted.ttft_p50_ms:.1f}",
        f"{each.ttft_error:+.1%}",
        "yes" if each.is_within_bounds else "no",
    )
