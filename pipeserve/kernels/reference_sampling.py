"""Plain-torch twins of the sampling kernels: logits to token ids, batched over rows.

Runs on the last stage's thread. Every parameter is a tensor with one entry per row; what a row
draws depends on its own logits, parameters, seed and position only, never on its neighbours. Rows
of temperature 0 take the likeliest token in every function.

Shapes: S rows, R row slots, G rows that asked, V vocabulary, W the likeliest tokens that are
looked at first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels.sampling_state import BiasEntries, Penalties

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


def apply_penalties(logits_SV: Tensor, rows_S: Tensor, penalties: Penalties) -> Tensor:
    """The three penalties as SamplingParams defines them; rows without any are copied."""
    out_SV = logits_SV.clone()
    has_any_S = (penalties.repetition_S != 1) | (penalties.presence_S != 0)
    has_any_S |= penalties.frequency_S != 0
    chosen = (has_any_S & (rows_S >= 0)).nonzero().squeeze(1)
    if len(chosen) > 0:
        out_SV[chosen] = _penalise(
            logits_SV[chosen],
            penalties.in_prompt_RV[rows_S[chosen]],
            penalties.output_counts_RV[rows_S[chosen]],
            penalties.repetition_S[chosen].unsqueeze(1),
            penalties.presence_S[chosen].unsqueeze(1),
            penalties.frequency_S[chosen].unsqueeze(1),
        )
    return out_SV


def apply_bias(
    logits_SV: Tensor,
    out_SV: Tensor,
    bias: BiasEntries,
    rows_S: Tensor,
    penalties: Penalties | None,
) -> None:
    """Write the biased logits over out_SV, which holds the logits or their penalised copy.

    An entry becomes penalised(logit + bias). logits_SV are unmodified and not out_SV.
    """
    x_E = logits_SV[bias.seqs_E, bias.ids_E] + bias.values_E
    if penalties is not None:
        rows_E = rows_S[bias.seqs_E]
        x_E = _penalise(
            x_E,
            penalties.in_prompt_RV[rows_E, bias.ids_E],
            penalties.output_counts_RV[rows_E, bias.ids_E],
            penalties.repetition_S[bias.seqs_E],
            penalties.presence_S[bias.seqs_E],
            penalties.frequency_S[bias.seqs_E],
        )
    out_SV[bias.seqs_E, bias.ids_E] = x_E


def apply_masks(logits_SV: Tensor, seqs_M: Tensor, words_MW: Tensor) -> None:
    """Ban, in place, the tokens whose bits are not set in the masks of the rows seqs_M.

    Both int32; a row stands in seqs_M at most once. Bit i % 32 of word i // 32 is token i; tokens
    beyond the last word are banned.
    """
    bits_32 = torch.arange(32, dtype=torch.int32, device=words_MW.device)
    is_allowed_MV = ((words_MW.unsqueeze(2) >> bits_32) & 1).flatten(1)[:, : logits_SV.shape[1]]
    missing = logits_SV.shape[1] - is_allowed_MV.shape[1]
    is_banned_MV = functional.pad(is_allowed_MV, (0, missing)) == 0
    logits_SV[seqs_M] = logits_SV[seqs_M].masked_fill_(is_banned_MV, float("-inf"))


def _penalise(
    x: Tensor,
    in_prompt: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    in_output = counts > 0
    repeated = torch.where(x > 0, x / repetition, x * repetition)
    penalised = torch.where(in_prompt | in_output, repeated, x)
    penalised -= presence * in_output
    return penalised.sub_(frequency * counts)


def record(
    ids_S: Tensor,
    rows_S: Tensor,
    positions_S: Tensor,
    output_counts_RV: Tensor | None = None,
    history_RL: Tensor | None = None,
) -> None:
    """output_counts_RV[rows_S, ids_S] += 1 and history_RL[rows_S, positions_S] = ids_S.

    A row stands in rows_S at most once.
    """
    is_row_S = rows_S >= 0
    rows_S, ids_S = rows_S[is_row_S], ids_S[is_row_S]
    if output_counts_RV is not None:
        output_counts_RV[rows_S, ids_S] += 1
    if history_RL is not None:
        history_RL[rows_S, positions_S[is_row_S].long()] = ids_S.to(history_RL.dtype)


def greedy(logits_SV: Tensor) -> Tensor:
    """The likeliest token of each row; of equals the one with the lowest id."""
    blocks_SBX = _blocks(logits_SV, float("-inf"))
    block_S1 = blocks_SBX.amax(-1).argmax(-1, keepdim=True)
    offset_S = _take_block(blocks_SBX, block_S1).argmax(-1)
    return block_S1.squeeze(1) * _BLOCK + offset_S


def sample(logits_SV: Tensor, temperature_S: Tensor, min_p_S: Tensor, uniform_S: Tensor) -> Tensor:
    """Draw from softmax(logits / temperature) without the tokens below min_p.

    The draw is the first token, in vocabulary order, at which the cumulated probability exceeds
    the row's uniform number.
    """
    rows = (logits_SV, temperature_S, min_p_S, uniform_S)
    return _either(temperature_S == 0, _greedy_row, _draw, rows)


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
    is_plain_S = (temperature_S == 0) | ((top_k_S >= logits_SV.shape[1]) & (top_p_S >= 1))
    rows = (logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, uniform_S)
    return _either(is_plain_S, _sample_all, _draw_filtered, rows)


def _either(
    is_first_S: Tensor,
    first: Callable[..., Tensor],
    second: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
) -> Tensor:
    """Ids of `first` for the rows where it is true and of `second` for the others."""
    if not is_first_S.any():
        return second(*rows)
    if is_first_S.all():
        return first(*rows)
    ids_S = torch.empty(len(is_first_S), dtype=torch.int64, device=is_first_S.device)
    for chosen_S, function in ((is_first_S, first), (~is_first_S, second)):
        ids_S[chosen_S] = function(*(parameter[chosen_S] for parameter in rows))
    return ids_S


def _greedy_row(logits_SV: Tensor, *parameters: Tensor) -> Tensor:
    return greedy(logits_SV)


def _sample_all(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniform_S: Tensor,
) -> Tensor:
    return sample(logits_SV, temperature_S, min_p_S, uniform_S)


def _draw(logits_SV: Tensor, temperature_S: Tensor, min_p_S: Tensor, uniform_S: Tensor) -> Tensor:
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


def _draw_filtered(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniform_S: Tensor,
) -> Tensor:
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


def log_probs(
    logits_SV: Tensor, ids_S: Tensor, asked_G: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of the probabilities of ids_S and of the num_top likeliest tokens.

    Of the rows asked_G alone: returns ([G], ids [G, num_top], [G, num_top]), likeliest first.
    """
    logits_GV = logits_SV[asked_G]
    norm_G1 = logits_GV.logsumexp(-1, keepdim=True)
    top_logits_GK, top_ids_GK = logits_GV.topk(num_top, dim=-1)
    drawn_G1 = logits_GV.gather(1, ids_S[asked_G].unsqueeze(1))
    return (drawn_G1 - norm_G1).squeeze(1), top_ids_GK, top_logits_GK - norm_G1


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
