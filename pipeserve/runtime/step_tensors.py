"""StepTensors: the numbers that sampling a step needs, brought to the device in one copy.

Runs on the last stage's thread.

Shapes: S sampled rows of a step, F numbers of a row, G rows that asked for log-probabilities,
E biased logits of a step, M masked rows, W words of a mask.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import FloatArray, IntArray, StepMasks
from pipeserve.kernels.sampling_state import BiasEntries


class Line(enum.IntEnum):
    """Where each parameter stands in what is uploaded."""

    ROWS = 0
    """64 bits take two lines."""
    SEEDS = 2
    POSITIONS = 4
    TOP_K = 5
    TEMPERATURE = 6
    TOP_P = 7
    MIN_P = 8
    REPETITION = 9
    PRESENCE = 10
    FREQUENCY = 11
    ASKED = 12


NUMBERS = range(Line.TOP_K, Line.ASKED)
"""What a row's SamplingParams say in 32 bits: top_k as an integer, the others as float32."""
_NUM_LINES = Line.ASKED + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepArrays:
    """On the host."""

    rows_S: IntArray
    seeds_S: np.ndarray
    """int64."""
    positions_S: IntArray
    numbers_FS: IntArray
    """NUMBERS, the floating-point ones by their bits."""
    asked_G: IntArray
    bias_seqs_E: IntArray
    bias_ids_E: IntArray
    bias_values_E: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTensors:
    """On the device: views of what was uploaded, made when they are asked for."""

    words: Tensor
    """int32: lines of `width` words, then three longer or shorter ones of bias."""
    width: int
    num_rows: int
    num_asked: int
    num_entries: int

    def longs(self, line: Line) -> Tensor:
        """[S] int64."""
        return self._words(line, 2 * self.num_rows).view(torch.int64)

    def ints(self, line: Line) -> Tensor:
        """[S] int32, or of ASKED [G]."""
        return self._words(line, self.num_asked if line is Line.ASKED else self.num_rows)

    def floats(self, line: Line) -> Tensor:
        """[S] float32."""
        return self._words(line, self.num_rows).view(torch.float32)

    def bias(self) -> BiasEntries:
        """Of all rows."""
        bias_3E = self.words[_NUM_LINES * self.width :].view(3, -1)[:, : self.num_entries]
        seqs_E, ids_E, values_E = bias_3E.unbind()
        return BiasEntries(seqs_E=seqs_E, ids_E=ids_E, values_E=values_E.view(torch.float32))

    def _words(self, line: Line, num_words: int) -> Tensor:
        return self.words[line * self.width : line * self.width + num_words]


def upload(arrays: StepArrays, device: torch.device) -> StepTensors:
    """One copy, which the host does not wait for."""
    num_rows, num_entries = len(arrays.rows_S), len(arrays.bias_ids_E)
    width = _aligned(num_rows)
    # A tensor of its own each time: the copy may still be under way when the next step comes, and
    # torch gives pinned memory out again only behind the copies from it.
    words = torch.empty(
        _NUM_LINES * width + 3 * _aligned(num_entries),
        dtype=torch.int32,
        pin_memory=device.type == "cuda",
    )
    _pack(words.numpy(), arrays, width)
    return StepTensors(
        words=words.to(device, non_blocking=True),
        width=width,
        num_rows=num_rows,
        num_asked=len(arrays.asked_G),
        num_entries=num_entries,
    )


def upload_masks(masks: StepMasks, device: torch.device) -> tuple[Tensor, Tensor]:
    """seqs_M and words_MW on the device, in one copy that the host does not wait for."""
    num_masks, width = masks.words_MW.shape
    padded = _aligned(width)
    words = torch.empty(
        num_masks * padded + num_masks, dtype=torch.int32, pin_memory=device.type == "cuda"
    )
    words_MW = words[: num_masks * padded].view(num_masks, padded)
    words_MW.numpy()[:, :width] = masks.words_MW
    words_MW.numpy()[:, width:] = 0
    words[num_masks * padded :].numpy()[:] = masks.seqs_M
    on_device = words.to(device, non_blocking=True)
    return on_device[num_masks * padded :], on_device[: num_masks * padded].view(num_masks, padded)


def _pack(words: IntArray, arrays: StepArrays, width: int) -> None:
    num_rows, num_entries = len(arrays.rows_S), len(arrays.bias_ids_E)
    wide = words[: Line.POSITIONS * width].view(np.int64).reshape(2, width)
    wide[0, :num_rows], wide[1, :num_rows] = arrays.rows_S, arrays.seeds_S
    lines = words[: _NUM_LINES * width].reshape(_NUM_LINES, width)
    lines[Line.POSITIONS, :num_rows] = arrays.positions_S
    lines[NUMBERS.start : NUMBERS.stop, :num_rows] = arrays.numbers_FS
    lines[Line.ASKED, : len(arrays.asked_G)] = arrays.asked_G
    if num_entries > 0:
        bias_3E = words[_NUM_LINES * width :].reshape(3, -1)
        bias_3E[0, :num_entries], bias_3E[1, :num_entries] = arrays.bias_seqs_E, arrays.bias_ids_E
        bias_3E[2, :num_entries] = arrays.bias_values_E.view(np.int32)


def _aligned(length: int) -> int:
    """In 32-bit words, to 16 bytes: Triton compiles anew for pointers that are not."""
    return -(-length // 4) * 4
