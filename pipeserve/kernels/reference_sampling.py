"""Plain-torch twins of the sampling kernels: logits to token ids, batched over rows.

Runs on the last stage's thread. Every parameter is a tensor with one entry per row; what a row
draws depends on its own logits, parameters, seed and position only, never on its neighbours.

Shapes: S rows, V vocabulary, W the likeliest tokens that are looked at first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 256
"""Vocabulary entries that are searched as one: a maximum or a sum per block, then inside one."""
_WINDOW = 1024
"""Likeliest tokens among which top-k and top-p are looked for first; sorting all takes longer."""
_WINDOW_GROWTH = 8
"""The window grows by this for rows that keep more tokens than it holds."""

# The finaliser and the increment of splitmix64 (Steele, Lea and Flood, OOPSLA 2014; constants of
# Stafford's variant 13), as signed 64-bit numbers since torch multiplies only those everywhere.
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign bit."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def uniform(seeds_S: Tensor, positions_S: Tensor) -> Tensor:
    """One float64 in [0, 1) per row, with 53 random bits: a hash of (seed, position) alone."""
    hash_S = _mix(_mix(seeds_S) + positions_S.long() * _INCREMENT)
    return _shift_right(hash_S, 11).double() * 2.0**-53


def apply_penalties(
    logits_SV: Tensor,
    in_prompt_SV: Tensor,
    output_counts_SV: Tensor,
    repetition_S: Tensor,
    presence_S: Tensor,
    frequency_S: Tensor,
) -> Tensor:
    """The three penalties as SamplingParams defines them; returns new logits."""
    in_output_SV = output_counts_SV > 0
    repetition_S1 = repetition_S.unsqueeze(1)
    repeated_SV = torch.where(logits_SV > 0, logits_SV / repetition_S1, logits_SV * repetition_S1)
    penalised_SV = torch.where(in_prompt_SV | in_output_SV, repeated_SV, logits_SV)
    penalised_SV -= presence_S.unsqueeze(1) * in_output_SV
    return penalised_SV.sub_(frequency_S.unsqueeze(1) * output_counts_SV)


def greedy(logits_SV: Tensor) -> Tensor:
    """The likeliest token of each row; of equals the one with the lowest id."""
    blocks_SBX = _blocks(logits_SV, float("-inf"))
    block_S1 = blocks_SBX.amax(-1).argmax(-1, keepdim=True)
    offset_S = _take_block(blocks_SBX, block_S1).argmax(-1)
    return block_S1.squeeze(1) * _BLOCK + offset_S


def sample(logits_SV: Tensor, temperature_S: Tensor, min_p_S: Tensor, uniform_S: Tensor) -> Tensor:
    """Draw from softmax(logits / temperature) without the tokens below min_p.

    The draw is the first token, in vocabulary order, at which the cumulated probability exceeds
    the row's uniform number. temperature_S is above 0.
    """
    weights_SV = _weights(logits_SV, temperature_S)
    weights_SV = weights_SV.masked_fill_(weights_SV < min_p_S.unsqueeze(1), 0.0)
    blocks_SBX = _blocks(weights_SV, 0.0)
    sums_SB = blocks_SBX.sum(-1, dtype=torch.float64)
    cumulated_SB = sums_SB.cumsum(-1)
    target_S1 = uniform_S.unsqueeze(1) * cumulated_SB[:, -1:]
    last_block = sums_SB.shape[1] - 1
    block_S1 = torch.searchsorted(cumulated_SB, target_S1, right=True).clamp_(max=last_block)
    rest_S1 = target_S1 - (cumulated_SB - sums_SB).gather(1, block_S1)
    inside_SX = _take_block(blocks_SBX, block_S1).cumsum(-1, dtype=torch.float64)
    return (block_S1 * _BLOCK).squeeze(1) + _first_above(inside_SX, rest_S1)


def sample_filtered(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniform_S: Tensor,
) -> Tensor:
    """As `sample`, after top-k (V keeps all), then top-p of what is left, then min-p.

    Of equally likely tokens the one with the lower id counts as likelier.
    """
    vocab_size = logits_SV.shape[1]
    parameters = (logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    ids_S = torch.empty(logits_SV.shape[0], dtype=torch.int64, device=logits_SV.device)
    rest = torch.arange(logits_SV.shape[0], device=logits_SV.device)
    window = _WINDOW
    while len(rest) > 0:
        window = min(window, vocab_size)
        ids_S[rest], is_exact_S = _sample_window(*(p[rest] for p in parameters), window=window)
        rest = rest[~is_exact_S]
        window *= _WINDOW_GROWTH
    return ids_S


def _sample_window(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniform_S: Tensor,
    *,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Draw among the `window` likeliest tokens; also say for which rows that is exact."""
    vocab_size = logits_SV.shape[1]
    order_SW = _likeliest(logits_SV, window)
    weights_SV = _weights(logits_SV, temperature_S)
    weights_SW = weights_SV.gather(1, order_SW).double()
    in_top_k_SW = torch.arange(window, device=logits_SV.device) < top_k_S.unsqueeze(1)
    total_S = torch.where(
        top_k_S <= window,
        (weights_SW * in_top_k_SW).sum(-1),
        weights_SV.sum(-1, dtype=torch.float64),
    )
    likelier_SW = weights_SW.cumsum(-1) - weights_SW
    in_top_p_SW = (likelier_SW < (top_p_S * total_S).unsqueeze(1)) | (top_p_S >= 1).unsqueeze(1)
    kept_SW = in_top_k_SW & in_top_p_SW & (weights_SW >= min_p_S.unsqueeze(1))

    logits_SW = logits_SV.gather(1, order_SW)
    last_kept_S1 = (kept_SW.sum(-1, keepdim=True) - 1).clamp_(min=0)
    # What is kept must end before the window does, or equals of its last token may lie outside.
    ends_inside_S = logits_SW.gather(1, last_kept_S1).squeeze(1) > logits_SW[:, -1]
    is_exact_S = ends_inside_S & ((top_k_S <= window) | (top_k_S >= vocab_size))
    if window == vocab_size:
        is_exact_S = torch.ones_like(is_exact_S)

    ids_SW, by_id_SW = order_SW.sort(-1)
    cumulated_SW = (weights_SW * kept_SW).gather(1, by_id_SW).cumsum(-1)
    target_S1 = uniform_S.unsqueeze(1) * cumulated_SW[:, -1:]
    drawn_S = _first_above(cumulated_SW, target_S1)
    return ids_SW.gather(1, drawn_S.unsqueeze(1)).squeeze(1), is_exact_S


