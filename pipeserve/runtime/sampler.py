"""Sampler: logits of a step to token ids, by each row's own SamplingParams.

Runs on the last stage's thread, that for late rows beside it (LateThread); owns what it knows of
each row. The host decides from the parameters which kernels a step needs, and waits for none.

Shapes: S sampled rows of a step, R row slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import IntArray, MicroBatch, RowStart, StepMasks
from pipeserve.core.constraint import num_words
from pipeserve.core.sampler_chain import Dry, Mirostat, SamplerChain
from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels.sampling_backend import SamplingBackend
from pipeserve.kernels.sampling_state import Penalties
from pipeserve.runtime.chain_sampler import ChainSampler
from pipeserve.runtime.devices import int_tensor
from pipeserve.runtime.row_parameters import Method, RowParameters, SamplingStep
from pipeserve.runtime.sampled import AskedLogprobs, Drawn
from pipeserve.runtime.step_tensors import Line, upload_masks


class Sampler:
    """What a row's token is does not depend on the other rows of the step.

    Memory on the device: nothing until the first row with penalties starts, then R * V * 5 bytes
    for what rows have seen (336 MB for 256 rows of a vocabulary of 262,144). A step with
    penalties, biased logits or masks copies its logits besides, S * V * 4 bytes while it runs.
    """

    def __init__(
        self, *, num_rows: int, vocab_size: int, device: torch.device, backend: SamplingBackend
    ) -> None:
        self._shape_RV = (num_rows, vocab_size)
        self._device = device
        self._kernels = backend
        self._parameters = RowParameters(num_rows=num_rows, vocab_size=vocab_size, device=device)
        self._seen: _SeenTokens | None = None
        self._chains: ChainSampler | None = None

    def start(self, start: RowStart) -> None:
        """A sequence takes a row."""
        self._parameters.start(start)
        if start.sampling.has_penalties:
            if self._seen is None:
                self._seen = _SeenTokens(self._shape_RV, self._device)
            self._seen.start(start)
        if self._chains is None and start.sampling.chain is not None:
            self._chains = ChainSampler(
                num_rows=self._shape_RV[0],
                vocab_size=self._shape_RV[1],
                device=self._device,
                backend=self._kernels,
            )
        if self._chains is not None:
            self._chains.start(start)

    def sample_step(self, logits_SV: Tensor, batch: MicroBatch) -> Drawn:
        """`sample` for the sampled rows of a step, none of which is late."""
        assert batch.late_seqs_L is None, "this sampler samples in the step"
        return self.sample(logits_SV, batch.sampled_rows, batch.sampled_positions, batch.masks)

    def sample(
        self,
        logits_SV: Tensor,
        rows_S: IntArray,
        positions_S: IntArray,
        masks: StepMasks | None = None,
    ) -> Drawn:
        """Sample one token per row, and leave the logits as they are.

        positions_S: where in its sequence each token will stand.
        """
        step = self._parameters.step(rows_S, positions_S)
        penalties = self._penalties(step)
        adjusted_SV = self._adjust(logits_SV, step, penalties)
        if masks is not None:
            if adjusted_SV is logits_SV:
                adjusted_SV = logits_SV.clone()
            self._kernels.apply_masks(adjusted_SV, *upload_masks(masks, self._device))
        if self._chains is not None and self._chains.draws_all(rows_S):
            ids_S = torch.empty(len(rows_S), dtype=torch.int64, device=self._device)
        else:
            ids_S = self._draw(adjusted_SV, step)
        if self._chains is not None:
            self._chains.sample(adjusted_SV, ids_S, rows_S, positions_S)
        if penalties is not None:
            rows = step.on_device
            self._kernels.record(
                *(ids_S, rows.longs(Line.ROWS), rows.ints(Line.POSITIONS)),
                penalties.output_counts_RV,
                None,
            )
        return Drawn(ids_S=ids_S, logprobs=self._log_probs(logits_SV, ids_S, step))

    def _penalties(self, step: SamplingStep) -> Penalties | None:
        """None where no row of the step has any."""
        if not step.has_penalties:
            return None
        assert self._seen is not None, "made when the first such row started"
        return Penalties(
            in_prompt_RV=self._seen.in_prompt_RV,
            output_counts_RV=self._seen.output_counts_RV,
            repetition_S=step.on_device.floats(Line.REPETITION),
            presence_S=step.on_device.floats(Line.PRESENCE),
            frequency_S=step.on_device.floats(Line.FREQUENCY),
        )

    def _adjust(self, logits_SV: Tensor, step: SamplingStep, penalties: Penalties | None) -> Tensor:
        """Bias, penalties and min_tokens."""
        if penalties is None and not step.has_bias:
            return logits_SV
        rows_S = step.on_device.longs(Line.ROWS)
        if penalties is None:
            adjusted_SV = logits_SV.clone()
        else:
            adjusted_SV = self._kernels.apply_penalties(logits_SV, rows_S, penalties)
        if step.has_bias:
            bias = step.on_device.bias()
            self._kernels.apply_bias(logits_SV, adjusted_SV, bias, rows_S, penalties)
        return adjusted_SV

    def _draw(self, logits_SV: Tensor, step: SamplingStep) -> Tensor:
        if step.method is Method.GREEDY:
            return self._kernels.greedy(logits_SV)
        rows = step.on_device
        uniform_S = self._kernels.uniform(rows.longs(Line.SEEDS), rows.ints(Line.POSITIONS))
        temperature_S, min_p_S = rows.floats(Line.TEMPERATURE), rows.floats(Line.MIN_P)
        if step.method is Method.DRAW:
            return self._kernels.sample(logits_SV, temperature_S, min_p_S, uniform_S)
        top_k_S, top_p_S = rows.ints(Line.TOP_K), rows.floats(Line.TOP_P)
        return self._kernels.sample_filtered(
            logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, uniform_S
        )

    def _log_probs(
        self, logits_SV: Tensor, ids_S: Tensor, step: SamplingStep
    ) -> AskedLogprobs | None:
        if len(step.asked_G) == 0:
            return None
        token_G, top_ids_GK, top_GK = self._kernels.log_probs(
            logits_SV, ids_S, step.on_device.ints(Line.ASKED), step.num_top
        )
        return AskedLogprobs(
            asked_G=step.asked_G, token_G=token_G, top_ids_GK=top_ids_GK, top_GK=top_GK
        )


def compile_kernels(*, vocab_size: int, device: torch.device, backend: SamplingBackend) -> None:
    """On a GPU, run everything once, so that no sequence waits for the compiler when it is the
    first to use a parameter. Takes seconds where the kernels are not in the compiler's cache."""
    plain = SamplingParams(max_tokens=1, seed=0, num_logprobs=1)
    cases = (
        plain,
        replace(plain, temperature=0.0, logit_bias=((0, 1.0),)),
        replace(plain, top_p=0.5, presence_penalty=1.0),
        replace(plain, top_p=0.5, presence_penalty=1.0, logit_bias=((0, 1.0),)),
        replace(plain, chain=SamplerChain(mirostat=Mirostat())),
        replace(
            plain,
            top_k=1,
            top_p=0.5,
            min_p=0.1,
            presence_penalty=1.0,
            chain=SamplerChain(
                penalty_window=1,
                dry=Dry(multiplier=1.0),
                top_n_sigma=1.0,
                typical_p=0.9,
                xtc_probability=0.5,
                dynatemp_range=0.5,
            ),
        ),
    )
    sampler = Sampler(num_rows=1, vocab_size=vocab_size, device=device, backend=backend)
    words_MW = np.full((1, num_words(vocab_size)), -1, dtype=np.int32)
    masks = StepMasks(seqs_M=np.zeros(1, dtype=np.int32), words_MW=words_MW)
    zero, logits_SV = np.zeros(1, dtype=np.int32), torch.zeros((1, vocab_size), device=device)
    with torch.cuda.device(device):
        for params in cases:
            sampler.start(RowStart(row=0, sampling=params, token_ids=zero, num_prompt_tokens=1))
            sampler.sample(logits_SV, zero, zero, masks)


class _SeenTokens:
    """Which tokens the sequences of rows with penalties hold; other rows' lines mean nothing."""

    def __init__(self, shape_RV: tuple[int, int], device: torch.device) -> None:
        self.in_prompt_RV = torch.zeros(shape_RV, dtype=torch.bool, device=device)
        self.output_counts_RV = torch.zeros(shape_RV, dtype=torch.int32, device=device)

    def start(self, start: RowStart) -> None:
        device = self.in_prompt_RV.device
        token_ids = int_tensor(start.token_ids, device)
        prompt, output = token_ids.tensor_split([start.num_prompt_tokens])
        self.in_prompt_RV[start.row].zero_().index_fill_(0, prompt, True)
        ones = torch.ones(output.shape, dtype=torch.int32, device=device)
        self.output_counts_RV[start.row].zero_().index_add_(0, output, ones)
