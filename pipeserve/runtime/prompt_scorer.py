"""PromptScorer: log-probabilities of a prompt's own tokens, for the rows that asked for them.

Runs on the last stage's thread, behind a step's computation and on its stream.

Shapes: T tokens of a step, P prompt tokens of one row that are scored, K alternatives, D model dim,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import IntArray, MicroBatch, PromptLogprobs, RowStart
from pipeserve.kernels.sampling_backend import SamplingBackend
from pipeserve.models.layers import Decoder
from pipeserve.runtime.devices import int_tensor

SCORED_AT_ONCE = 64
"""Tokens whose logits exist at a time: 33 MB of a vocabulary of 128,000."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredChunk:
    """Log-probabilities of some tokens of a prompt, on the device or on the host."""

    seq_id: int
    first: int
    """Where in the prompt the first of them stands, at least 1."""
    token_P: Tensor
    top_ids_PK: Tensor
    top_PK: Tensor

    def read(self) -> PromptLogprobs:
        """As a message; of a GPU's, only once the copies to the host have arrived."""
        return PromptLogprobs(
            seq_id=self.seq_id,
            first=self.first,
            token_P=self.token_P.numpy(),
            top_ids_PK=self.top_ids_PK.numpy().astype(np.int32),
            top_PK=self.top_PK.numpy(),
        )


class PromptScorer:
    """Knows which rows asked, from their start until their prompt is computed."""

    def __init__(self, *, decoder: Decoder, kernels: SamplingBackend, device: torch.device) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._device = device
        self._asked: dict[int, RowStart] = {}

    def start(self, start: RowStart) -> None:
        """A sequence takes a row."""
        if start.sampling.num_prompt_logprobs is None:
            self._asked.pop(start.row, None)
        else:
            self._asked[start.row] = start

    def is_wanted(self, batch: MicroBatch) -> bool:
        """Whether a prefill row of the step asked."""
        if not self._asked:
            return False
        return not self._asked.keys().isdisjoint(batch.rows_S[batch.num_decode_rows :].tolist())

    def score(self, batch: MicroBatch, x_TD: Tensor) -> tuple[ScoredChunk, ...]:
        """x_TD: what the last layer made of the step's tokens, fillers behind them."""
        scored = []
        ends = np.cumsum(batch.num_tokens_S).tolist()
        for index in range(batch.num_decode_rows, batch.num_rows):
            start = self._asked.get(int(batch.rows_S[index]))
            if start is None:
                continue
            first, num_tokens = int(batch.first_positions_S[index]), int(batch.num_tokens_S[index])
            # The prompt's last token foretells what is generated, which the sampler scores.
            targets_P = start.token_ids[
                first + 1 : min(first + 1 + num_tokens, start.num_prompt_tokens)
            ]
            if first + num_tokens >= start.num_prompt_tokens:
                del self._asked[start.row]
            if len(targets_P) > 0:
                begin = ends[index] - num_tokens
                chunk_PD = x_TD[begin : begin + len(targets_P)]
                scored.append(self._score_row(start, first + 1, targets_P, chunk_PD))
        return tuple(scored)

    def _score_row(
        self, start: RowStart, first: int, targets_P: IntArray, x_PD: Tensor
    ) -> ScoredChunk:
        num_top = min(start.sampling.num_prompt_logprobs or 0, self._decoder.config.vocab_size)
        parts = [
            self._score(
                targets_P[at : at + SCORED_AT_ONCE], x_PD[at : at + SCORED_AT_ONCE], num_top
            )
            for at in range(0, len(targets_P), SCORED_AT_ONCE)
        ]
        token_P, top_ids_PK, top_PK = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return ScoredChunk(
            seq_id=start.seq_id, first=first, token_P=token_P, top_ids_PK=top_ids_PK, top_PK=top_PK
        )

    def _padded(self, x_PD: Tensor) -> Tensor:
        """On a GPU always SCORED_AT_ONCE rows: others could need kernels that are not compiled."""
        num_missing = SCORED_AT_ONCE - len(x_PD)
        if self._device.type == "cpu" or num_missing == 0:
            return x_PD
        return torch.cat((x_PD, x_PD.new_zeros((num_missing, x_PD.shape[1]))))

    def _score(
        self, targets_P: IntArray, x_PD: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_PV = self._decoder.logits(self._padded(x_PD))
        all_P = torch.arange(len(targets_P), dtype=torch.int32, device=self._device)
        return self._kernels.log_probs(
            logits_PV, int_tensor(targets_P, self._device), all_P, num_top
        )
