"""Compiles the kernels for every card they are meant for, without having one.

`python -m pipeserve.bench.kernels_aot` compiles each case that the modules of pipeserve.kernels
list as AOT_CASES for each target, prints one line per compilation and ends with status 1 if one
failed. It needs Triton, and no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100", "gfx942")
_WARP_SIZES = {"gfx942": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One case for one target, by name: cases hold kernels, which do not travel to processes."""

    module: str
    case: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a job."""

    job: Job
    duration_s: float
    error: str | None


def jobs() -> Iterator[Job]:
    """Every case of every kernel module, for every target."""
    import pipeserve.kernels

    for module_info in pkgutil.iter_modules(pipeserve.kernels.__path__):
        name = f"pipeserve.kernels.{module_info.name}"
        cases = getattr(importlib.import_module(name), "AOT_CASES", ())
        yield from (
            Job(module=name, case=case.name, target=target)
            for case in cases
            for target in TARGETS
            if not case.needs_e4m3 or _has_e4m3(target)
        )


def _has_e4m3(target: str) -> bool:
    return target.startswith("sm_") and int(target.removeprefix("sm_")) >= 89


def sample(all_jobs: list[Job], num_wanted: int) -> list[Job]:
    """That many, evenly spread, with the targets taking turns: the same ones each time."""
    by_target = sorted(all_jobs, key=lambda job: TARGETS.index(job.target))
    step = max(1.0, len(by_target) / num_wanted)
    return [by_target[int(index * step)] for index in range(min(num_wanted, len(by_target)))]


def compile_job(job: Job) -> Outcome:
    """Compile afresh; a failure of the compiler, whatever its type, is the outcome's error."""
    start = time.monotonic()
    error = None
    try:
        _compile(job)
    except Exception as failure:  # the top of a worker process: the compiler raises anything
        error = f"{type(failure).__name__}: {failure}"
    return Outcome(job=job, duration_s=time.monotonic() - start, error=error)


def _compile(job: Job) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cases = importlib.import_module(job.module).AOT_CASES
    case = next(case for case in cases if case.name == job.case)
    is_nvidia = job.target.startswith("sm_")
    constants = dict(case.constexprs)
    if "ASM" in constants:
        constants["ASM"] = is_nvidia
    if "PDL" in constants:
        constants["PDL"] = is_nvidia and int(job.target.removeprefix("sm_")) >= 90
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr").partition(":")[0] for name in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    is_aligned = {
        name for name, kind in case.signature.items() if kind.startswith("*") or ":16" in kind
    }
    source = ASTSource(
        case.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in is_aligned - set(constants)},
    )
    if is_nvidia:
        target = GPUTarget("cuda", int(job.target.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", job.target, _WARP_SIZES.get(job.target, 32))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    triton.compile(source, target=target, options=options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeserve.bench.kernels_aot")
    parser.add_argument("--sample", type=int, metavar="N", help="compile only N of the jobs")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    chosen = [job for job in jobs() if options.only is None or options.only in job.case]
    if options.sample is not None:
        chosen = sample(chosen, options.sample)
    num_failed = 0
    with tempfile.TemporaryDirectory() as cache_dir:
        os.environ["TRITON_CACHE_DIR"] = cache_dir
        with ProcessPoolExecutor(options.jobs) as pool:
            for outcome in pool.map(compile_job, chosen):
                verdict = "ok" if outcome.error is None else f"FAILED {outcome.error}"
                num_failed += outcome.error is not None
                job = outcome.job
                print(f"{job.target:8} {job.case:24} {outcome.duration_s:5.1f} s  {verdict}")
    print(f"{len(chosen)} compiled, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
