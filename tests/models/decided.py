"""Decided steps: those whose token no logit error of an allowed size can change.

The rule for modes that round more than float32 does; a tolerance of mean divergence goes with it.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels import reference_sampling

ERROR_PER_SPREAD = 5.0
TAIL = 4.0


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a mode may differ by from float32 on the same dequantised weights."""

    mean_kl: float
    """Per token, in nats."""
    most_different: float = 0.0
    """Share of decided tokens that may be others all the same, where errors have a long tail: as
    far as an error TAIL times as large could make them so."""

    @property
    def largest_error(self) -> float:
        """That any step may have, the tail's."""
        return self.logit_error * (TAIL if self.most_different else 1.0)

    @property
    def logit_error(self) -> float:
        """Most that rounding may move a likely token's logit, but for the tail.

        Errors of a spread s in the logits make a divergence of about s^2 / 2. What is allowed is
        the largest of thousands of steps, of some of which a model is much less sure.
        """
        return ERROR_PER_SPREAD * math.sqrt(2.0 * self.mean_kl)


FLOAT32 = Precision(mean_kl=1e-7)
"""Sums in another order."""
F16 = Precision(mean_kl=1e-3)
INT8 = Precision(mean_kl=5e-3)
"""int8 activations in some or all regimes, bf16, or int8 keys and values."""
INT8_TAIL = Precision(mean_kl=5e-3, most_different=1e-3)
"""int8 activations in every product, or in those of few rows, as "auto" has them. On prompts of
random tokens, of whose next token a model is unsure, 1 step in 1000 moves by 2 logits (float32 with
rounded inputs, 12,000 steps)."""
FP8 = Precision(mean_kl=2e-2)


def decided_tokens(
    logits_TV: Tensor, sampling: SamplingParams, first_position: int, error: float
) -> tuple[Tensor, Tensor]:
    """The tokens that the reference's logits lead to, and which of them no error of the logits up
    to this one can change: [T], [T].

    Greedy: the margin of the first token over the second exceeds twice the error. Drawn: the
    number lies between two bounds of the cumulative probability; where no logit is off by more
    than e, the odds of such a bound are off by at most the factor exp(2 e / temperature), so the
    odds of the number must be further away from both. With top_k the set must be decided too.

    first_position: where in its sequence the first of the tokens stands.
    """
    if sampling.is_greedy:
        top_T2, ids_T2 = logits_TV.topk(2)
        return ids_T2[:, 0], top_T2[:, 0] - top_T2[:, 1] > 2 * error
    assert sampling.top_p == 1.0 and sampling.min_p == 0.0 and not sampling.has_penalties
    kept_TV, is_set_decided_T = _top_k(logits_TV, sampling.top_k, error)
    probabilities_TV = (kept_TV.double() / sampling.temperature).softmax(-1)
    bounds_TV = probabilities_TV.cumsum(-1)
    positions_T = first_position + torch.arange(len(logits_TV), device=logits_TV.device)
    seeds_T = torch.full_like(positions_T, sampling.seed)
    drawn_T1 = reference_sampling.uniform(seeds_T, positions_T).unsqueeze(1)
    ids_T1 = torch.searchsorted(bounds_TV, drawn_T1, right=True).clamp(max=logits_TV.shape[1] - 1)
    above_T = bounds_TV.gather(1, ids_T1).squeeze(1)
    below_T = above_T - probabilities_TV.gather(1, ids_T1).squeeze(1)
    odds_T, reach = drawn_T1.squeeze(1).logit(), 2 * error / sampling.temperature
    is_inside_T = (_odds(below_T) < odds_T - reach) & (odds_T + reach < _odds(above_T))
    return ids_T1.squeeze(1), is_inside_T & is_set_decided_T


def _top_k(logits_TV: Tensor, top_k: int | None, error: float) -> tuple[Tensor, Tensor]:
    """Logits with all but the k first at minus infinity, and whether these k are decided."""
    if top_k is None:
        return logits_TV, torch.ones(len(logits_TV), dtype=torch.bool, device=logits_TV.device)
    top_TK = logits_TV.topk(top_k + 1).values
    least_T1 = top_TK[:, top_k - 1 : top_k]
    is_decided_T = top_TK[:, top_k - 1] - top_TK[:, top_k] > 2 * error
    return logits_TV.masked_fill(logits_TV < least_T1, float("-inf")), is_decided_T


def _odds(bounds_T: Tensor) -> Tensor:
    """Log-odds; rounding may leave the outermost bounds a little off 0 and 1."""
    return torch.where(
        bounds_T < 1e-12, 0.0, torch.where(bounds_T > 1 - 1e-12, 1.0, bounds_T)
    ).logit()
