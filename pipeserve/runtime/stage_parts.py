"""StageParts: what one stage is put together from, between loading and the start of its thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pipeserve.core.batch import PipelineFacts
from pipeserve.kernels.sampling_backend import sampling_backend_for
from pipeserve.models.layers import Decoder
from pipeserve.runtime import kv_cache
from pipeserve.runtime.block_table import BlockTable
from pipeserve.runtime.cuda_graphs import StepGraphs
from pipeserve.runtime.gpu_shapes import GpuShapes, shapes_for
from pipeserve.runtime.late_sampler import LateSampler
from pipeserve.runtime.late_thread import LateThread
from pipeserve.runtime.model_runner import ModelRunner
from pipeserve.runtime.prompt_scorer import PromptScorer
from pipeserve.runtime.sampler import Sampler, compile_kernels
from pipeserve.runtime.step_computation import StepComputation
from pipeserve.runtime.token_pool import TokenPool
from pipeserve.runtime.transfer import HostTransfer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageParts:
    """One stage's; `computation` has no caches before with_caches."""

    device: torch.device
    facts: PipelineFacts
    kv_dtype: torch.dtype
    shapes: GpuShapes | None
    """None on a CPU, where every step is computed in its own."""
    computation: StepComputation

    @property
    def num_layers(self) -> int:
        return len(self.computation.decoder.layers)

    @property
    def kv_bytes(self) -> int:
        """Of all layers' caches."""
        return sum(cache.num_bytes for cache in self.computation.caches)

    def with_caches(self, *, num_blocks: int) -> StageParts:
        """The same with KV caches of this size."""
        decoder = self.computation.decoder
        caches = kv_cache.allocate(
            decoder.config,
            num_layers=self.num_layers,
            num_blocks=num_blocks,
            block_size=self.facts.block_size,
            dtype=self.kv_dtype,
            device=self.device,
        )
        return replace(self, computation=replace(self.computation, caches=caches))

    def as_probe(self) -> StageParts:
        """The same with a KV cache and a token pool of its own, to be thrown away after a trial."""
        parts = self.with_caches(num_blocks=2)
        token_pool = TokenPool(
            num_rows=self.facts.num_rows, device=self.device, transfer=HostTransfer()
        )
        return replace(parts, computation=replace(parts.computation, token_pool=token_pool))

    def capture(self) -> StepGraphs | None:
        """All graphs of a GPU stage; takes seconds."""
        if self.shapes is None or self.device.type != "cuda":
            return None
        graphs = self.make_graphs(self.shapes)
        graphs.capture(self.shapes.captured())
        return graphs

    def make_graphs(self, shapes: GpuShapes) -> StepGraphs:
        """With nothing captured yet."""
        return StepGraphs(computation=self.computation, shapes=shapes, device=self.device)

    def make_runner(
        self, graphs: StepGraphs | None, late_thread: LateThread | None = None
    ) -> ModelRunner:
        """The runner of a stage; without graphs every step runs eagerly. late_thread: where rows
        of the last stage are sampled late; without, all are sampled in the step."""
        sampler: Sampler | LateSampler | None = None
        scorer = None
        if self.computation.samples:
            backend, vocab_size = sampling_backend_for(self.device), self.facts.vocab_size
            if self.device.type == "cuda":
                compile_kernels(vocab_size=vocab_size, device=self.device, backend=backend)
            make_sampler = partial(
                Sampler,
                num_rows=self.facts.num_rows,
                vocab_size=vocab_size,
                device=self.device,
                backend=backend,
            )
            if late_thread is None:
                sampler = make_sampler()
            else:
                sampler = LateSampler(make_sampler=make_sampler, thread=late_thread)
            scorer = PromptScorer(
                decoder=self.computation.decoder, kernels=backend, device=self.device
            )
        return ModelRunner(
            computation=self.computation,
            sampler=sampler,
            scorer=scorer,
            graphs=graphs,
            shapes=self.shapes,
            device=self.device,
        )

    def make_hidden(self, num_tokens: int) -> Tensor | None:
        """Stands for the previous stage's output; None on the first stage."""
        if self.computation.embeds:
            return None
        hidden_size = self.computation.decoder.config.hidden_size
        return torch.zeros((num_tokens, hidden_size), device=self.device)


def make_parts(
    decoder: Decoder,
    device: torch.device,
    *,
    facts: PipelineFacts,
    kv_dtype: torch.dtype,
    token_pool: TokenPool,
) -> StageParts:
    """The parts of a stage whose KV cache is not sized yet."""
    block_table = BlockTable(
        num_rows=facts.num_rows,
        blocks_per_row=-(-facts.context_length // facts.block_size),
        block_size=facts.block_size,
        device=device,
    )
    return StageParts(
        device=device,
        facts=facts,
        kv_dtype=kv_dtype,
        shapes=shapes_for(device, facts),
        computation=StepComputation(
            decoder=decoder, caches=(), block_table=block_table, token_pool=token_pool
        ),
    )
