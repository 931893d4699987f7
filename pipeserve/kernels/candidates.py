"""Candidates: the tokens that a chain of samplers has left, and what each sampler does to them.

Runs on the last stage's thread, with torch on every device, and waits for none. In float64, so
that what is kept does not hang on the order in which a device sums. Parameters have shape [E, 1],
one per row. The definitions are those of llama.cpp's src/llama-sampling.cpp; of equally likely
tokens the one with the lower id counts as likelier.

Shapes: E rows, V vocabulary, K highest tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeserve.kernels.reference_dry import Breakers

_LN_2 = math.log(2.0)


class Candidates:
    """A token that is out has a logit of -inf, and one that comes with it, banned by a mask or by
    min_tokens, is out from the start. Those that top_n_sigma lowers to it stay in: they count where
    the number of tokens matters, as in llama.cpp."""

    def __init__(self, logits_EV: Tensor) -> None:
        self.x_EV = logits_EV.double()
        self.is_in_EV = logits_EV > -math.inf
        self._most = logits_EV.shape[1]
        """No row has more of them, as far as the host knows."""

    def penalise(
        self, counts_EV: Tensor, repetition_E1: Tensor, presence_E1: Tensor, frequency_E1: Tensor
    ) -> None:
        """counts_EV: how often each token stands in the window."""
        x_EV = self.x_EV
        repeated_EV = torch.where(x_EV > 0, x_EV / repetition_E1, x_EV * repetition_E1)
        repeated_EV -= counts_EV * frequency_E1 + presence_E1
        self.x_EV = torch.where(counts_EV > 0, repeated_EV, x_EV)

    def lower_repeats(
        self,
        repeats_EV: Tensor,
        breakers: Breakers,
        multiplier_E1: Tensor,
        base_E1: Tensor,
        allowed_E1: Tensor,
    ) -> None:
        """DRY: repeats_EV as longest_repeats gives them. Breakers of one token are spared."""
        penalty_EV = multiplier_E1 * base_E1 ** (repeats_EV - allowed_E1)
        is_spared_EV = repeats_EV < 0
        if breakers.lone_bits:
            is_spared_EV = is_spared_EV | ((breakers.groups_V & breakers.lone_bits) != 0)
        self.x_EV = self.x_EV - penalty_EV.masked_fill(is_spared_EV, 0.0)

    def keep_top_n_sigma(self, num_sigma_E1: Tensor) -> None:
        """The others stay candidates, as in llama.cpp, with a logit of -inf."""
        counts_EV = self.x_EV > -math.inf
        num_E1 = counts_EV.sum(1, keepdim=True).clamp(min=1)
        mean_E1 = self.x_EV.masked_fill(~counts_EV, 0.0).sum(1, keepdim=True) / num_E1
        squares_EV = (self.x_EV - mean_E1).square().masked_fill(~counts_EV, 0.0)
        sigma_E1 = (squares_EV.sum(1, keepdim=True) / num_E1).sqrt()
        floor_E1 = self._highest() - num_sigma_E1 * sigma_E1
        self.x_EV = self.x_EV.masked_fill(self.x_EV < floor_E1, -math.inf)

    def keep_top_k(self, k_E1: Tensor, largest_k: int) -> None:
        """largest_k: of all rows."""
        self._most = min(self._most, largest_k)
        self._keep_highest(self._sorted(), k_E1.long().clamp(max=self._most))

    def keep_top_p(self, p_E1: Tensor) -> None:
        highest_EK = self._sorted()
        p_EK = (highest_EK - self._log_norm()).exp()
        before_EK = p_EK.cumsum(1) - p_EK
        num_E1 = (before_EK < p_E1).sum(1, keepdim=True)
        self._keep_highest(highest_EK, num_E1)

    def keep_min_p(self, p_E1: Tensor) -> None:
        self._keep(self.x_EV >= self._highest() + p_E1.log())

    def keep_typical(self, p_E1: Tensor) -> None:
        p_EV, surprise_EV, entropy_E1 = self._entropy()
        distance_EV = (surprise_EV - entropy_E1).abs()
        order_EK = self._nearest_first(distance_EV)
        sorted_EK = p_EV.gather(1, order_EK)
        is_kept_EK = sorted_EK.cumsum(1) - sorted_EK <= p_E1
        self._keep(torch.zeros_like(self.is_in_EV).scatter_(1, order_EK, is_kept_EK))

    def exclude_top(self, probability_E1: Tensor, threshold_E1: Tensor, uniform_E1: Tensor) -> None:
        """XTC."""
        p_EV = (self.x_EV - self._log_norm()).exp()
        is_top_EV = (p_EV >= threshold_E1) & (self.x_EV > -math.inf)
        lowest_E1 = self.x_EV.masked_fill(~is_top_EV, math.inf).amin(1, keepdim=True)
        ids_V = torch.arange(p_EV.shape[1], device=p_EV.device)
        last_E1 = torch.where(is_top_EV & (self.x_EV == lowest_E1), ids_V, -1).amax(1, keepdim=True)
        acts_E1 = uniform_E1 <= probability_E1
        self._keep(~(is_top_EV & (ids_V != last_E1) & acts_E1))

    def scale(self, temperature_E1: Tensor, range_E1: Tensor, exponent_E1: Tensor) -> None:
        """Divide by the temperature, which follows the entropy where a row has a range; a
        temperature of 0 keeps the likeliest token."""
        num_E1 = self.is_in_EV.sum(1, keepdim=True)
        _, _, entropy_E1 = self._entropy()
        share_E1 = (entropy_E1 / num_E1.clamp(min=2).double().log()).clamp(min=0.0)
        low_E1 = (temperature_E1 - range_E1).clamp(min=0.0)
        high_E1 = temperature_E1 + range_E1
        moving_E1 = low_E1 + (high_E1 - low_E1) * share_E1**exponent_E1
        is_moving_E1 = (range_E1 > 0) & (num_E1 > 1)
        self.scale_fixed(torch.where(is_moving_E1, moving_E1, temperature_E1), has_zero=True)

    def scale_fixed(self, temperature_E1: Tensor, *, has_zero: bool) -> None:
        """has_zero: whether a temperature may be 0, as far as the host knows."""
        if not has_zero:
            self.x_EV = self.x_EV / temperature_E1
            return
        is_zero_E1 = temperature_E1 <= 0
        self._keep(self._is_likeliest() | ~is_zero_E1)
        self.x_EV = self.x_EV / temperature_E1.masked_fill(is_zero_E1, 1.0)

    def keep_unsurprising(self, most_bits_E1: Tensor) -> None:
        """Mirostat 2: tokens of at most so many bits of surprise, and always the likeliest."""
        bits_EV = (self._log_norm() - self.x_EV) / _LN_2
        self._keep((bits_EV <= most_bits_E1) | self._is_likeliest())

    def logits(self) -> Tensor:
        """[E, V] float32: relative to the highest, -inf for the tokens that are out."""
        return (self.x_EV - self._highest()).float()

    def bits_of(self, ids_E: Tensor) -> Tensor:
        """[E] float64: the surprise of a token among those that are left."""
        norm_E1, x_E1 = self._log_norm(), self.x_EV.gather(1, ids_E.unsqueeze(1))
        return ((norm_E1 - x_E1) / _LN_2).squeeze(1)

    def _keep(self, is_kept_EV: Tensor) -> None:
        self.is_in_EV = self.is_in_EV & is_kept_EV
        self.x_EV = self.x_EV.masked_fill(~is_kept_EV, -math.inf)

    def _keep_highest(self, highest_EK: Tensor, num_E1: Tensor) -> None:
        floor_E1 = highest_EK.gather(1, num_E1.clamp(min=1) - 1)
        is_above_EV = self.x_EV > floor_E1
        is_tie_EV = (self.x_EV == floor_E1) & self.is_in_EV
        room_E1 = num_E1.clamp(min=1) - is_above_EV.sum(1, keepdim=True)
        self._keep(is_above_EV | (is_tie_EV & (is_tie_EV.cumsum(1) <= room_E1)))

    def _sorted(self) -> Tensor:
        """[E, K] logits, highest first, of no more tokens than there can be."""
        if self._most == self.x_EV.shape[1]:
            return self.x_EV.sort(1, descending=True).values
        return self.x_EV.topk(self._most, dim=1).values

    def _nearest_first(self, distance_EV: Tensor) -> Tensor:
        """[E, K] ids by distance, equals by id, of no more tokens than there can be."""
        if self._most == self.x_EV.shape[1]:
            return distance_EV.sort(dim=1, stable=True).indices
        ids_EK = self.x_EV.topk(self._most, dim=1).indices.sort(dim=1).values
        order_EK = distance_EV.gather(1, ids_EK).sort(dim=1, stable=True).indices
        return ids_EK.gather(1, order_EK)

    def _highest(self) -> Tensor:
        return self.x_EV.amax(1, keepdim=True)

    def _log_norm(self) -> Tensor:
        return self.x_EV.logsumexp(1, keepdim=True)

    def _is_likeliest(self) -> Tensor:
        ids_V = torch.arange(self.x_EV.shape[1], device=self.x_EV.device)
        return ids_V == self.x_EV.argmax(1, keepdim=True)

    def _entropy(self) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities and surprises in nats, [E, V], and the entropy, [E, 1]."""
        surprise_EV = self._log_norm() - self.x_EV
        p_EV = (-surprise_EV).exp()
        terms_EV = torch.where(p_EV > 0, p_EV * surprise_EV, 0.0)
        return p_EV, surprise_EV, terms_EV.sum(1, keepdim=True)
