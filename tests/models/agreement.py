"""The margin rule: what "the same output" means where matrix libraries round differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeserve.core.batch import IntArray, StepMasks
from pipeserve.runtime.sampled import Drawn
from pipeserve.runtime.sampler import Sampler
from tests.runtime.driver import Result

LOGIT_TOLERANCE = 1e-3
MARGIN = 2e-3


class LogitRecord:
    """Every row of logits that a sampler got, by (row, position of the token)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], np.ndarray] = {}

    def of_row(self, row: int, first_position: int, num_tokens: int) -> np.ndarray:
        """[tokens, V]: what the tokens of one sequence were sampled from."""
        return np.stack([self.rows[row, first_position + i] for i in range(num_tokens)])


@contextmanager
def recorded_logits() -> Iterator[LogitRecord]:
    """Within the block, samplers write down the logits they get."""
    record = LogitRecord()
    sample = Sampler.sample

    def recording(
        self: Sampler,
        logits_SV: Tensor,
        rows_S: IntArray,
        positions_S: IntArray,
        masks: StepMasks | None = None,
    ) -> Drawn:
        for index, key in enumerate(zip(rows_S.tolist(), positions_S.tolist(), strict=True)):
            record.rows[key] = logits_SV[index].cpu().numpy().copy()
        return sample(self, logits_SV, rows_S, positions_S, masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", recording)
        yield record


def reference_logits(
    model: PreTrainedModel, prompt: Sequence[int], output: Sequence[int]
) -> np.ndarray:
    """[len(output), V]: the reference's logits in front of each output token."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]], device=model.device)).logits[0]
    return logits[len(prompt) - 1 : -1].float().cpu().numpy()


def assert_agrees(
    output: Sequence[int], logits: np.ndarray, reference: np.ndarray, *, least_decided: int
) -> None:
    """Greedy output and its logits against the reference's along the same tokens.

    Since the reference is led along our tokens, ids are compared at every step, also beyond one
    with a small margin. At `least_decided` steps the margin must be large enough to compare ids.
    """
    np.testing.assert_allclose(logits, reference, atol=LOGIT_TOLERANCE, rtol=0)
    second, first = np.sort(reference, axis=1)[:, -2:].T
    decided = first - second > MARGIN
    assert decided.sum() >= least_decided
    np.testing.assert_array_equal(np.array(output)[decided], reference.argmax(axis=1)[decided])


def assert_same_output(result: Result, baseline: Result) -> None:
    """Two greedy runs of ours, each with two log-probabilities per token.

    Up to the first step with a margin that rounding may turn over, ids are the same and
    log-probabilities agree.
    """
    first, second = np.array(baseline.top_logprobs)[:, :2].T
    small = np.flatnonzero(first - second <= MARGIN)
    end = int(small[0]) if len(small) else len(first)
    assert result.token_ids[:end] == baseline.token_ids[:end]
    np.testing.assert_allclose(
        result.logprobs[:end], baseline.logprobs[:end], atol=LOGIT_TOLERANCE, rtol=0
    )
