"""ModelRunner: one stage's computation of a micro-batch, from numpy arrays to hidden states or ids.

Runs on the stage's thread and owns the stage's per-row state; knows nothing of threads or queues.

Shapes: S rows, T tokens, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import IntArray, MicroBatch, StepLogprobs
from pipeserve.models.layers import (
    AttentionMetadata,
    DecodeMetadata,
    Decoder,
    LayerCache,
    PrefillMetadata,
)
from pipeserve.runtime.block_table import BlockTable
from pipeserve.runtime.cuda_graphs import DecodeGraphs
from pipeserve.runtime.devices import int_tensor
from pipeserve.runtime.sampler import Sampler
from pipeserve.runtime.token_pool import TokenPool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """What the last stage made of a step: a token for every row with samples_S.

    Of a GPU the ids are on their way to the host: reading them waits, so not on a stage's thread.
    """

    ids_S: Tensor
    """int32 on the host."""
    arrived: torch.cuda.Event | None
    """Recorded behind the copy to ids_S; None where that is done."""
    logprobs: StepLogprobs | None

    def token_ids(self) -> IntArray:
        """Wait for the ids."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.ids_S.numpy()


class ModelRunner:
    """The first stage gets ids and embeds them, the last one samples; one stage may be both."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        caches: Sequence[LayerCache],
        block_table: BlockTable,
        token_pool: TokenPool,
        sampler: Sampler | None,
        graphs: DecodeGraphs | None,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._caches = caches
        self._block_table = block_table
        self._token_pool = token_pool
        self._sampler = sampler
        self._graphs = graphs
        self._device = device

    def run(self, batch: MicroBatch, hidden_TD: Tensor | None) -> Tensor | Sampled:
        """Compute a step. hidden_TD is the previous stage's output, None on the first stage.

        On the first stage the tokens of needs_step must be in the token pool.
        """
        self._block_table.apply(batch)
        if self._can_replay(batch):
            assert self._graphs is not None
            out = self._graphs.replay(batch, hidden_TD)
            return out if self._sampler is None else self._sample(self._sampler, batch, out)
        metadata = self._attention_metadata(batch)
        x_TD = self._embed(batch) if hidden_TD is None else hidden_TD.to(self._device)
        x_TD = self._decoder.forward(x_TD, self._caches, metadata)
        if self._sampler is None:
            return x_TD
        return self._sample(self._sampler, batch, self._logits(batch, x_TD))

    def _can_replay(self, batch: MicroBatch) -> bool:
        is_decode_only = batch.num_decode_rows == batch.num_rows
        return (
            self._graphs is not None and is_decode_only and batch.num_rows <= self._graphs.num_rows
        )

    def _embed(self, batch: MicroBatch) -> Tensor:
        decode_rows = self._tensor(batch.rows_S[: batch.num_decode_rows])
        prefill_ids = self._tensor(batch.prefill_token_ids)
        return self._decoder.embed(torch.cat((self._token_pool.read(decode_rows), prefill_ids)))

    def _logits(self, batch: MicroBatch, x_TD: Tensor) -> Tensor:
        """[S, V] after the last token of every row that samples."""
        last_tokens_S = np.cumsum(batch.num_tokens_S)[batch.samples_S] - 1
        if len(last_tokens_S) == 0:
            return x_TD.new_empty((0, self._decoder.config.vocab_size))
        return self._decoder.logits(x_TD[self._tensor(last_tokens_S)])

    def _sample(self, sampler: Sampler, batch: MicroBatch, logits_SV: Tensor) -> Sampled:
        for start in batch.starts:
            sampler.start(start)
        rows_S = batch.rows_S[batch.samples_S]
        if len(rows_S) == 0:
            self._token_pool.publish(batch.step_id, self._tensor(rows_S), self._tensor(rows_S))
            return Sampled(ids_S=torch.empty(0, dtype=torch.int32), arrived=None, logprobs=None)
        positions_S = (batch.first_positions_S + batch.num_tokens_S)[batch.samples_S]
        ids_S, logprobs = sampler.sample(logits_SV, rows_S, positions_S)
        self._token_pool.publish(batch.step_id, self._tensor(rows_S), ids_S)
        return _to_host(ids_S, logprobs)

    def _attention_metadata(self, batch: MicroBatch) -> AttentionMetadata:
        num_decode, num_tokens_S = batch.num_decode_rows, batch.num_tokens_S
        lengths_S = batch.first_positions_S + num_tokens_S
        # Position of token t: t, moved so that each row begins at its first position.
        offsets_S = batch.first_positions_S - (np.cumsum(num_tokens_S) - num_tokens_S)
        positions = np.arange(batch.num_tokens) + np.repeat(offsets_S, num_tokens_S)
        positions_T = self._tensor(positions)
        rows_T = self._tensor(np.repeat(batch.rows_S, num_tokens_S))
        decode = prefill = None
        if num_decode > 0:
            decode = DecodeMetadata(
                block_table_SB=self._block_rows(batch.rows_S[:num_decode], lengths_S[:num_decode]),
                lengths_S=self._tensor(lengths_S[:num_decode]),
            )
        if num_decode < batch.num_rows:
            prefill = PrefillMetadata(
                block_table_SB=self._block_rows(batch.rows_S[num_decode:], lengths_S[num_decode:]),
                first_positions_S=self._tensor(batch.first_positions_S[num_decode:]),
                num_tokens_S=self._tensor(num_tokens_S[num_decode:]),
            )
        return AttentionMetadata(
            positions_T=positions_T,
            slots_T=self._block_table.slots(rows_T, positions_T),
            num_decode_rows=num_decode,
            decode=decode,
            prefill=prefill,
        )

    def _block_rows(self, rows_S: IntArray, lengths_S: IntArray) -> Tensor:
        return self._block_table.rows(self._tensor(rows_S), max_length=int(lengths_S.max()))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return int_tensor(array, self._device)


def _to_host(ids_S: Tensor, logprobs: StepLogprobs | None) -> Sampled:
    ids_S = ids_S.to(torch.int32)
    if ids_S.device.type == "cpu":
        return Sampled(ids_S=ids_S, arrived=None, logprobs=logprobs)
    pinned_S = torch.empty(ids_S.shape, dtype=torch.int32, pin_memory=True)
    pinned_S.copy_(ids_S, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Sampled(ids_S=pinned_S, arrived=arrived, logprobs=logprobs)
