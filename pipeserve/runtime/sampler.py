"""Sampler: logits of a step to token ids, by each row's own SamplingParams.

Runs on the last stage's thread and owns what that stage knows of each row: parameters, seeds and
penalty counts. Rows are grouped by what they need, so that plain rows do not pay for exotic ones.

Shapes: S sampled rows of a step, G rows of a group, R all rows, V vocabulary, K alternatives.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import IntArray, RowStart, StepLogprobs
from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels import reference_sampling as kernels
from pipeserve.runtime.devices import int_tensor


class Method(enum.Enum):
    """How a row's token is found, cheapest first."""

    GREEDY = enum.auto()
    DRAW = enum.auto()
    """From all tokens, or those above min_p."""
    DRAW_FILTERED = enum.auto()
    """After top-k or top-p, which need the tokens in order of likelihood."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RowSampling:
    params: SamplingParams
    method: Method
    num_prompt_tokens: int
    bias_ids: Tensor
    bias_values: Tensor
    stop_ids: Tensor

    def adjusts(self, position: int) -> bool:
        """Whether the logits for the token at this position are changed before the draw."""
        return self.params.has_penalties or len(self.bias_ids) > 0 or self.bans_stop(position)

    def bans_stop(self, position: int) -> bool:
        return position - self.num_prompt_tokens < self.params.min_tokens


class Sampler:
    """Per-row parameters lie on the device under the row's number, set once by `start`."""

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._rows: list[_RowSampling | None] = [None] * num_rows
        self._seeds_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._top_k_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._temperature_R, self._top_p_R, self._min_p_R = torch.zeros(3, num_rows, device=device)
        self._penalties: _Penalties | None = None

    def start(self, start: RowStart) -> None:
        """A sequence takes a row."""
        row, params = start.row, start.sampling
        self._rows[row] = self._prepare(start)
        self._seeds_R[row] = params.seed
        self._top_k_R[row] = self._vocab_size if params.top_k is None else params.top_k
        self._temperature_R[row] = params.temperature
        self._top_p_R[row] = params.top_p
        self._min_p_R[row] = params.min_p
        if params.has_penalties:
            if self._penalties is None:
                self._penalties = _Penalties(
                    num_rows=len(self._rows), vocab_size=self._vocab_size, device=self._device
                )
            self._penalties.start(start)

    def sample(
        self, logits_SV: Tensor, rows_S: IntArray, positions_S: IntArray
    ) -> tuple[Tensor, StepLogprobs | None]:
        """Sample one token per row. positions_S: where in its sequence each token will stand."""
        states = [self._state(row) for row in rows_S.tolist()]
        rows_dev_S = int_tensor(rows_S, self._device)
        adjusted_SV = self._adjust(logits_SV, states, rows_dev_S, positions_S.tolist())
        positions_dev_S = int_tensor(positions_S, self._device)
        ids_S = self._draw(adjusted_SV, states, rows_dev_S, positions_dev_S)
        counted = _where(state.params.has_penalties for state in states)
        if counted:
            assert self._penalties is not None, "made when the first such row started"
            self._penalties.count(rows_dev_S[counted], ids_S[counted])
        return ids_S, _step_logprobs(logits_SV, ids_S, states)

    def _prepare(self, start: RowStart) -> _RowSampling:
        params = start.sampling
        bias = [(token, value) for token, value in params.logit_bias if self._has_logit(token)]
        stops = [token for token in params.stop_token_ids if self._has_logit(token)]
        return _RowSampling(
            params=params,
            method=_method(params, self._vocab_size),
            num_prompt_tokens=start.num_prompt_tokens,
            bias_ids=self._ids(token for token, _ in bias),
            bias_values=torch.tensor([value for _, value in bias], device=self._device),
            stop_ids=self._ids(stops),
        )

    def _has_logit(self, token_id: int) -> bool:
        """Whether there is such a token: a bias on another one changes nothing."""
        return 0 <= token_id < self._vocab_size

    def _ids(self, token_ids: Iterable[int]) -> Tensor:
        return torch.tensor(list(token_ids), dtype=torch.int64, device=self._device)

    def _state(self, row: int) -> _RowSampling:
        state = self._rows[row]
        assert state is not None, f"row {row} samples before it was started"
        return state

    def _adjust(
        self,
        logits_SV: Tensor,
        states: Sequence[_RowSampling],
        rows_S: Tensor,
        positions: Sequence[int],
    ) -> Tensor:
        """Bias, penalties and min_tokens; the given logits stay as they are."""
        changed = _where(s.adjusts(p) for s, p in zip(states, positions, strict=True))
        if not changed:
            return logits_SV
        adjusted_SV = logits_SV.clone()
        for index in changed:
            state = states[index]
            adjusted_SV[index].index_add_(0, state.bias_ids, state.bias_values)
        penalised = _where(state.params.has_penalties for state in states)
        if penalised:
            assert self._penalties is not None, "made when the first such row started"
            adjusted_SV[penalised] = self._penalties.apply(
                adjusted_SV[penalised], rows_S[penalised]
            )
        for index in changed:
            if states[index].bans_stop(positions[index]):
                adjusted_SV[index, states[index].stop_ids] = float("-inf")
        return adjusted_SV

    def _draw(
        self,
        logits_SV: Tensor,
        states: Sequence[_RowSampling],
        rows_S: Tensor,
        positions_S: Tensor,
    ) -> Tensor:
        ids_S = torch.empty(len(states), dtype=torch.int64, device=self._device)
        for method in Method:
            group = _where(state.method is method for state in states)
            if len(group) == len(states):
                return self._draw_by(method, logits_SV, rows_S, positions_S)
            if group:
                ids_S[group] = self._draw_by(
                    method, logits_SV[group], rows_S[group], positions_S[group]
                )
        return ids_S

    def _draw_by(
        self, method: Method, logits_GV: Tensor, rows_G: Tensor, positions_G: Tensor
    ) -> Tensor:
        if method is Method.GREEDY:
            return kernels.greedy(logits_GV)
        uniform_G = kernels.uniform(self._seeds_R[rows_G], positions_G)
        temperature_G, min_p_G = self._temperature_R[rows_G], self._min_p_R[rows_G]
        if method is Method.DRAW:
            return kernels.sample(logits_GV, temperature_G, min_p_G, uniform_G)
        return kernels.sample_filtered(
            logits_GV,
            temperature_G,
            self._top_k_R[rows_G],
            self._top_p_R[rows_G],
            min_p_G,
            uniform_G,
        )


