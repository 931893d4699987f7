"""Plain-torch twin of dry.py, and what DRY does around it with torch on every device.

Runs on the last stage's thread; nothing here but the twin waits for the device.

Shapes: E rows, W tokens of a window, the newest first, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Breakers:
    """Sequences that no repetition reaches over: a head, then the tail of its group."""

    groups_V: Tensor
    """int64: bit g is set for the tokens that are heads of group g."""
    tails: Sequence[tuple[int, ...]]

    @property
    def lone_bits(self) -> int:
        """Of the groups whose sequences are of one token."""
        return sum(1 << group for group, tail in enumerate(self.tails) if not tail)


def repeat_lengths(recent_EW: Tensor, limits_E: Tensor) -> Tensor:
    """[E, W] int32: how many tokens from place w on are the same as from place 0 on, at most the
    row's limit; 0 at place 0.

    recent_EW: int32; -1 past the end of a shorter row. limits_E: int32, at most W.
    """
    width = recent_EW.shape[1]
    lengths_EW = torch.zeros_like(recent_EW)
    is_alive_EW = torch.ones_like(recent_EW, dtype=torch.bool)
    is_alive_EW[:, :1] = False
    for step in range(width):
        last_E1 = recent_EW[:, step : step + 1]
        shifted_EW = functional.pad(recent_EW[:, step:], (0, step), value=-1)
        is_alive_EW &= (shifted_EW == last_E1) & (last_E1 >= 0) & (step < limits_E).unsqueeze(1)
        if not is_alive_EW.any():
            break
        lengths_EW += is_alive_EW
    return lengths_EW


def breaker_limits(recent_EW: Tensor, breakers: Breakers) -> Tensor:
    """[E] int64: how many of the last tokens stand behind the newest breaker; W without one."""
    width = recent_EW.shape[1]
    if not breakers.tails:
        return torch.full((len(recent_EW),), width, device=recent_EW.device)
    groups_EW = breakers.groups_V[recent_EW.clamp(min=0).long()]
    groups_EW = groups_EW.masked_fill(recent_EW < 0, 0)
    longest_EW = torch.where((groups_EW & breakers.lone_bits) != 0, 0, -1)
    # What follows a place is newer, and so stands before it.
    most = max(map(len, breakers.tails), default=0)
    padded_EW = functional.pad(recent_EW, (most, 0), value=-1)
    for group, tail in enumerate(breakers.tails):
        if not tail:
            continue
        is_here_EW = ((groups_EW >> group) & 1).bool()
        for offset, token in enumerate(tail, start=1):
            next_EW = padded_EW[:, most - offset :][:, :width]
            is_here_EW = is_here_EW & (next_EW == token)
        longest_EW = torch.where(is_here_EW, longest_EW.clamp(min=len(tail)), longest_EW)
    places_W = torch.arange(width, device=recent_EW.device)
    first_E1 = torch.where(longest_EW >= 0, places_W, width).amin(1, keepdim=True)
    longest_E1 = longest_EW.gather(1, first_E1.clamp(max=width - 1)).clamp(min=0)
    return (first_E1 - longest_E1).squeeze(1)


def longest_repeats(
    recent_EW: Tensor, lengths_EW: Tensor, allowed_E: Tensor, vocab_size: int
) -> Tensor:
    """[E, V] int64: the longest repetition, of at least allowed_E tokens, that each token would
    go on with; -1 without one."""
    # The token behind an earlier place is the one that went on there.
    next_EW, lengths_EW = recent_EW[:, :-1].long(), lengths_EW[:, 1:].long()
    counts_EW = (lengths_EW >= allowed_E.unsqueeze(1)) & (recent_EW[:, 1:] >= 0)
    repeats_EV = torch.full(
        (recent_EW.shape[0], vocab_size), -1, dtype=torch.int64, device=recent_EW.device
    )
    return repeats_EV.scatter_reduce_(
        1, next_EW.clamp(min=0), lengths_EW.masked_fill(~counts_EW, -1), reduce="amax"
    )
