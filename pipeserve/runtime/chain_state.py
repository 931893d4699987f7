"""What a chain of samplers remembers of each row on the device: its tokens, and mirostat's state.

Runs where ChainSampler does; the host waits for nothing.

Shapes: E rows taken together, R row slots, L positions, W tokens of a window, the newest first.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from pipeserve.core.batch import RowStart
from pipeserve.runtime.devices import int_tensor

_LEAST_POSITIONS = 1024

_NUM_STEPS = 4
"""A preempted sequence may have been sampled for some tokens more than it is resumed with."""
_MOST_PUT_AWAY_PER_ROW = 4


class TokenHistory:
    """The token at each position of each row; grows with the longest sequence."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.token_ids_RL = torch.zeros((num_rows, 0), dtype=torch.int32, device=device)

    def start(self, start: RowStart) -> None:
        """A sequence takes a row, and may come with what it had generated before."""
        self._reserve(start.num_prompt_tokens + start.sampling.max_tokens)
        token_ids = int_tensor(start.token_ids, self.token_ids_RL.device)
        self.token_ids_RL[start.row, : len(token_ids)] = token_ids

    def recent(
        self, rows_E: Tensor, positions_E: Tensor, windows_E: Tensor, longest: int
    ) -> Tensor:
        """[E, W] int32: the tokens before each position, the newest first, -1 where the window or
        the sequence ends sooner. longest: the highest of positions_E, which makes W."""
        places_W = torch.arange(max(1, longest), device=rows_E.device)
        positions_EW = positions_E.unsqueeze(1) - 1 - places_W
        is_in_EW = (positions_EW >= 0) & (places_W < windows_E.unsqueeze(1))
        tokens_EW = self.token_ids_RL[rows_E.unsqueeze(1), positions_EW.clamp(min=0)]
        return tokens_EW.masked_fill(~is_in_EW, -1)

    def _reserve(self, num_positions: int) -> None:
        old_RL = self.token_ids_RL
        if num_positions <= old_RL.shape[1]:
            return
        length = max(_LEAST_POSITIONS, 1 << (num_positions - 1).bit_length())
        self.token_ids_RL = old_RL.new_zeros((old_RL.shape[0], length))
        self.token_ids_RL[:, : old_RL.shape[1]] = old_RL


class Surprises:
    """Mirostat's threshold of each row, for the last few positions.

    It hangs on probabilities that are gone, so that a preempted sequence cannot find it again from
    its tokens: it is put away when another takes the row, and forgotten only after many others.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._bits_RP = torch.zeros((num_rows, _NUM_STEPS), dtype=torch.float64, device=device)
        """At position % _NUM_STEPS."""
        self._put_away: OrderedDict[int, Tensor] = OrderedDict()
        self._sequence_of: dict[int, int] = {}
        self._row_of: dict[int, int] = {}
        """Where each sequence was started last; it may have left the row since."""

    def release(self, row: int) -> None:
        """Another sequence takes the row, if any had it."""
        seq_id = self._sequence_of.pop(row, None)
        if seq_id is None or self._row_of.get(seq_id) != row:
            return
        del self._row_of[seq_id]
        self._put_away[seq_id] = self._bits_RP[row].clone()
        if len(self._put_away) > _MOST_PUT_AWAY_PER_ROW * len(self._bits_RP):
            self._put_away.popitem(last=False)

    def start(self, start: RowStart) -> None:
        """A sequence with mirostat takes a row that was released."""
        chain = start.sampling.chain
        assert chain is not None and chain.mirostat is not None, "a row with mirostat"
        bits_P = self._put_away.pop(start.seq_id, None)
        left = self._row_of.get(start.seq_id)
        if left is not None:  # and nobody has taken it yet
            bits_P = self._bits_RP[left]
        self._row_of[start.seq_id], self._sequence_of[start.row] = start.row, start.seq_id
        is_resumed = len(start.token_ids) > start.num_prompt_tokens
        if not is_resumed or bits_P is None:
            # Twice the target, as the paper and llama.cpp begin.
            bits_P = torch.full_like(self._bits_RP[start.row], 2.0 * chain.mirostat.tau)
        self._bits_RP[start.row] = bits_P

    def most_bits(self, rows_E: Tensor, positions_E: Tensor) -> Tensor:
        """[E] float64: the threshold for the token at each position."""
        return self._bits_RP[rows_E, positions_E % _NUM_STEPS]

    def learn(self, rows_E: Tensor, positions_E: Tensor, change_E: Tensor) -> None:
        """change_E: how far the threshold sinks with the token at each position."""
        next_E = self.most_bits(rows_E, positions_E) - change_E
        self._bits_RP[rows_E, (positions_E + 1) % _NUM_STEPS] = next_E
