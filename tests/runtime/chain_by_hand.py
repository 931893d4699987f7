"""One row through a chain of samplers in plain numpy, written from llama.cpp's definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeserve.core.sampler_chain import Dry, SamplerName
from pipeserve.core.sampling import SamplingParams
from tests.kernels.test_reference_sampling import uniform_by_hand

XTC_SALT = 0x585443


class Row:
    """The candidates of one row, as llama.cpp holds them: a list, likeliest first."""

    def __init__(self, logits: np.ndarray) -> None:
        self.x = logits.astype(np.float64).copy()
        self.ids = np.flatnonzero(np.isfinite(logits)).tolist()

    def sort(self) -> None:
        self.ids.sort(key=lambda token: (-self.x[token], token))

    def p(self) -> np.ndarray:
        x = self.x[self.ids]
        p = np.exp(x - x.max())
        return p / p.sum()

    def entropy(self) -> float:
        return float(-sum(p * math.log(p) for p in self.p() if p > 0))


def breaker_limit(tokens: Sequence[int], dry: Dry) -> int:
    """How many of the last tokens a repetition may hold."""
    newest_first = list(tokens)[::-1]
    for place in range(len(newest_first)):
        longest = -1
        for group in dry.breakers:
            tail = list(group.tail)
            following = (
                newest_first[place - len(tail) : place][::-1] if place >= len(tail) else None
            )
            if newest_first[place] in group.head_ids and following == tail:
                longest = max(longest, len(tail))
        if longest >= 0:
            return place - longest
    return len(newest_first)


def dry_repeats(tokens: Sequence[int], dry: Dry) -> dict[int, int]:
    """Token -> the longest repetition that it would go on with."""
    tokens = list(tokens)[-dry.window :]
    limit = breaker_limit(tokens, dry)
    found: dict[int, int] = {}
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, limit) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= dry.allowed_length:
            found[tokens[end]] = max(found.get(tokens[end], 0), length)
    return found


def lower_repeats(row: Row, tokens: Sequence[int], dry: Dry) -> None:
    single = {int(i) for group in dry.breakers if not group.tail for i in group.head_ids}
    for token, length in dry_repeats(tokens, dry).items():
        if token not in single:
            row.x[token] -= dry.multiplier * dry.base ** (length - dry.allowed_length)


def penalise(row: Row, tokens: Sequence[int], params: SamplingParams, window: int) -> None:
    last = list(tokens)[-window:] if window else []
    for token in set(last):
        x = row.x[token]
        x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * last.count(token) + params.presence_penalty
        row.x[token] = x


def scale(row: Row, params: SamplingParams, spread: float, exponent: float) -> None:
    temperature = params.temperature
    if spread > 0 and len(row.ids) > 1:
        low, high = max(0.0, temperature - spread), temperature + spread
        share = max(0.0, row.entropy() / math.log(len(row.ids)))
        temperature = low + (high - low) * share**exponent
    row.sort()
    if temperature <= 0:
        row.ids = row.ids[:1]
    else:
        row.x = row.x / temperature


def cut(row: Row, order: Sequence[int], limit: float, *, reaches: bool) -> None:
    """Keep tokens until their probability reaches, or else exceeds, the limit."""
    p, total, kept = row.p(), 0.0, []
    for index in order:
        kept.append(row.ids[index])
        total += p[index]
        if total >= limit if reaches else total > limit:
            break
    row.ids = kept


def exclude_top(row: Row, probability: float, threshold: float, chance: float) -> None:
    if chance > probability:
        return
    row.sort()
    num_top = int(((row.p() >= threshold) & np.isfinite(row.x[row.ids])).sum())
    row.ids = row.ids[max(0, num_top - 1) :]


def apply(row: Row, name: SamplerName, params: SamplingParams, tokens: Sequence[int]) -> None:
    chain = params.chain
    assert chain is not None
    row.sort()
    match name:
        case SamplerName.PENALTIES:
            penalise(row, tokens, params, chain.penalty_window or 0)
        case SamplerName.DRY:
            assert chain.dry is not None
            lower_repeats(row, tokens, chain.dry)
        case SamplerName.TOP_N_SIGMA:
            x = row.x[row.ids]
            finite = x[np.isfinite(x)]
            floor = finite.max() - chain.top_n_sigma * finite.std()
            row.x = np.where(row.x < floor, -np.inf, row.x)
        case SamplerName.TOP_K:
            assert params.top_k is not None
            row.ids = row.ids[: params.top_k]
        case SamplerName.TYPICAL_P:
            with np.errstate(divide="ignore"):
                distance = np.abs(-np.log(row.p()) - row.entropy())
            order = sorted(range(len(row.ids)), key=lambda i: (distance[i], row.ids[i]))
            cut(row, order, chain.typical_p, reaches=False)
        case SamplerName.TOP_P:
            cut(row, range(len(row.ids)), params.top_p, reaches=True)
        case SamplerName.MIN_P:
            p = row.p()
            row.ids = [
                token for token, q in zip(row.ids, p, strict=True) if q >= params.min_p * p[0]
            ]
        case SamplerName.XTC:
            chance = uniform_by_hand(params.seed ^ XTC_SALT, len(tokens))
            exclude_top(row, chain.xtc_probability, chain.xtc_threshold, chance)
        case SamplerName.TEMPERATURE:
            scale(row, params, chain.dynatemp_range, chain.dynatemp_exponent)
    row.sort()


def draw(row: Row, params: SamplingParams, num_tokens: int) -> int:
    row.ids.sort()
    cumulated = np.cumsum(row.p())
    place = np.searchsorted(cumulated, uniform_by_hand(params.seed, num_tokens), side="right")
    return row.ids[min(int(place), len(row.ids) - 1)]


def sample_by_hand(logits: np.ndarray, params: SamplingParams, tokens: Sequence[int]) -> int:
    """tokens: prompt and output so far."""
    assert params.chain is not None and params.chain.mirostat is None
    row = Row(logits)
    for name in params.chain.order:
        if name in params.active_samplers:
            apply(row, name, params, tokens)
    return draw(row, params, len(tokens))


class Mirostat2:
    """Follows one sequence: what llama.cpp does in this mode."""

    def __init__(self, params: SamplingParams) -> None:
        assert params.chain is not None and params.chain.mirostat is not None
        self._params, self._mirostat = params, params.chain.mirostat
        self.mu = 2 * self._mirostat.tau

    def sample(self, logits: np.ndarray, num_tokens: int) -> int:
        row = Row(logits)
        scale(row, self._params, 0.0, 1.0)
        row.sort()
        p = row.p()
        kept = [t for t, q in zip(row.ids, p, strict=True) if q > 0 and -math.log2(q) <= self.mu]
        row.ids = kept or row.ids[:1]
        token = draw(row, self._params, num_tokens)
        surprise = -math.log2(row.p()[row.ids.index(token)])
        self.mu -= self._mirostat.eta * (surprise - self._mirostat.tau)
        return token
