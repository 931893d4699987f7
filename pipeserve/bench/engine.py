"""`pipeserve bench engine`: engine and pipeline in this process, measured without HTTP and text.

Built as the daemon builds them; the recorder stands where the front half would be.
"""

from __future__ import annotations

import itertools
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from pipeserve.bench.ceilings import Ceilings, measure_ceilings
from pipeserve.bench.figures import Figures, ModelCosts, make_figures, model_costs
from pipeserve.bench.recording import Recorder, Recording
from pipeserve.bench.workload import Batch, Load, Workload
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import EngineFailed, EngineMessage, Shutdown, Submit
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.hub import resolve_model
from pipeserve.kernels.backend import backend_for
from pipeserve.models.config import ModelConfig
from pipeserve.models.registry import check_model
from pipeserve.runtime.devices import resolve_devices
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

    @property
    def copy_bytes_per_s(self) -> float | None:
        """Of all cards together; None on CPUs."""
        return sum(ceiling.copy_bytes_per_s for ceiling in self.ceilings) or None

    @property
    def matmul_flops_per_s(self) -> float | None:
        """Of all cards together; None on CPUs."""
        return sum(ceiling.matmul_flops_per_s for ceiling in self.ceilings) or None


def measure(config: Config, workload: Workload, *, on_run: Callable[[Figures], None]) -> Result:
    """Load config.model, run the workload and compute its figures; on_run sees each at once.

    Raises:
        PipeserveError: the model cannot be had or served, options or workload do not fit it, or
            a stage failed.
    """
    path = resolve_model(config.model, cache_dir=config.cache_dir)
    inbox: Inbox = queue.SimpleQueue()
    with GGUFFile.open(path) as gguf_file:
        model = check_model(gguf_file)
        devices = resolve_devices(config.devices, num_layers=model.num_layers)
        cards = dict.fromkeys(device for device in devices if device.type == "cuda")
        ceilings = tuple(measure_ceilings(card) for card in cards)
        costs = _costs(gguf_file, model, kv_dtype_bytes=backend_for(devices[0]).dtype.itemsize)
        pipeline = Pipeline.start(
            gguf_file, config, config.devices, post=inbox.put, on_progress=_show_progress
        )
    with _running_engine(pipeline, inbox, config) as bench:
        _check_room(workload, pipeline.facts)
        runs = tuple(_measure_runs(bench, workload, costs, on_run))
    return Result(
        model=path.name,
        model_bytes=gguf_file.file_size,
        devices=tuple(map(str, devices)),
        facts=pipeline.facts,
        ceilings=ceilings,
        costs=costs,
        workload=workload,
        runs=runs,
    )


def _costs(gguf_file: GGUFFile, model: ModelConfig, *, kv_dtype_bytes: int) -> ModelCosts:
    # An embedding of its own is not read in a step, but for a row per token.
    unread = set() if model.has_tied_head else {"token_embd.weight"}
    tensors = gguf_file.tensors.values()
    return model_costs(
        model,
        weight_bytes=sum(info.num_bytes for info in tensors if info.name not in unread),
        kv_token_bytes=2 * model.num_layers * model.kv_size * kv_dtype_bytes,
    )


def _show_progress(num_read: int, num_bytes: int) -> None:
    if sys.stderr.isatty():
        percent = 100 * num_read // max(1, num_bytes)
        end = "\n" if num_read == num_bytes else ""
        print(f"\rloading weights, {percent} %", end=end, file=sys.stderr, flush=True)


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

    def __init__(self, inbox: Inbox, *, vocab_size: int) -> None:
        self._inbox = inbox
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._seq_ids = itertools.count()
        self._recorder: Recorder | None = None
        self._failure: EngineFailed | None = None

    def deliver(self, message: EngineMessage) -> None:
        if isinstance(message, EngineFailed):
            self._failure = message
        if self._recorder is not None:
            self._recorder.deliver(message)

    def run(self, workload: Workload, load: Load) -> Recording:
        """Raises StageFailedError or StageStalledError where the engine died."""
        submissions = [self._submission(workload) for _ in range(load.num_sequences)]
        recorder = Recorder(post=self._inbox.put, load=load, submissions=submissions)
        self._recorder = recorder
        if self._failure is not None:  # between two runs
            recorder.deliver(self._failure)
        return recorder.run()

    def _submission(self, workload: Workload) -> Submit:
        """A prompt that no other shares a beginning with, and greedy tokens without a stop."""
        prompt = self._rng.integers(0, self._vocab_size, workload.num_prompt_tokens)
        sampling = SamplingParams(max_tokens=workload.num_output_tokens, seed=0, temperature=0.0)
        return Submit(
            seq_id=next(self._seq_ids), prompt_token_ids=tuple(prompt.tolist()), sampling=sampling
        )


@contextmanager
def _running_engine(pipeline: Pipeline, inbox: Inbox, config: Config) -> Iterator[_Bench]:
    bench = _Bench(inbox, vocab_size=pipeline.facts.vocab_size)
    engine = Engine(
        pipeline=pipeline,
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
    bench: _Bench, workload: Workload, costs: ModelCosts, on_run: Callable[[Figures], None]
) -> Iterator[Figures]:
    few = min(WARM_UP_TOKENS, workload.num_output_tokens)
    for load in workload.loads:
        bench.run(
            replace(workload, num_output_tokens=few), Batch(num_sequences=load.num_concurrent)
        )
        figures = make_figures(bench.run(workload, load), workload, load, costs)
        on_run(figures)
        yield figures
