"""ChainSampler: draws for the rows whose parameters have a chain of samplers, apart from the rest.

Runs on the last stage's thread or, for late rows, beside it (LateThread); the host waits for
nothing. Rows that go through the same samplers are taken together, a few at a time, so that their
work space stays small.

Shapes: S sampled rows of a step, E rows of them taken together, R row slots, V vocabulary,
W tokens of a window, the newest first.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import IntArray, RowStart
from pipeserve.core.sampler_chain import BreakerGroup, SamplerName
from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels.candidates import Candidates
from pipeserve.kernels.reference_dry import Breakers, breaker_limits, longest_repeats
from pipeserve.kernels.sampling_backend import SamplingBackend
from pipeserve.runtime.chain_state import Surprises, TokenHistory
from pipeserve.runtime.devices import int_tensor

_MOST_ELEMENTS = 1 << 21
"""Logits, or tokens of windows, taken together: about 16 MB per tensor of 64 bits."""

_XTC_SALT = 0x58_54_43
"""Makes another stream of random numbers of a sequence's seed."""


class _Word(enum.IntEnum):
    """What is uploaded of a row, 64 bits each: three integers, then float64."""

    SEQ = 0
    """Which row of the step."""
    ROW = 1
    SEED = 2
    POSITION = 3
    TEMPERATURE = 4
    RANGE = 5
    EXPONENT = 6
    TOP_K = 7
    TOP_P = 8
    MIN_P = 9
    TYPICAL_P = 10
    NUM_SIGMA = 11
    XTC_PROBABILITY = 12
    XTC_THRESHOLD = 13
    REPETITION = 14
    PRESENCE = 15
    FREQUENCY = 16
    PENALTY_WINDOW = 17
    DRY_MULTIPLIER = 18
    DRY_BASE = 19
    DRY_ALLOWED = 20
    DRY_WINDOW = 21
    DRY_LONGEST = 22
    TAU = 23
    ETA = 24


_FIRST_FLOAT = _Word.TEMPERATURE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """What the host knows of a row with a chain."""

    params: SamplingParams
    samplers: tuple[SamplerName, ...]
    has_range: bool
    breakers: tuple[BreakerGroup, ...]
    words: np.ndarray
    """[_Word] int64, SEQ, ROW and POSITION still to be written."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Rows of the same kind are taken together."""
        return self.samplers, self.has_range, self.breakers

    @property
    def has_mirostat(self) -> bool:
        return SamplerName.MIROSTAT in self.samplers

    @property
    def needs_history(self) -> bool:
        return SamplerName.DRY in self.samplers or SamplerName.PENALTIES in self.samplers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Slab:
    """Rows of one kind, and what is on the device of them."""

    kind: _Row
    largest_k: int
    longest: int
    """Tokens of the longest of their sequences."""
    has_greedy: bool
    """Whether a row has the temperature 0."""
    num_rows: int
    words: Tensor
    """[_Word, E] int64, and a column more where E is odd: Triton compiles anew for pointers that
    are not aligned to 16 bytes."""
    places_E: Tensor
    """int32: the positions."""

    def ints(self, word: _Word) -> Tensor:
        """[E] int64."""
        return self.words[word, : self.num_rows]

    def floats(self, word: _Word) -> Tensor:
        """[E, 1] float64."""
        return self.ints(word).view(torch.float64).unsqueeze(1)


