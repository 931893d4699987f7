"""SamplerChain: the samplers of local users, and the order in which a sequence goes through them.

Validated once. Definitions follow llama.cpp (src/llama-sampling.cpp, common/sampling.cpp).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np

from pipeserve.errors import InvalidParameterError

WHOLE_SEQUENCE = 2**31 - 1
"""A window that holds every token."""

MAX_TAIL_TOKENS = 128
"""Of all sequence breakers together: each is compared along the whole window."""
_MAX_GROUPS = 63
"""One bit each."""
_MAX_COUNTED_REPEAT = 256
"""Tokens beyond allowed_length: the search takes as long as the window times what is counted."""
_MAX_ALLOWED_REPEAT = 256
_LOG_MAX_FLOAT32 = 88.7228391


class SamplerName(enum.Enum):
    """Each named as in llama-server's list `samplers`."""

    PENALTIES = "penalties"
    DRY = "dry"
    TOP_N_SIGMA = "top_n_sigma"
    TOP_K = "top_k"
    TYPICAL_P = "typ_p"
    TOP_P = "top_p"
    MIN_P = "min_p"
    XTC = "xtc"
    TEMPERATURE = "temperature"
    MIROSTAT = "mirostat"
    """Takes the place of all others but temperature, so that no order names it."""


DEFAULT_ORDER = tuple(name for name in SamplerName if name is not SamplerName.MIROSTAT)
"""llama-server's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerGroup:
    """Sequence breakers that end alike: one of the heads, then the tail."""

    tail: tuple[int, ...]
    heads: bytes
    """int32 token ids, which may be thousands."""

    @property
    def head_ids(self) -> np.ndarray:
        """int32."""
        return np.frombuffer(self.heads, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dry:
    """Lowers tokens that would make a repetition longer ("don't repeat yourself", by p-e-w).

    A token that would follow the last n tokens as it followed them before loses
    multiplier * base ** (n - allowed_length), for n of at least allowed_length.
    """

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    window: int = WHOLE_SEQUENCE
    """How many of the last tokens are searched for the repetition."""
    breakers: tuple[BreakerGroup, ...] = ()
    """No repetition reaches over one of these."""

    def __post_init__(self) -> None:
        _check("dry_multiplier", self.multiplier, 0.0, 1000.0)
        _check("dry_base", self.base, 1.0, 1000.0)
        _check("dry_allowed_length", self.allowed_length, 0, _MAX_ALLOWED_REPEAT)
        num_tokens = sum(len(group.tail) for group in self.breakers)
        if num_tokens > MAX_TAIL_TOKENS or len(self.breakers) > _MAX_GROUPS:
            raise InvalidParameterError(
                f"dry_sequence_breakers make {len(self.breakers)} sequences of together "
                f"{num_tokens} tokens behind their first; at most {_MAX_GROUPS} and "
                f"{MAX_TAIL_TOKENS} are compared: send fewer or shorter ones",
                param="dry_sequence_breakers",
            )

    @property
    def longest_counted(self) -> int:
        """A longer repetition counts as this long: the penalty is beyond float32 by then or, for
        bases below about 1.41, the search ends here, to bound its time."""
        most = _MAX_COUNTED_REPEAT
        if self.base > 1.000001:
            most = min(most, int(_LOG_MAX_FLOAT32 / math.log(self.base)))
        return self.allowed_length + most


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirostat:
    """Mirostat 2 (Basu and others, arXiv 2007.14966): holds the surprise near a target by a
    threshold that follows what was drawn. llama-server leaves out every other sampler beside it,
    and the penalties."""

    tau: float = 5.0
    """Bits."""
    eta: float = 0.1

    def __post_init__(self) -> None:
        _check("mirostat_tau", self.tau, 0.0, 100.0)
        _check("mirostat_eta", self.eta, 0.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerChain:
    """What a sequence's SamplingParams say beyond the plain samplers, whose own values stay there.

    logit_bias and min_tokens come before the chain. The probabilities that a sampler looks at are
    those of the tokens that the samplers before it left.

    Raises:
        InvalidParameterError: a value is out of its range; `param` names the request's field.
    """

    order: tuple[SamplerName, ...] = DEFAULT_ORDER
    penalty_window: int | None = None
    """The three penalties count the last tokens of prompt and output; None: they are no part of
    the chain and stand before it, as in SamplingParams."""
    dry: Dry | None = None
    top_n_sigma: float = 0.0
    """Only tokens whose logit is at most this many standard deviations of all logits below the
    highest; 0 keeps all."""
    typical_p: float = 1.0
    """Only the tokens whose surprise is nearest to the entropy, until their probability exceeds
    this (Meister and others, arXiv 2202.00666)."""
    xtc_probability: float = 0.0
    """How often XTC ("exclude top choices", by p-e-w) acts: of the tokens that reach
    xtc_threshold all but the least likely are removed."""
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    """The temperature goes from temperature - range (at least 0) to temperature + range, along
    (entropy / highest possible entropy) ** dynatemp_exponent; 0: it is fixed."""
    dynatemp_exponent: float = 1.0
    mirostat: Mirostat | None = None

    def __post_init__(self) -> None:
        _check("repeat_last_n", self.penalty_window or 0, 0, WHOLE_SEQUENCE)
        _check("top_n_sigma", self.top_n_sigma, 0.0, 1e6)
        _check("typical_p", self.typical_p, 0.0, 1.0)
        _check("xtc_probability", self.xtc_probability, 0.0, 1.0)
        _check("xtc_threshold", self.xtc_threshold, 0.0, 1.0)
        _check("dynatemp_range", self.dynatemp_range, 0.0, 100.0)
        _check("dynatemp_exponent", self.dynatemp_exponent, 0.0, 100.0)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidParameterError(
            f"{name} is {value}; it must be between {least:g} and {most:g}", param=name
        )
