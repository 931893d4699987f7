"""Rig: one pipeline, built as the daemon builds it, on which engines run one after another.

So policies are compared on the same layers, kernels and graphs.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeserve.bench.figures import ModelCosts, model_costs
from pipeserve.bench.load_runner import LoadRunner
from pipeserve.bench.numbered import Numbered
from pipeserve.bench.policies import POLICIES
from pipeserve.bench.timeline import Timeline
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.loading import LoadEvent, LoadNotice, LoadReport, OnProgress
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import Shutdown
from pipeserve.engine.policy import AdmissionPolicy
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

STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rig:
    """A pipeline that is loaded."""

    path: Path
    model_bytes: int
    """Of the file."""
    devices: tuple[torch.device, ...]
    """One per stage."""
    costs: ModelCosts
    pipeline: Pipeline
    load_s: float
    """Until the first step can be submitted."""
    capture_s: float
    """Of that, to compile kernels and to capture graphs; 0 on CPUs."""
    numbered: Numbered
    inbox: Inbox
    config: Config

    @property
    def facts(self) -> PipelineFacts:
        return self.pipeline.facts

    @property
    def admission(self) -> AdmissionPolicy:
        """What every policy is made from."""
        return AdmissionPolicy.from_config(self.config)

    @property
    def timeline(self) -> Timeline:
        """Of the last run."""
        return self.numbered.timeline

    def describe(self) -> str:
        """Model and devices, for people."""
        return f"{self.path.name} on {', '.join(map(str, self.devices))}"

    @contextmanager
    def running(self, policy: str, facts: PipelineFacts | None = None) -> Iterator[LoadRunner]:
        """An engine under this policy of POLICIES, one at a time. facts: to use less than there
        is."""
        pipeline = self.numbered.begin(self.pipeline, facts or self.facts)
        runner = LoadRunner(self.inbox, self.timeline, vocab_size=self.facts.vocab_size)
        engine = Engine(
            pipeline=pipeline,
            inbox=self.inbox,
            post=runner.deliver,
            stage_timeout_s=self.config.stage_timeout_s,
            scheduler=POLICIES[policy](pipeline.facts, self.admission),
        )
        engine.start()
        try:
            yield runner
        finally:
            self.numbered.wait_until_empty(STOP_TIMEOUT_S)
            self.inbox.put(Shutdown())
            engine.join(STOP_TIMEOUT_S)


@contextmanager
def loaded_rig(
    config: Config, *, before_load: Callable[[Sequence[torch.device]], None] = lambda devices: None
) -> Iterator[Rig]:
    """config.model on config.devices. before_load: sees the devices while they are empty.

    Raises:
        PipeserveError: the model cannot be had or served, or options do not fit it.
    """
    path = resolve_model(config.model, cache_dir=config.cache_dir)
    inbox: Inbox = queue.SimpleQueue()
    numbered = Numbered(inbox)
    with GGUFFile.open(path) as gguf_file:
        model = check_model(gguf_file)
        devices = resolve_devices(config.devices, num_layers=model.num_layers)
        before_load(devices)
        backend = stage_backend(devices[0], config)
        kv_dtype = kv_cache.storage_dtype(config.kv_cache_dtype, backend.dtype)
        costs = _costs(gguf_file, model, backend, kv_dtype=kv_dtype)
        started_s = time.monotonic()
        pipeline = Pipeline.start(
            gguf_file, config, config.devices, post=numbered.post, on_progress=_progress_reporter()
        )
    try:
        yield Rig(
            path=path,
            model_bytes=gguf_file.file_size,
            devices=tuple(devices),
            costs=costs,
            pipeline=pipeline,
            load_s=time.monotonic() - started_s,
            capture_s=sum(card.capture_s for card in pipeline.cards),
            numbered=numbered,
            inbox=inbox,
            config=config,
        )
    finally:
        pipeline.close(STOP_TIMEOUT_S)


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