class ChainSampler:
    """Memory on the device: of rows with DRY or a penalty window 4 bytes per row slot and token of
    the longest sequence, with DRY 8 bytes per token of the vocabulary for each set of sequence
    breakers, and a work space of about ten times 16 MB."""

    def __init__(
        self, *, num_rows: int, vocab_size: int, device: torch.device, backend: SamplingBackend
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._kernels = backend
        self._has_chain_R = np.zeros(num_rows, dtype=np.bool_)
        self._rows: dict[int, _Row] = {}
        self._history = TokenHistory(num_rows, device)
        self._surprises = Surprises(num_rows, device)
        self._breakers: dict[tuple[BreakerGroup, ...], Breakers] = {}
        self._ones_R = torch.ones(num_rows, device=device)
        self._zeros_R = torch.zeros(num_rows, device=device)

    def start(self, start: RowStart) -> None:
        """A sequence takes a row, with a chain or without."""
        row, params = start.row, start.sampling
        self._surprises.release(row)
        self._rows.pop(row, None)
        self._has_chain_R[row] = params.chain is not None
        if params.chain is None:
            return
        started = _row_of(start)
        if started.has_mirostat:
            self._surprises.start(start)
        self._rows[row] = started
        if started.needs_history:
            self._history.start(start)
        if SamplerName.DRY in started.samplers and started.breakers not in self._breakers:
            used = {other.breakers for other in self._rows.values()}
            self._breakers = {key: self._breakers[key] for key in used & self._breakers.keys()}
            self._breakers[started.breakers] = self._upload(started.breakers)

    def draws_all(self, rows_S: IntArray) -> bool:
        """Whether these rows all have a chain."""
        return bool(self._has_chain_R[rows_S].all())

    def sample(
        self, logits_SV: Tensor, ids_S: Tensor, rows_S: IntArray, positions_S: IntArray
    ) -> None:
        """Write the tokens of the rows with a chain over what ids_S holds for them.

        logits_SV: with bias and, where the chain has no window, penalties; left as they are.
        """
        seqs = np.flatnonzero(self._has_chain_R[rows_S])
        if len(seqs) == 0:
            return
        for slab in self._slabs(seqs, rows_S, positions_S):
            if slab.num_rows == len(ids_S):
                ids_S.copy_(self._draw(logits_SV, slab))
                continue
            seqs_E = slab.ints(_Word.SEQ)
            ids_S.index_copy_(0, seqs_E, self._draw(logits_SV.index_select(0, seqs_E), slab))

    def _slabs(self, seqs: np.ndarray, rows_S: IntArray, positions_S: IntArray) -> Iterator[_Slab]:
        longest = int(positions_S[seqs].max())
        most = max(1, _MOST_ELEMENTS // max(self._vocab_size, longest))
        kinds: dict[tuple[object, ...], list[int]] = {}
        for seq in seqs.tolist():
            kinds.setdefault(self._rows[int(rows_S[seq])].kind, []).append(seq)
        for members in kinds.values():
            for first in range(0, len(members), most):
                yield self._slab(members[first : first + most], rows_S, positions_S)

    def _slab(self, seqs: list[int], rows_S: IntArray, positions_S: IntArray) -> _Slab:
        rows = [self._rows[int(rows_S[seq])] for seq in seqs]
        words = np.zeros((len(_Word), len(rows) + len(rows) % 2), dtype=np.int64)
        words[:, : len(rows)] = np.stack([row.words for row in rows], axis=1)
        words[_Word.SEQ, : len(rows)] = seqs
        words[_Word.ROW, : len(rows)] = rows_S[seqs]
        words[_Word.POSITION, : len(rows)] = positions_S[seqs]
        on_device = int_tensor(words, self._device)
        return _Slab(
            kind=rows[0],
            largest_k=max(row.params.top_k or 1 for row in rows),
            longest=int(positions_S[seqs].max()),
            has_greedy=any(row.params.temperature <= 0.0 for row in rows),
            num_rows=len(rows),
            words=on_device,
            places_E=on_device[_Word.POSITION, : len(rows)].int(),
        )

    def _draw(self, logits_EV: Tensor, slab: _Slab) -> Tensor:
        candidates = Candidates(logits_EV)
        for sampler in slab.kind.samplers:
            self._apply(sampler, candidates, slab)
        even_E, no_min_p_E = self._ones_R[: slab.num_rows], self._zeros_R[: slab.num_rows]
        uniform_E = self._kernels.uniform(slab.ints(_Word.SEED), slab.places_E)
        ids_E = self._kernels.sample(candidates.logits(), even_E, no_min_p_E, uniform_E)
        if slab.kind.has_mirostat:
            rows_E, positions_E = slab.ints(_Word.ROW), slab.ints(_Word.POSITION)
            error_E = candidates.bits_of(ids_E) - slab.floats(_Word.TAU).squeeze(1)
            self._surprises.learn(rows_E, positions_E, slab.floats(_Word.ETA).squeeze(1) * error_E)
        if slab.kind.needs_history:
            rows_E, history_RL = slab.ints(_Word.ROW), self._history.token_ids_RL
            self._kernels.record(ids_E, rows_E, slab.places_E, None, history_RL)
        return ids_E

    def _apply(self, sampler: SamplerName, candidates: Candidates, slab: _Slab) -> None:
        floats = slab.floats
        match sampler:
            case SamplerName.PENALTIES:
                self._penalise(candidates, slab)
            case SamplerName.DRY:
                self._lower_repeats(candidates, slab)
            case SamplerName.TOP_N_SIGMA:
                candidates.keep_top_n_sigma(floats(_Word.NUM_SIGMA))
            case SamplerName.TOP_K:
                candidates.keep_top_k(floats(_Word.TOP_K), slab.largest_k)
            case SamplerName.TYPICAL_P:
                candidates.keep_typical(floats(_Word.TYPICAL_P))
            case SamplerName.TOP_P:
                candidates.keep_top_p(floats(_Word.TOP_P))
            case SamplerName.MIN_P:
                candidates.keep_min_p(floats(_Word.MIN_P))
            case SamplerName.XTC:
                seeds_E = slab.ints(_Word.SEED) ^ _XTC_SALT
                uniform_E = self._kernels.uniform(seeds_E, slab.places_E)
                candidates.exclude_top(
                    floats(_Word.XTC_PROBABILITY),
                    floats(_Word.XTC_THRESHOLD),
                    uniform_E.unsqueeze(1),
                )
            case SamplerName.TEMPERATURE if slab.kind.has_range:
                candidates.scale(
                    floats(_Word.TEMPERATURE), floats(_Word.RANGE), floats(_Word.EXPONENT)
                )
            case SamplerName.TEMPERATURE:
                candidates.scale_fixed(floats(_Word.TEMPERATURE), has_zero=slab.has_greedy)
            case SamplerName.MIROSTAT:
                bits_E = self._surprises.most_bits(slab.ints(_Word.ROW), slab.ints(_Word.POSITION))
                candidates.keep_unsurprising(bits_E.unsqueeze(1))

    def _penalise(self, candidates: Candidates, slab: _Slab) -> None:
        recent_EW = self._recent(slab, _Word.PENALTY_WINDOW)
        counts_EV = torch.zeros_like(candidates.is_in_EV, dtype=torch.int32)
        counts_EV.scatter_add_(1, recent_EW.clamp(min=0).long(), (recent_EW >= 0).int())
        candidates.penalise(
            counts_EV,
            slab.floats(_Word.REPETITION),
            slab.floats(_Word.PRESENCE),
            slab.floats(_Word.FREQUENCY),
        )

    def _lower_repeats(self, candidates: Candidates, slab: _Slab) -> None:
        recent_EW = self._recent(slab, _Word.DRY_WINDOW)
        breakers = self._breakers[slab.kind.breakers]
        allowed_E1 = slab.floats(_Word.DRY_ALLOWED)
        longest_E = slab.floats(_Word.DRY_LONGEST).squeeze(1).long()
        limits_E = torch.minimum(breaker_limits(recent_EW, breakers), longest_E)
        lengths_EW = self._kernels.repeat_lengths(recent_EW, limits_E.int())
        candidates.lower_repeats(
            longest_repeats(recent_EW, lengths_EW, allowed_E1.squeeze(1), self._vocab_size),
            breakers,
            slab.floats(_Word.DRY_MULTIPLIER),
            slab.floats(_Word.DRY_BASE),
            allowed_E1,
        )

    def _recent(self, slab: _Slab, window: _Word) -> Tensor:
        return self._history.recent(
            slab.ints(_Word.ROW),
            slab.ints(_Word.POSITION),
            slab.floats(window).squeeze(1).long(),
            slab.longest,
        )

    def _upload(self, groups: tuple[BreakerGroup, ...]) -> Breakers:
        groups_V = np.zeros(self._vocab_size, dtype=np.int64)
        for index, group in enumerate(groups):
            heads = group.head_ids
            groups_V[heads[heads < self._vocab_size]] |= 1 << index
        return Breakers(
            groups_V=int_tensor(groups_V, self._device), tails=[group.tail for group in groups]
        )


def _row_of(start: RowStart) -> _Row:
    params = start.sampling
    chain = params.chain
    assert chain is not None, "a row with a chain"
    words = np.zeros(len(_Word), dtype=np.int64)
    words[_Word.SEED] = params.seed
    words[_FIRST_FLOAT:].view(np.float64)[:] = _numbers(params)
    return _Row(
        params=params,
        samplers=params.active_samplers,
        has_range=chain.dynatemp_range > 0.0 and chain.mirostat is None,
        breakers=() if chain.dry is None else chain.dry.breakers,
        words=words,
    )


def _numbers(params: SamplingParams) -> tuple[float, ...]:
    """From _FIRST_FLOAT on."""
    chain = params.chain
    assert chain is not None, "a row with a chain"
    dry, mirostat = chain.dry, chain.mirostat
    return (
        params.temperature,
        chain.dynatemp_range,
        chain.dynatemp_exponent,
        params.top_k or 0,
        params.top_p,
        params.min_p,
        chain.typical_p,
        chain.top_n_sigma,
        chain.xtc_probability,
        chain.xtc_threshold,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        chain.penalty_window or 0,
        *(
            (0.0, 1.0, 0.0, 0.0, 0.0)
            if dry is None
            else (dry.multiplier, dry.base, dry.allowed_length, dry.window, dry.longest_counted)
        ),
        *((0.0, 0.0) if mirostat is None else (mirostat.tau, mirostat.eta)),
    )