def log_probs(logits_SV: Tensor, ids_S: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of the probabilities of ids_S and of the num_top likeliest tokens.

    Returns ([S], ids [S, num_top], [S, num_top]), likeliest first.
    """
    norm_S1 = logits_SV.logsumexp(-1, keepdim=True)
    top_logits_SK, top_ids_SK = logits_SV.topk(num_top, dim=-1)
    drawn_S1 = logits_SV.gather(1, ids_S.unsqueeze(1))
    return (drawn_S1 - norm_S1).squeeze(1), top_ids_SK, top_logits_SK - norm_S1


def _weights(logits_SV: Tensor, temperature_S: Tensor) -> Tensor:
    """Probabilities relative to the likeliest token's, which has 1: all that a draw needs."""
    below_SV = logits_SV - logits_SV.amax(-1, keepdim=True)
    return below_SV.div_(temperature_S.unsqueeze(1)).exp_()


def _likeliest(logits_SV: Tensor, window: int) -> Tensor:
    """Ids of the `window` likeliest tokens, likeliest first and equals by id."""
    if window == logits_SV.shape[1]:
        return torch.sort(logits_SV, dim=-1, descending=True, stable=True).indices
    ids_SW = logits_SV.topk(window, dim=-1).indices.sort(-1).values
    order_SW = torch.sort(logits_SV.gather(1, ids_SW), dim=-1, descending=True, stable=True).indices
    return ids_SW.gather(1, order_SW)


def _blocks(x_SV: Tensor, fill: float) -> Tensor:
    """[S, V] as [S, ceil(V / _BLOCK), _BLOCK], the end filled up."""
    missing = -x_SV.shape[1] % _BLOCK
    padded = functional.pad(x_SV, (0, missing), value=fill) if missing else x_SV
    return padded.view(x_SV.shape[0], -1, _BLOCK)


def _take_block(blocks_SBX: Tensor, block_S1: Tensor) -> Tensor:
    index = block_S1.unsqueeze(2).expand(-1, 1, blocks_SBX.shape[2])
    return blocks_SBX.gather(1, index).squeeze(1)


def _first_above(cumulated_SX: Tensor, target_S1: Tensor) -> Tensor:
    """First entry whose cumulated weight exceeds the target; never one of weight 0.

    The target is held inside [0, total): sums taken in another order may differ by a rounding.
    """
    below_total_S1 = cumulated_SX[:, -1:] * (1.0 - 2.0**-50)
    inside_S1 = torch.minimum(target_S1.clamp(min=0.0), below_total_S1)
    found_S1 = torch.searchsorted(cumulated_SX, inside_S1, right=True)
    return found_S1.clamp_(max=cumulated_SX.shape[1] - 1).squeeze(1)
