"""StepComputation: one stage's arithmetic for a step, from packed inputs to hidden states or
logits.

Runs eagerly or under capture, on the stage's thread and stream; reads and writes the stage's device
alone and never waits for it.

Shapes: T all tokens of a step (decode rows, then prefill), N sampled rows, D model dim, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeserve.models.layers import (
    AttentionMetadata,
    DecodeMetadata,
    Decoder,
    LayerCache,
    PrefillMetadata,
)
from pipeserve.runtime.block_table import BlockTable
from pipeserve.runtime.step_inputs import FROM_POOL, PADDING, StepInputs
from pipeserve.runtime.token_pool import TokenPool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepComputation:
    """The parts of a stage that its steps compute with."""

    decoder: Decoder
    caches: Sequence[LayerCache]
    block_table: BlockTable
    token_pool: TokenPool

    @property
    def embeds(self) -> bool:
        """Whether this is the first stage."""
        return self.decoder.embedding is not None

    @property
    def samples(self) -> bool:
        """Whether this is the last stage."""
        return self.decoder.head is not None

    def __call__(
        self,
        inputs: StepInputs[Tensor],
        hidden_TD: Tensor | None,
        *,
        max_length: int | None,
        out_NV: Tensor | None = None,
    ) -> Tensor:
        """[T, D], or on the last stage [N, V] float32, written to out_NV if that is given.

        hidden_TD: the previous stage's output, None on the first stage. max_length: of the rows,
        where the host knows it; without, the shapes depend on the inputs' shapes alone.
        """
        if not self.samples:
            return self.hidden(inputs, hidden_TD, max_length=max_length)
        wanted_N = inputs.sampled_tokens_N if len(inputs.chunk_rows_C) > 0 else None
        return self._logits(self._forward(inputs, hidden_TD, max_length, wanted_N), out_NV)

    def hidden(
        self, inputs: StepInputs[Tensor], hidden_TD: Tensor | None, *, max_length: int | None
    ) -> Tensor:
        """[T, D] behind this stage's last layer; arguments as of a call."""
        return self._forward(inputs, hidden_TD, max_length, None)

    def sampled_logits(self, inputs: StepInputs[Tensor], x_TD: Tensor) -> Tensor:
        """[N, V] float32 of the last stage's hidden states."""
        if len(inputs.chunk_rows_C) > 0:
            x_TD = x_TD.index_select(0, inputs.sampled_tokens_N)
        return self._logits(x_TD)

    def _forward(
        self,
        inputs: StepInputs[Tensor],
        hidden_TD: Tensor | None,
        max_length: int | None,
        wanted_N: Tensor | None,
    ) -> Tensor:
        x_TD = self._embed(inputs) if hidden_TD is None else hidden_TD
        metadata = self._metadata(inputs, max_length)
        return self.decoder.forward(x_TD, self.caches, metadata, wanted_W=wanted_N)

    def _logits(self, x_ND: Tensor, out_NV: Tensor | None = None) -> Tensor:
        if len(x_ND) == 0:
            return x_ND.new_empty((0, self.decoder.config.vocab_size))
        return self.decoder.logits(x_ND, out_SV=out_NV)

    def _embed(self, inputs: StepInputs[Tensor]) -> Tensor:
        ids_T = self.token_pool.read(inputs.rows_T)
        if len(inputs.chunk_rows_C) > 0:
            given_T = inputs.token_ids_T
            ids_T = torch.where(given_T == FROM_POOL, ids_T, given_T)
        return self.decoder.embed(ids_T)

    def _decode_metadata(
        self, inputs: StepInputs[Tensor], max_length: int | None
    ) -> AttentionMetadata:
        """Of a step without prefill, by a kernel made for it: such steps are short."""
        table = self.block_table
        slots_T, lengths_S, table_SB = self.decoder.backend.decode_places(
            table.columns(max_length=max_length), inputs.rows_T, inputs.positions_T,
            table.block_size,
        )  # fmt: skip
        return AttentionMetadata(
            positions_T=inputs.positions_T,
            slots_T=slots_T,
            decode=DecodeMetadata(block_table_SB=table_SB, lengths_S=lengths_S),
            prefill=None,
        )

    def _metadata(self, inputs: StepInputs[Tensor], max_length: int | None) -> AttentionMetadata:
        if len(inputs.chunk_rows_C) == 0:
            return self._decode_metadata(inputs, max_length)
        table, num_decode = self.block_table, len(inputs.lengths_R)
        slots_T = table.slots(inputs.rows_T, inputs.positions_T.clamp(min=0))
        decode = None
        if num_decode > 0:
            decode = DecodeMetadata(
                block_table_SB=table.rows(inputs.rows_T[:num_decode], max_length=max_length),
                lengths_S=inputs.lengths_R,
            )
        return AttentionMetadata(
            positions_T=inputs.positions_T,
            slots_T=torch.where(inputs.positions_T < 0, PADDING, slots_T),
            decode=decode,
            prefill=PrefillMetadata(
                block_table_SB=table.rows(inputs.chunk_rows_C, max_length=max_length),
                starts_S=inputs.chunk_starts_C,
                first_positions_S=inputs.chunk_first_positions_C,
                num_tokens_S=inputs.chunk_num_tokens_C,
            ),
        )
