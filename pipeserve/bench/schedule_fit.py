"""Fits a cost model to recorded runs by least squares without negative costs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise

import numpy as np
import numpy.typing as npt

from pipeserve.bench.schedule_costs import CostModel, stage_costs
from pipeserve.bench.schedule_run import Run, StepWork, TimedStep
from pipeserve.errors import ConfigError

Array = npt.NDArray[np.float64]

LEAST_STEPS = 12
"""Two for each cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A cost model and how well it tells the steps that it was fitted to."""

    costs: CostModel
    stage_errors: tuple[float, ...]
    """Mean absolute error of a step's time over the mean time, per stage."""


def fit_costs(runs: Sequence[Run]) -> Fit:
    """From all steps of all runs; hand-off and host latencies are medians.

    Each step counts relative to the time that a first, unweighted fit expects of it: short decode
    steps, which other loads consist of, would else be drowned by long prompts. (Relative to the
    measured time, steps that were disturbed would count too little.)

    Raises:
        ConfigError: runs of different numbers of stages, or too few steps.
    """
    (num_stages, *others) = {run.num_stages for run in runs}
    steps = [step for run in runs for step in run.steps]
    if others or len(steps) < LEAST_STEPS:
        raise ConfigError(
            f"a fit needs runs of one number of stages and at least {LEAST_STEPS} steps, but there "
            f"are {len(steps)} steps and {1 + len(others)} numbers of stages; record longer runs "
            "of one pipeline"
        )
    work = np.array([_features(step.work) for step in steps], np.float64)
    stages, errors = [], []
    for stage in range(num_stages):
        times_s = np.array([step.spans[stage].length_s for step in steps], np.float64)
        first = work @ solve_non_negative(work, times_s)
        expected_s = np.maximum(first, 0.1 * times_s.mean())
        values = solve_non_negative(work / expected_s[:, None], times_s / expected_s)
        stages.append(stage_costs(values.tolist()))
        errors.append(float(np.abs(work @ values - times_s).mean() / times_s.mean()))
    costs = CostModel(
        stages=tuple(stages),
        handoff_s=_median(chain.from_iterable(map(_handoffs_s, runs))),
        host_s=_median(chain.from_iterable(map(_host_times_s, runs))),
    )
    return Fit(costs=costs, stage_errors=tuple(errors))


def _features(work: StepWork) -> tuple[float, ...]:
    """In the order of the fields of StageCosts."""
    return (
        1.0,
        work.num_rows,
        work.num_prefill_tokens,
        work.num_kv_positions,
        work.num_prefill_pairs,
        float(work.num_prefill_tokens > 0),
    )


def solve_non_negative(matrix: Array, target: Array) -> Array:
    """The x >= 0 with the least |matrix x - target|, for a handful of columns.

    It is the plain least-squares solution on the columns where x > 0, so all choices of columns
    are tried.
    """
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    scaled = matrix / scale
    best, least = np.zeros(matrix.shape[1]), float(np.linalg.norm(target))
    columns = range(matrix.shape[1])
    for count in range(1, len(columns) + 1):
        for chosen in map(list, combinations(columns, count)):
            solution = np.linalg.lstsq(scaled[:, chosen], target, rcond=None)[0]
            error = float(np.linalg.norm(scaled[:, chosen] @ solution - target))
            # A further column must earn its place, or rounding would decide between equals.
            if (solution >= 0).all() and error < least * (1 - 1e-9):
                least, best = error, np.zeros(matrix.shape[1])
                best[chosen] = solution
    weights: Array = best / scale
    return weights


def _handoffs_s(run: Run) -> Iterator[float]:
    """Between two stages, where the later one was free and had been waiting."""
    for before, step in pairwise(run.steps):
        for stage in range(1, run.num_stages):
            ready_s = step.spans[stage - 1].end_s
            if before.spans[stage].end_s < ready_s:
                yield step.spans[stage].start_s - ready_s


def _host_times_s(run: Run) -> Iterator[float]:
    """From a step's end to the next submission, where that came before the next step's end."""
    submitted_s = np.array([step.submitted_s for step in run.steps])
    for step, following in pairwise(run.steps):
        end_s, next_end_s = _end_s(step), _end_s(following)
        index = int(np.searchsorted(submitted_s, end_s))
        if index < len(submitted_s) and submitted_s[index] < next_end_s:
            yield float(submitted_s[index]) - end_s


def _end_s(step: TimedStep) -> float:
    return step.spans[-1].end_s


def _median(values: Iterable[float]) -> float:
    """0 of none."""
    found = list(values)
    return max(0.0, float(np.median(found))) if found else 0.0
