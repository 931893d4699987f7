"""RowParameters: what the host knows of every row's sampling, and what a step needs of it.

Runs on the last stage's thread. Each step brings its rows' numbers along, so that starting a row
copies nothing to the device and leaves nothing of the row's previous sequence there.

Shapes: S sampled rows of a step, R row slots, F numbers of a row, G rows that asked for
log-probabilities, E biased logits of a step.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from pipeserve.core.batch import FloatArray, IntArray, RowStart
from pipeserve.core.sampling import SamplingParams
from pipeserve.runtime.step_tensors import NUMBERS, StepArrays, StepTensors, upload


class Method(enum.Enum):
    """How a step's tokens are found, cheapest first; each also does what those before it do."""

    GREEDY = enum.auto()
    DRAW = enum.auto()
    """From all tokens, or those above min_p."""
    DRAW_FILTERED = enum.auto()
    """After top-k or top-p."""


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots, for the sake of cached_property
class SamplingStep:
    """What the rows of one step need."""

    method: Method
    has_penalties: bool
    has_bias: bool
    asked_G: IntArray
    """Which of the step's rows asked for log-probabilities."""
    num_top: int
    """Most alternatives that one of them asked for."""
    arrays: StepArrays
    device: torch.device

    @cached_property
    def on_device(self) -> StepTensors:
        """The rows' numbers, sent once somebody asks; the host does not wait for them."""
        return upload(self.arrays, self.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Bias:
    """Of one row; ids are unique."""

    ids_E: IntArray
    values_E: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RowBias:
    before_min_tokens: _Bias
    """With the stop tokens banned."""
    afterwards: _Bias


_NO_IDS = np.zeros(0, dtype=np.int32)
_NO_VALUES = np.zeros(0, dtype=np.float32)


class RowParameters:
    """Written by `start`, read by `step`."""

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._is_started_R = np.zeros(num_rows, dtype=np.bool_)
        self._seeds_R = np.zeros(num_rows, dtype=np.int64)
        self._numbers_FR = np.zeros((len(NUMBERS), num_rows), dtype=np.int32)
        self._is_greedy_R = np.zeros(num_rows, dtype=np.bool_)
        self._is_filtered_R = np.zeros(num_rows, dtype=np.bool_)
        self._has_penalties_R = np.zeros(num_rows, dtype=np.bool_)
        self._num_logprobs_R = np.full(num_rows, -1, dtype=np.int32)
        self._has_bias_R = np.zeros(num_rows, dtype=np.bool_)
        self._bias: dict[int, _RowBias] = {}
        # From this position on a row's stop tokens are not banned.
        self._first_stop_R = np.zeros(num_rows, dtype=np.int32)

    def start(self, start: RowStart) -> None:
        """A sequence takes a row."""
        row, params = start.row, _plain_part(start.sampling)
        top_k = self._vocab_size if params.top_k is None else params.top_k
        self._seeds_R[row] = params.seed
        self._numbers_FR[0, row] = min(top_k, self._vocab_size)
        self._numbers_FR[1:].view(np.float32)[:, row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._is_greedy_R[row] = params.is_greedy
        is_filtered = top_k < self._vocab_size or params.top_p < 1.0
        self._is_filtered_R[row] = is_filtered and not params.is_greedy
        self._has_penalties_R[row] = params.has_penalties
        self._num_logprobs_R[row] = -1 if params.num_logprobs is None else params.num_logprobs
        self._start_bias(start)
        self._is_started_R[row] = True

    def _start_bias(self, start: RowStart) -> None:
        row, params = start.row, start.sampling
        self._first_stop_R[row] = start.num_prompt_tokens + params.min_tokens
        self._has_bias_R[row] = params.min_tokens > 0 or len(params.logit_bias) > 0
        if self._has_bias_R[row]:
            self._bias[row] = _row_bias(params, self._vocab_size)
        else:
            self._bias.pop(row, None)

    def step(self, rows_S: IntArray, positions_S: IntArray) -> SamplingStep:
        """What these rows need.

        positions_S: where in its sequence each row's token will stand.
        """
        assert self._is_started_R[rows_S].all(), f"rows {rows_S} sample before they were started"
        num_logprobs_S = self._num_logprobs_R[rows_S]
        asked_G = np.flatnonzero(num_logprobs_S >= 0).astype(np.int32)
        seqs_E, bias = self._step_bias(rows_S, positions_S)
        arrays = StepArrays(
            rows_S=rows_S,
            seeds_S=self._seeds_R[rows_S],
            positions_S=positions_S,
            numbers_FS=self._numbers_FR[:, rows_S],
            asked_G=asked_G,
            bias_seqs_E=seqs_E,
            bias_ids_E=bias.ids_E,
            bias_values_E=bias.values_E,
        )
        return SamplingStep(
            method=self._method(rows_S),
            has_penalties=bool(self._has_penalties_R[rows_S].any()),
            has_bias=len(seqs_E) > 0,
            asked_G=asked_G,
            num_top=min(int(num_logprobs_S.max()), self._vocab_size),
            arrays=arrays,
            device=self._device,
        )

    def _method(self, rows_S: IntArray) -> Method:
        if self._is_filtered_R[rows_S].any():
            return Method.DRAW_FILTERED
        is_greedy_S = self._is_greedy_R[rows_S]
        return Method.GREEDY if is_greedy_S.all() else Method.DRAW

    def _step_bias(self, rows_S: IntArray, positions_S: IntArray) -> tuple[IntArray, _Bias]:
        """Entries of all rows, and which row of the step each is of."""
        seqs = np.flatnonzero(self._has_bias_R[rows_S])
        if len(seqs) == 0:
            return _NO_IDS, _Bias(ids_E=_NO_IDS, values_E=_NO_VALUES)
        is_early_S = positions_S < self._first_stop_R[rows_S]
        found = []
        for seq in seqs.tolist():
            bias = self._bias[int(rows_S[seq])]
            found.append(bias.before_min_tokens if is_early_S[seq] else bias.afterwards)
        return (
            np.repeat(seqs, [len(bias.ids_E) for bias in found]).astype(np.int32),
            _Bias(
                ids_E=np.concatenate([bias.ids_E for bias in found]),
                values_E=np.concatenate([bias.values_E for bias in found]),
            ),
        )


def _plain_part(params: SamplingParams) -> SamplingParams:
    """What comes before a chain. The row's plain draw is a greedy one, the cheapest, which the
    chain's own then overwrites."""
    if params.chain is None:
        return params
    if not params.has_penalties:
        params = replace(
            params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
        )
    return replace(params, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)


def _row_bias(params: SamplingParams, vocab_size: int) -> _RowBias:
    """Of the tokens that exist: others have no logit that could change."""
    bias: dict[int, float] = {}
    for token, value in params.logit_bias:
        if 0 <= token < vocab_size:
            bias[token] = bias.get(token, 0.0) + value
    bans = {token: float("-inf") for token in params.stop_token_ids if 0 <= token < vocab_size}
    return _RowBias(before_min_tokens=_entries(bias | bans), afterwards=_entries(bias))


def _entries(bias: Mapping[int, float]) -> _Bias:
    return _Bias(
        ids_E=np.fromiter(bias.keys(), dtype=np.int32, count=len(bias)),
        values_E=np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
    )
