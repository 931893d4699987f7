"""The fields of a request that make a chain of samplers, under llama-server's names.

Runs in the text executor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

from pydantic import Discriminator, Field, Tag, field_validator

from pipeserve.core.sampler_chain import (
    DEFAULT_ORDER,
    WHOLE_SEQUENCE,
    BreakerGroup,
    Dry,
    Mirostat,
    SamplerChain,
    SamplerName,
)
from pipeserve.server.body import Body, kind_of_text, shown

DEFAULT_REPEAT_LAST_N = 64
DEFAULT_DRY_BREAKERS = ("\n", ":", '"', "*")
"""llama-server's, both."""
MAX_BREAKERS = 32
MAX_BREAKER_CHARACTERS = 40
MAX_SAMPLERS = 20
MAX_BANNED_STRINGS = 200
MAX_BANNED_CHARACTERS = 100

_OTHER_NAMES = {
    "temp": SamplerName.TEMPERATURE,
    "nucleus": SamplerName.TOP_P,
    "typical": SamplerName.TYPICAL_P,
    "typical_p": SamplerName.TYPICAL_P,
    "typ": SamplerName.TYPICAL_P,
}
_SAMPLER_NAMES = {name.value: name for name in DEFAULT_ORDER} | _OTHER_NAMES

BannedString = Annotated[str, Field(min_length=1, max_length=MAX_BANNED_CHARACTERS)]

Window = Annotated[int, Field(ge=-1, le=WHOLE_SEQUENCE)]
"""Tokens; -1 means the whole sequence, and 0 none."""


class SamplerFields(Body):
    """What chat and plain completions may ask of the samplers beyond top_k, top_p and min_p."""

    samplers: Annotated[tuple[str, ...], Field(max_length=MAX_SAMPLERS)] | None = None
    """Which samplers act, in this order; those that are not named do not."""
    typical_p: float | None = None
    top_n_sigma: float | None = None
    """0 and below: without effect."""
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    """0: DRY does nothing."""
    dry_base: float | None = None
    dry_allowed_length: Annotated[int, Field(ge=0)] | None = None
    dry_penalty_last_n: Window | None = None
    dry_sequence_breakers: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1, max_length=MAX_BREAKER_CHARACTERS)], ...],
            Field(max_length=MAX_BREAKERS),
        ]
        | None
    ) = None
    mirostat: int | None = None
    """0, or 2 for Mirostat 2, beside which only temperature and logit_bias act."""
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    repeat_last_n: Window | None = None
    """The three penalties count that many tokens, of prompt and output alike. 64 beside samplers
    or repeat_penalty; else the penalties are OpenAI's, over the whole sequence."""
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """llama-server's name of repetition_penalty; wins where both are given."""
    banned_strings: (
        Annotated[
            Annotated[BannedString, Tag("<text>")]
            | Annotated[
                tuple[BannedString, ...], Field(max_length=MAX_BANNED_STRINGS), Tag("<list>")
            ],
            Discriminator(kind_of_text),
        ]
        | None
    ) = None
    """TabbyAPI's: the answer never holds one of these, whatever its capitals. What may begin one is
    kept back; once one is complete, the answer goes back to before its first token (of those that
    were not sent yet), which is banned in that place from then on, and on from there. Thoughts
    count as the answer, and what a stop string cuts off does not. Not beside what says something of
    the answer's form (tools and limits of thoughts, too), nor mirostat."""

    @field_validator("samplers")
    @classmethod
    def _check_samplers(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if name.replace("-", "_") not in _SAMPLER_NAMES:
                known = ", ".join(sampler.value for sampler in DEFAULT_ORDER)
                raise ValueError(f"{shown(name)} is no sampler of this version; known are {known}")
        return names

    @field_validator("banned_strings")
    @classmethod
    def _check_banned(cls, strings: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if any("\ufffd" in each for each in strings or ()):
            raise ValueError("U+FFFD stands for bytes that are no text; leave it out")
        return strings

    @field_validator("mirostat")
    @classmethod
    def _check_mirostat(cls, version: int | None) -> int | None:
        if version not in (None, 0, 2):
            raise ValueError("only version 2 is built in; send 2, or 0 for none")
        return version

    def chain(
        self,
        *,
        penalises: bool,
        breaker_groups: Callable[[tuple[str, ...]], tuple[BreakerGroup, ...]],
    ) -> SamplerChain | None:
        """None where the plain samplers do.

        penalises: whether one of the three penalties is asked for.

        Raises:
            InvalidParameterError: a value is out of its range.
        """
        given = {
            name: value for name in _CHAIN_FIELDS if (value := getattr(self, name)) is not None
        }
        chain = SamplerChain(
            **given,
            order=self._order,
            top_n_sigma=max(0.0, self.top_n_sigma or 0.0),
            penalty_window=self._penalty_window(penalises),
            dry=self._dry(breaker_groups),
            mirostat=self._mirostat(),
        )
        is_plain = chain == SamplerChain(
            xtc_threshold=chain.xtc_threshold, dynatemp_exponent=chain.dynatemp_exponent
        )
        return None if is_plain and self.samplers is None else chain

    @property
    def all_banned_strings(self) -> tuple[str, ...]:
        """Whether one or several were sent."""
        strings = self.banned_strings or ()
        return (strings,) if isinstance(strings, str) else strings

    @property
    def _order(self) -> tuple[SamplerName, ...]:
        if self.samplers is None:
            return DEFAULT_ORDER
        return tuple(_SAMPLER_NAMES[name.replace("-", "_")] for name in self.samplers)

    def _penalty_window(self, penalises: bool) -> int | None:
        if not penalises:
            return None
        if self.repeat_last_n is not None:
            return _window(self.repeat_last_n)
        is_plain = self.samplers is None and self.repeat_penalty is None
        return None if is_plain else DEFAULT_REPEAT_LAST_N

    def _dry(
        self, breaker_groups: Callable[[tuple[str, ...]], tuple[BreakerGroup, ...]]
    ) -> Dry | None:
        if not self.dry_multiplier or self.dry_penalty_last_n == 0:
            return None
        dry = Dry(multiplier=self.dry_multiplier)
        if self.dry_base is not None:
            dry = replace(dry, base=self.dry_base)
        if self.dry_allowed_length is not None:
            dry = replace(dry, allowed_length=self.dry_allowed_length)
        if self.dry_penalty_last_n is not None:
            dry = replace(dry, window=_window(self.dry_penalty_last_n))
        strings = self.dry_sequence_breakers
        return replace(
            dry, breakers=breaker_groups(DEFAULT_DRY_BREAKERS if strings is None else strings)
        )

    def _mirostat(self) -> Mirostat | None:
        if self.mirostat != 2:
            return None
        mirostat = Mirostat()
        if self.mirostat_tau is not None:
            mirostat = replace(mirostat, tau=self.mirostat_tau)
        if self.mirostat_eta is not None:
            mirostat = replace(mirostat, eta=self.mirostat_eta)
        return mirostat


def _window(num_tokens: int) -> int:
    return WHOLE_SEQUENCE if num_tokens == -1 else num_tokens


_CHAIN_FIELDS = (
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "dynatemp_range",
    "dynatemp_exponent",
)
