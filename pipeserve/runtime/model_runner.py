"""ModelRunner: one stage's computation of a micro-batch, from numpy arrays to hidden states or ids.

Runs on the stage's thread and owns the stage's per-row state; knows nothing of threads or queues.

Shapes: S rows, T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeserve.core.batch import MicroBatch
from pipeserve.runtime.cuda_graphs import StepGraphs
from pipeserve.runtime.devices import int_tensor
from pipeserve.runtime.gpu_shapes import GpuShapes
from pipeserve.runtime.late_sampler import LateSampler
from pipeserve.runtime.prompt_scorer import PromptScorer, ScoredChunk
from pipeserve.runtime.sampled import Drawn, Sampled, to_host
from pipeserve.runtime.sampler import Sampler
from pipeserve.runtime.step_computation import StepComputation
from pipeserve.runtime.step_inputs import StepInputs, exact_shape, pack


class ModelRunner:
    """Computes steps by a captured graph where one fits, else eagerly; the last stage samples."""

    def __init__(
        self,
        *,
        computation: StepComputation,
        sampler: Sampler | LateSampler | None,
        scorer: PromptScorer | None,
        graphs: StepGraphs | None,
        shapes: GpuShapes | None,
        device: torch.device,
    ) -> None:
        """sampler, scorer: of the last stage. shapes: that eager steps are padded to; None where
        they need not be."""
        self._computation = computation
        self._block_table = computation.block_table
        self._token_pool = computation.token_pool
        self._sampler = sampler
        self._scorer = scorer
        self._graphs = graphs
        self._shapes = shapes
        self._device = device
        is_card = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if is_card and sampler is not None else None

    def run(self, batch: MicroBatch, hidden_TD: Tensor | None) -> Tensor | Sampled:
        """Compute a step. hidden_TD is the previous stage's output, None on the first stage.

        On the first stage the tokens of needs_step must be in the token pool. Hidden states are
        valid until the next step.
        """
        self._block_table.apply(batch)
        if self._sampler is None or self._scorer is None:
            return self._compute(batch, hidden_TD)
        for start in batch.starts:
            self._scorer.start(start)
        if not self._scorer.is_wanted(batch):
            return self._sample(self._sampler, batch, self._compute(batch, hidden_TD), ())
        # Eagerly: a graph does not keep the hidden states of all tokens.
        inputs, hidden_TD, max_length = self._inputs(batch, hidden_TD)
        x_TD = self._computation.hidden(inputs, hidden_TD, max_length=max_length)
        logits_SV = self._computation.sampled_logits(inputs, x_TD)[: int(batch.samples_S.sum())]
        return self._sample(self._sampler, batch, logits_SV, self._scorer.score(batch, x_TD))

    def _compute(self, batch: MicroBatch, hidden_TD: Tensor | None) -> Tensor:
        out = None if self._graphs is None else self._graphs.replay(batch, hidden_TD)
        if out is not None:
            return out
        inputs, hidden_TD, max_length = self._inputs(batch, hidden_TD)
        out = self._computation(inputs, hidden_TD, max_length=max_length)
        return out[: int(batch.samples_S.sum()) if self._computation.samples else batch.num_tokens]

    def _inputs(
        self, batch: MicroBatch, hidden_TD: Tensor | None
    ) -> tuple[StepInputs[Tensor], Tensor | None, int | None]:
        """What an eager step is computed from, with fillers where steps have shapes, and its
        max_length."""
        if self._shapes is None:
            shape, max_length = exact_shape(batch), _most_positions(batch)
        else:
            shape, max_length = self._shapes.find(batch), None
            if hidden_TD is not None:
                padded_TD = hidden_TD.new_zeros((shape.num_tokens, hidden_TD.shape[1]))
                padded_TD[: len(hidden_TD)].copy_(hidden_TD)
                hidden_TD = padded_TD
        inputs = StepInputs.of(int_tensor(pack(batch, shape), self._device), shape)
        return inputs, hidden_TD, max_length

    def _sample(
        self,
        sampler: Sampler | LateSampler,
        batch: MicroBatch,
        logits_SV: Tensor,
        scored: tuple[ScoredChunk, ...],
    ) -> Sampled:
        for start in batch.starts:
            sampler.start(start)
        rows_S = batch.sampled_rows
        if len(rows_S) == 0:
            nobody_S = int_tensor(rows_S, self._device)
            self._token_pool.publish(batch.step_id, rows_S, nobody_S)
            if scored:
                return self._to_host(Drawn(ids_S=nobody_S, logprobs=None), scored)
            return Sampled(ids_S=torch.empty(0, dtype=torch.int32), arrived=None, logprobs=None)
        drawn = sampler.sample_step(logits_SV, batch)
        self._token_pool.publish(batch.step_id, rows_S, drawn.ids_S)
        return self._to_host(drawn, scored)

    def _to_host(self, drawn: Drawn, scored: tuple[ScoredChunk, ...]) -> Sampled:
        return to_host(drawn, scored, stream=self._copying)


def _most_positions(batch: MicroBatch) -> int:
    """Of the longest row, after the step."""
    return int((batch.first_positions_S + batch.num_tokens_S).max())
