"""`pipeserve bench engine`: engine and pipeline in this process, measured without HTTP and text.

Built as the daemon builds them; the recorder stands where the front half would be.
"""

from __future__ import annotations

import itertools
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pipeserve.bench.ceilings import Ceilings, measure_ceilings
from pipeserve.bench.figures import Figures, ModelCosts, make_figures, model_costs
from pipeserve.bench.recording import Recorder, Recording
from pipeserve.bench.schedule_record import RecordedRun, append_run, check_record, make_run
from pipeserve.bench.timeline import Bar, Timeline, WatchedPipeline, bars_of
from pipeserve.bench.tracing import MOST_TOKENS, Profile, SteadyDecode, trace_decode
from pipeserve.bench.workload import Batch, Load, Workload
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts, StageFailure, StepOutput
from pipeserve.core.loading import LoadEvent, LoadNotice, LoadReport, OnProgress
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import EngineFailed, EngineMessage, Shutdown, Submit
from pipeserve.errors import ConfigError
from pipeserve.gguf.header import TensorInfo
from pipeserve.gguf.reader import GGUFFile
from pipeserve.hub import resolve_model
from pipeserve.kernels.backend import REFERENCE, Backend
from pipeserve.models.config import ModelConfig
from pipeserve.models.loader import device_bytes
from pipeserve.models.registry import check_model
from pipeserve.progress import ProgressBars
from pipeserve.runtime import kv_cache
from pipeserve.runtime.devices import resolve_devices
from pipeserve.runtime.loading import stage_backend
from pipeserve.runtime.pipeline import Pipeline

WARM_UP_TOKENS = 4
"""Output of the sequences that run before each measured run, to compile and fill caches."""
STOP_TIMEOUT_S = 5.0


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
) -> Result:
    """Load config.model, run the workload and compute its figures; on_run sees each at once, and
    all that happened is appended to the file `record`.

    Raises:
        PipeserveError: the model cannot be had or served, options or workload do not fit it, or
            a stage failed.
    """
    if record is not None:
        check_record(record)
    path = resolve_model(config.model, cache_dir=config.cache_dir)
    inbox: Inbox = queue.SimpleQueue()
    with GGUFFile.open(path) as gguf_file:
        model = check_model(gguf_file)
        devices = resolve_devices(config.devices, num_layers=model.num_layers)
        cards = dict.fromkeys(device for device in devices if device.type == "cuda")
        ceilings = tuple(measure_ceilings(card) for card in cards)
        backend = stage_backend(devices[0], config)
        kv_dtype = kv_cache.storage_dtype(config.kv_cache_dtype, backend.dtype)
        costs = _costs(gguf_file, model, backend, kv_dtype=kv_dtype)
        timeline = Timeline()

        def post(item: StepOutput | StageFailure) -> None:
            if isinstance(item, StepOutput):
                timeline.take(item)
            inbox.put(item)

        def on_recording(recording: Recording, load: Load) -> None:
            if record is None:
                return
            about = f"{path.name} on {', '.join(map(str, devices))}, {workload.describe(load)}"
            run = make_run(recording, timeline.steps(), workload, load)
            append_run(record, RecordedRun(about=about, facts=pipeline.facts, run=run))

        started_s = time.monotonic()
        pipeline = Pipeline.start(
            gguf_file, config, config.devices, post=post, on_progress=_progress_reporter()
        )
    load_s = time.monotonic() - started_s
    with _running_engine(pipeline, inbox, config, timeline) as bench:
        _check_room(workload, pipeline.facts)
        runs = tuple(_measure_runs(bench, workload, costs, on_run, on_recording))
        bars = tuple(bars_of(timeline.steps()))
        profiles = tuple(
            profile
            for num_concurrent in workload.traced
            for profile in bench.trace(workload, num_concurrent, pipeline.facts, devices)
        )
    return Result(
        model=path.name,
        model_bytes=gguf_file.file_size,
        devices=tuple(map(str, devices)),
        facts=pipeline.facts,
        ceilings=ceilings,
        costs=costs,
        workload=workload,
        runs=runs,
        profiles=profiles,
        bars=bars,
        load_s=load_s,
        capture_s=sum(card.capture_s for card in pipeline.cards),
    )


