"""Pipeline: a model cut over stages that work on several micro-batches at once.

Built by the daemon and used from the engine's thread; knows the engine as a function to post to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeserve.config import Config
from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import backend_for
from pipeserve.models.config import ModelConfig
from pipeserve.models.layers import Decoder
from pipeserve.models.loader import LayerRange
from pipeserve.models.registry import check_model
from pipeserve.runtime import kv_cache, partition
from pipeserve.runtime.block_table import BlockTable
from pipeserve.runtime.collector import Collector, Post
from pipeserve.runtime.cuda_graphs import DecodeGraphs
from pipeserve.runtime.devices import resolve_devices
from pipeserve.runtime.link import Handoff, Link
from pipeserve.runtime.loading import OnProgress, load_decoders
from pipeserve.runtime.model_runner import ModelRunner
from pipeserve.runtime.sampler import Sampler
from pipeserve.runtime.stage import Runner, Stage
from pipeserve.runtime.token_pool import TokenPool


class Pipeline:
    """Stage threads and the links between them, from the first submit to `close`."""

    def __init__(
        self,
        *,
        facts: PipelineFacts,
        runners: Sequence[Runner],
        devices: Sequence[torch.device],
        token_pool: TokenPool,
        threads_per_stage: int,
        post: Post,
    ) -> None:
        """Start one thread per runner. Pipeline.start makes the runners of a model file."""
        self.facts = facts
        self._token_pool = token_pool
        self._links = [Link() for _ in runners]
        last = len(runners) - 1
        self._collector = Collector(stage=last, post=post) if devices[last].type == "cuda" else None
        self._stages = [
            Stage(
                index=index,
                device=device,
                num_threads=threads_per_stage,
                runner=runner,
                token_pool=token_pool,
                inlet=self._links[index],
                outlet=self._links[index + 1] if index < last else None,
                collector=self._collector if index == last else None,
                post=post,
                on_failure=self._end_stages,
            )
            for index, (runner, device) in enumerate(zip(runners, devices, strict=True))
        ]
        self._threads = [stage.thread for stage in self._stages]
        if self._collector is not None:
            self._threads.append(self._collector.thread)
        for thread in self._threads:
            thread.start()

    @classmethod
    def start(
        cls,
        gguf_file: GGUFFile,
        config: Config,
        devices: Sequence[str],
        *,
        post: Post,
        on_progress: OnProgress,
    ) -> Pipeline:
        """Check the file, cut its layers over `devices`, load them and start the stages.

        `post` is called from stage threads, with every StepOutput in order and at most with one
        StageFailure per stage.

        Raises:
            ModelError: the file cannot be served.
            ConfigError: options do not fit the model or this machine.
        """
        plan = plan_pipeline(
            check_model(gguf_file), config, devices, file_bytes=gguf_file.file_size
        )
        decoders = load_decoders(
            gguf_file, plan.model, plan.ranges, devices=plan.devices, on_progress=on_progress
        )
        token_pool = TokenPool(num_rows=plan.facts.num_rows, device=plan.devices[0])
        return cls(
            facts=plan.facts,
            runners=[
                _make_runner(plan.facts, decoder, device, token_pool)
                for decoder, device in zip(decoders, plan.devices, strict=True)
            ],
            devices=plan.devices,
            token_pool=token_pool,
            threads_per_stage=config.threads_per_stage,
            post=post,
        )

    def submit(self, batch: MicroBatch) -> None:
        """Queue a micro-batch at the first stage; returns at once."""
        self._links[0].send(Handoff(batch=batch, hidden_TD=None, busy=()))

    def close(self, timeout_s: float) -> bool:
        """End the stages, each after its current step. True if all threads ended in time."""
        self._end_stages()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def describe_stall(self) -> str:
        """Which stage is busy with which step, and for how long; for an error message."""
        now_s = time.monotonic()
        busy = [(stage, stage.activity) for stage in self._stages]
        running = [(activity.since_s, stage, activity) for stage, activity in busy if activity]
        if not running:
            return "no stage is computing; all wait for work"
        since_s, stage, activity = min(running, key=lambda item: item[0])
        return (
            f"stage {stage.index} ({stage.device}) has been computing step {activity.step_id} "
            f"for {now_s - since_s:.1f} s"
        )

    def _end_stages(self) -> None:
        for link in self._links:
            link.close()
        self._token_pool.close()
        if self._collector is not None:
            self._collector.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """What a model becomes on these devices, before a weight is read."""

    model: ModelConfig
    devices: tuple[torch.device, ...]
    ranges: tuple[LayerRange, ...]
    facts: PipelineFacts


def plan_pipeline(
    model: ModelConfig, config: Config, devices: Sequence[str], *, file_bytes: int
) -> PipelinePlan:
    """Choose each stage's layers and the size of the KV caches.

    file_bytes: size of the model file, about what its weights take on GPUs.

    Raises:
        ConfigError: options do not fit the model or this machine.
    """
    targets = resolve_devices(devices, num_layers=model.num_layers)
    split = _choose_split(model, config, num_stages=len(targets))
    num_blocks, context_length = _size_cache(model, config, targets, split, file_bytes=file_bytes)
    return PipelinePlan(
        model=model,
        devices=targets,
        ranges=partition.layer_ranges(split),
        facts=PipelineFacts(
            num_stages=len(targets),
            num_rows=config.max_num_seqs,
            num_blocks=num_blocks,
            block_size=config.block_size,
            context_length=context_length,
            max_batch_tokens=config.max_num_batched_tokens,
            num_look_ahead=config.num_look_ahead,
            vocab_size=model.vocab_size,
        ),
    )


def _choose_split(model: ModelConfig, config: Config, *, num_stages: int) -> tuple[int, ...]:
    if config.layer_split is not None:
        partition.check_split(
            config.layer_split, num_layers=model.num_layers, num_stages=num_stages
        )
        return config.layer_split
    return partition.cut_layers(
        [partition.layer_cost(model)] * model.num_layers,
        head_cost=partition.head_cost(model),
        num_stages=num_stages,
    )


def _size_cache(
    model: ModelConfig,
    config: Config,
    devices: Sequence[torch.device],
    split: Sequence[int],
    *,
    file_bytes: int,
) -> tuple[int, int]:
    """Blocks that fit every stage, and the context that a sequence may have in them."""
    wanted = config.context_length or model.context_length
    if wanted > model.context_length:
        raise ConfigError(
            f"context_length is {wanted}, but the model was trained for {model.context_length} "
            "tokens; set at most that, or leave it out"
        )
    shape = kv_cache.KVShape(
        num_rows=config.max_num_seqs, context_length=wanted, block_size=config.block_size
    )
    num_blocks = shape.most_blocks
    for device, num_layers in zip(devices, split, strict=True):
        dtype = backend_for(device).dtype
        num_bytes = config.kv_cache_bytes or kv_cache.default_bytes(
            device,
            weight_bytes=file_bytes * (num_layers + 2) // model.num_layers,
            num_sharing=list(devices).count(device),
        )
        stage_blocks = kv_cache.count_blocks(
            shape,
            bytes_per_block=num_layers * kv_cache.block_bytes(model, config.block_size, dtype),
            kv_cache_bytes=num_bytes,
        )
        num_blocks = min(num_blocks, stage_blocks)
    capacity = num_blocks * config.block_size
    if config.context_length is not None and capacity < config.context_length:
        raise ConfigError(
            f"context_length is {wanted}, but kv_cache_bytes holds {capacity} tokens on the stage "
            "with the most layers; raise kv_cache_bytes or lower context_length"
        )
    return num_blocks, min(wanted, capacity)


def _make_runner(
    facts: PipelineFacts, decoder: Decoder, device: torch.device, token_pool: TokenPool
) -> ModelRunner:
    caches = kv_cache.allocate(
        decoder.config,
        num_layers=len(decoder.layers),
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        dtype=decoder.backend.dtype,
        device=device,
    )
    block_table = BlockTable(
        num_rows=facts.num_rows,
        blocks_per_row=-(-facts.context_length // facts.block_size),
        block_size=facts.block_size,
        device=device,
    )
    graphs = None
    if device.type == "cuda":
        graphs = DecodeGraphs(
            decoder=decoder,
            caches=caches,
            block_table=block_table,
            token_pool=token_pool,
            num_rows=facts.num_rows,
            device=device,
        )
    return ModelRunner(
        decoder=decoder,
        caches=caches,
        block_table=block_table,
        token_pool=token_pool,
        sampler=Sampler(num_rows=facts.num_rows, vocab_size=facts.vocab_size, device=device)
        if decoder.head is not None
        else None,
        graphs=graphs,
        device=device,
    )