class _Penalties:
    """Which tokens each penalised row has seen. Made when the first such row starts."""

    def __init__(self, *, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._in_prompt_RV = torch.zeros((num_rows, vocab_size), dtype=torch.bool, device=device)
        self._counts_RV = torch.zeros((num_rows, vocab_size), dtype=torch.int32, device=device)
        self._strengths_3R = torch.zeros((3, num_rows), device=device)

    def start(self, start: RowStart) -> None:
        row, params = start.row, start.sampling
        token_ids = int_tensor(start.token_ids, self._counts_RV.device)
        prompt, output = token_ids.tensor_split([start.num_prompt_tokens])
        self._in_prompt_RV[row].zero_()[prompt] = True
        self._counts_RV[row] = torch.bincount(output, minlength=self._counts_RV.shape[1])
        strengths = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._strengths_3R[:, row] = torch.tensor(strengths)

    def apply(self, logits_GV: Tensor, rows_G: Tensor) -> Tensor:
        return kernels.apply_penalties(
            logits_GV,
            self._in_prompt_RV[rows_G],
            self._counts_RV[rows_G],
            *self._strengths_3R[:, rows_G],
        )

    def count(self, rows_G: Tensor, token_ids_G: Tensor) -> None:
        self._counts_RV[rows_G, token_ids_G] += 1


def _method(params: SamplingParams, vocab_size: int) -> Method:
    if params.is_greedy:
        return Method.GREEDY
    if params.top_p < 1.0 or (params.top_k is not None and params.top_k < vocab_size):
        return Method.DRAW_FILTERED
    return Method.DRAW


def _where(facts: Iterable[bool]) -> list[int]:
    return [index for index, is_true in enumerate(facts) if is_true]


def _step_logprobs(
    logits_SV: Tensor, ids_S: Tensor, states: Sequence[_RowSampling]
) -> StepLogprobs | None:
    """Computed for the rows that asked; the lines of the others hold zeros."""
    asked = _where(state.params.num_logprobs is not None for state in states)
    if not asked:
        return None
    num_top = max(state.params.num_logprobs or 0 for state in states)
    of_token_G, top_ids_GK, top_GK = kernels.log_probs(
        logits_SV[asked], ids_S[asked], min(num_top, logits_SV.shape[1])
    )
    shape = (len(states), top_ids_GK.shape[1])
    token_S = np.zeros(len(states), dtype=np.float32)
    top_ids_SK, top_SK = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    token_S[asked] = of_token_G.cpu().numpy()
    top_ids_SK[asked], top_SK[asked] = top_ids_GK.cpu().numpy(), top_GK.cpu().numpy()
    return StepLogprobs(token_S=token_S, top_ids_SK=top_ids_SK, top_SK=top_SK)
