"""`pipeserve bench engine`: engine and pipeline in this process, measured without HTTP and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeserve.bench.ceilings import Ceilings, measure_ceilings
from pipeserve.bench.figures import Figures, ModelCosts, make_figures
from pipeserve.bench.load_runner import LoadRunner
from pipeserve.bench.policies import OURS
from pipeserve.bench.rig import Rig, loaded_rig
from pipeserve.bench.schedule_record import RecordedRun, append_run, check_record, make_run
from pipeserve.bench.timeline import Bar, bars_of
from pipeserve.bench.tracing import Profile
from pipeserve.bench.workload import Batch, Workload
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything that one command measured."""

    model: str
    model_bytes: int
    """Of the file."""
    devices: tuple[str, ...]
    """One per stage."""
    facts: PipelineFacts
    ceilings: tuple[Ceilings, ...]
    """Of each CUDA card that has a stage."""
    costs: ModelCosts
    workload: Workload
    policy: str
    """A key of POLICIES."""
    runs: tuple[Figures, ...]
    profiles: tuple[Profile, ...]
    """Of each traced batch, one per card."""
    bars: tuple[Bar, ...]
    """Of the last run's micro-batches on each stage."""
    load_s: float
    """Until the first step can be submitted."""
    capture_s: float
    """Of that, to compile kernels and to capture graphs; 0 on CPUs."""

    @property
    def copy_bytes_per_s(self) -> float | None:
        """Of all cards together; None on CPUs."""
        return sum(ceiling.copy_bytes_per_s for ceiling in self.ceilings) or None

    @property
    def matmul_flops_per_s(self) -> float | None:
        """Of all cards together; None on CPUs."""
        return sum(ceiling.matmul_flops_per_s for ceiling in self.ceilings) or None


def measure(
    config: Config,
    workload: Workload,
    *,
    on_run: Callable[[Figures], None],
    record: Path | None = None,
    policy: str = OURS,
) -> Result:
    """Load config.model, run the workload and compute its figures; on_run sees each at once, and
    all that happened is appended to the file `record`.

    Raises:
        PipeserveError: the model cannot be had or served, options or workload do not fit it, or
            a stage failed.
    """
    if record is not None:
        _check_recording(record, workload)
    ceilings: list[Ceilings] = []

    def measure_cards(devices: Sequence[torch.device]) -> None:
        cards = dict.fromkeys(device for device in devices if device.type == "cuda")
        ceilings.extend(measure_ceilings(card) for card in cards)

    with loaded_rig(config, before_load=measure_cards) as rig:
        check_room(workload, rig.facts)
        with rig.running(policy) as runner:
            runs = tuple(_measure_runs(rig, runner, workload, on_run, record))
            bars = tuple(bars_of(rig.timeline.steps()))
            profiles = tuple(
                profile
                for num_concurrent in workload.traced
                for profile in runner.trace(workload, num_concurrent, rig.facts, rig.devices)
            )
    return Result(
        model=rig.path.name,
        model_bytes=rig.model_bytes,
        devices=tuple(map(str, rig.devices)),
        facts=rig.facts,
        ceilings=tuple(ceilings),
        costs=rig.costs,
        workload=workload,
        policy=policy,
        runs=runs,
        profiles=profiles,
        bars=bars,
        load_s=rig.load_s,
        capture_s=rig.capture_s,
    )


def _check_recording(path: Path, workload: Workload) -> None:
    if workload.num_shared_tokens:
        raise ConfigError(
            f"shared is {workload.num_shared_tokens}, but a record does not tell which prompts "
            "begin alike; leave record or shared out"
        )
    if workload.chained is not None:
        raise ConfigError(
            "samplers are given, but a record does not tell which sequences they draw; leave "
            "record or samplers out"
        )
    check_record(path)


def check_room(workload: Workload, facts: PipelineFacts) -> None:
    """Raise ConfigError unless every sequence fits the context, and every batch the rows and KV
    blocks."""
    num_tokens = workload.prompt.longest + workload.output.longest
    if num_tokens > facts.context_length:
        raise ConfigError(
            f"prompt and output are {num_tokens} tokens together, but a sequence holds at most "
            f"{facts.context_length}; shorten them, or raise context_length or kv_cache_bytes"
        )
    largest = max(
        (load.num_concurrent for load in workload.loads if isinstance(load, Batch)), default=0
    )
    if largest > facts.num_rows:
        raise ConfigError(
            f"batch is {largest} and max_num_seqs {facts.num_rows}, so that they cannot all run "
            "at once; raise max_num_seqs, or leave it out"
        )
    num_blocks = largest * -(-num_tokens // facts.block_size)
    if num_blocks > facts.num_blocks:
        raise ConfigError(
            f"{largest} sequences of {num_tokens} tokens need {num_blocks} KV blocks of "
            f"{facts.block_size} tokens, but there are {facts.num_blocks}; raise kv_cache_bytes, "
            "or take a smaller batch"
        )


def _measure_runs(
    rig: Rig,
    runner: LoadRunner,
    workload: Workload,
    on_run: Callable[[Figures], None],
    record: Path | None,
) -> Iterator[Figures]:
    for load in workload.loads:
        runner.warm_up(workload, load)
        recording = runner.run(workload, load)
        figures = make_figures(recording, load, rig.costs)
        on_run(figures)
        if record is not None:
            about = f"{rig.describe()}, {workload.describe(load)}"
            run = make_run(recording, rig.timeline.steps())
            recorded = RecordedRun(about=about, facts=rig.facts, run=run, policy=rig.admission)
            append_run(record, recorded)
        yield figures
