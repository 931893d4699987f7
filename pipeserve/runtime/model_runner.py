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
from pipeserve.runtime.devices import int_tensor
from pipeserve.runtime.sampler import Sampler
from pipeserve.runtime.token_pool import TokenPool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """What the last stage made of a step: a token for every row with samples_S."""

    token_ids: IntArray
    logprobs: StepLogprobs | None


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
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._caches = caches
        self._block_table = block_table
        self._token_pool = token_pool
        self._sampler = sampler
        self._device = device

    def run(self, batch: MicroBatch, hidden_TD: Tensor | None) -> Tensor | Sampled:
        """Compute a step. hidden_TD is the previous stage's output, None on the first stage.

        On the first stage the tokens of needs_step must be in the token pool.
        """
        self._block_table.apply(batch)
        metadata = self._attention_metadata(batch)
        x_TD = self._embed(batch) if hidden_TD is None else hidden_TD.to(self._device)
        x_TD = self._decoder.forward(x_TD, self._caches, metadata)
        if self._sampler is None:
            return x_TD
        return self._sample(self._sampler, batch, x_TD)

    def _embed(self, batch: MicroBatch) -> Tensor:
        decode_rows = self._tensor(batch.rows_S[: batch.num_decode_rows])
        prefill_ids = self._tensor(batch.prefill_token_ids)
        return self._decoder.embed(torch.cat((self._token_pool.read(decode_rows), prefill_ids)))

    def _sample(self, sampler: Sampler, batch: MicroBatch, x_TD: Tensor) -> Sampled:
        for start in batch.starts:
            sampler.start(start)
        chosen = batch.samples_S
        rows_S = batch.rows_S[chosen]
        if len(rows_S) == 0:
            self._token_pool.publish(batch.step_id, self._tensor(rows_S), self._tensor(rows_S))
            return Sampled(token_ids=np.empty(0, dtype=np.int32), logprobs=None)
        last_tokens_S = np.cumsum(batch.num_tokens_S)[chosen] - 1
        logits_SV = self._decoder.logits(x_TD[self._tensor(last_tokens_S)])
        positions_S = (batch.first_positions_S + batch.num_tokens_S)[chosen]
        ids_S, logprobs = sampler.sample(logits_SV, rows_S, positions_S)
        self._token_pool.publish(batch.step_id, self._tensor(rows_S), ids_S)
        return Sampled(token_ids=ids_S.to("cpu", torch.int32).numpy(), logprobs=logprobs)

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