def _costs(
    gguf_file: GGUFFile,
    model: ModelConfig,
    backend: Backend,
    *,
    kv_dtype: torch.dtype,
) -> ModelCosts:
    def held_bytes(info: TensorInfo) -> int:
        if backend is REFERENCE:  # CPU stages are judged by the file they serve, too
            return info.num_bytes
        return device_bytes(info, backend, model.num_layers)

    # An embedding of its own is not read in a step, but for a row per token.
    unread = set() if model.has_tied_head else {"token_embd.weight"}
    tensors = gguf_file.tensors.values()
    return model_costs(
        model,
        weight_bytes=sum(held_bytes(info) for info in tensors if info.name not in unread),
        kv_token_bytes=model.num_layers * kv_cache.block_bytes(model, 1, kv_dtype),
    )


def _progress_reporter() -> OnProgress:
    bars = ProgressBars()

    def report(event: LoadEvent) -> None:
        if isinstance(event, LoadNotice | LoadReport):
            print(event.text, file=sys.stderr)
        else:
            bars.update(event)

    return report


def _check_room(workload: Workload, facts: PipelineFacts) -> None:
    """Raise unless every sequence fits the context, and every batch the rows and KV blocks."""
    num_tokens = workload.num_prompt_tokens + workload.num_output_tokens
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


class _Bench:
    """Runs loads on an engine, one after another. `deliver` is called on the engine's thread."""

    def __init__(self, inbox: Inbox, timeline: Timeline, *, vocab_size: int) -> None:
        self._inbox = inbox
        self._timeline = timeline
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._seq_ids = itertools.count()
        self._listener: Callable[[EngineMessage], None] | None = None
        self._failure: EngineFailed | None = None

    def deliver(self, message: EngineMessage) -> None:
        if isinstance(message, EngineFailed):
            self._failure = message
        if self._listener is not None:
            self._listener(message)

    def run(self, workload: Workload, load: Load) -> Recording:
        """Raises StageFailedError or StageStalledError where the engine died."""
        submissions = [self._submission(workload) for _ in range(load.num_sequences)]
        self._timeline.clear()
        recorder = Recorder(post=self._inbox.put, load=load, submissions=submissions)
        self._listen(recorder.deliver)
        return recorder.run()

    def trace(
        self,
        workload: Workload,
        num_concurrent: int,
        facts: PipelineFacts,
        devices: Sequence[torch.device],
    ) -> tuple[Profile, ...]:
        """Trace a steady decode of so many sequences; errors as `run`."""
        row_blocks = min(
            facts.num_blocks // num_concurrent, facts.context_length // facts.block_size
        )
        room = row_blocks * facts.block_size - workload.num_prompt_tokens
        lasting = replace(workload, num_output_tokens=max(1, min(room, MOST_TOKENS)))
        batch = [self._submission(lasting) for _ in range(num_concurrent)]
        steady = SteadyDecode(post=self._inbox.put, batch=batch)
        self._listen(steady.deliver)
        return trace_decode(steady, num_concurrent=num_concurrent, devices=devices)

    def _listen(self, listener: Callable[[EngineMessage], None]) -> None:
        self._listener = listener
        if self._failure is not None:  # between two runs
            listener(self._failure)

    def _submission(self, workload: Workload) -> Submit:
        """A prompt that no other shares a beginning with, and greedy tokens without a stop."""
        prompt = self._rng.integers(0, self._vocab_size, workload.num_prompt_tokens)
        sampling = SamplingParams(max_tokens=workload.num_output_tokens, seed=0, temperature=0.0)
        return Submit(
            seq_id=next(self._seq_ids), prompt_token_ids=tuple(prompt.tolist()), sampling=sampling
        )


@contextmanager
def _running_engine(
    pipeline: Pipeline, inbox: Inbox, config: Config, timeline: Timeline
) -> Iterator[_Bench]:
    bench = _Bench(inbox, timeline, vocab_size=pipeline.facts.vocab_size)
    engine = Engine(
        pipeline=WatchedPipeline(pipeline, timeline),
        inbox=inbox,
        post=bench.deliver,
        stage_timeout_s=config.stage_timeout_s,
    )
    engine.start()
    try:
        yield bench
    finally:
        inbox.put(Shutdown())
        engine.join(STOP_TIMEOUT_S)
        pipeline.close(STOP_TIMEOUT_S)


def _measure_runs(
    bench: _Bench,
    workload: Workload,
    costs: ModelCosts,
    on_run: Callable[[Figures], None],
    on_recording: Callable[[Recording, Load], None],
) -> Iterator[Figures]:
    few = min(WARM_UP_TOKENS, workload.num_output_tokens)
    for load in workload.loads:
        bench.run(
            replace(workload, num_output_tokens=few), Batch(num_sequences=load.num_concurrent)
        )
        recording = bench.run(workload, load)
        figures = make_figures(recording, workload, load, costs)
        on_run(figures)
        on_recording(recording, load)
        yield figures
