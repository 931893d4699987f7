"""Chained: how many sequences of a run are drawn by a chain of samplers, and by which.

Values only; imports no torch, so that the command line can build them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeserve.core.sampler_chain import Dry, Mirostat, SamplerChain
from pipeserve.core.sampling import SamplingParams
from pipeserve.errors import ConfigError

CHAINS: dict[str, SamplerChain] = {
    "dry": SamplerChain(dry=Dry(multiplier=0.8)),
    "xtc": SamplerChain(xtc_probability=0.5),
    "typical": SamplerChain(typical_p=0.9),
    "mirostat": SamplerChain(mirostat=Mirostat()),
    "all": SamplerChain(
        penalty_window=64,
        dry=Dry(multiplier=0.8),
        top_n_sigma=2.0,
        typical_p=0.95,
        xtc_probability=0.5,
        dynatemp_range=0.3,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chained:
    """The last num_sequences of a batch; the others are greedy."""

    name: str
    """A key of CHAINS."""
    num_sequences: int

    @classmethod
    def parse(cls, text: str) -> Chained:
        """As "dry:16".

        Raises:
            ConfigError: it is not a chain and a number.
        """
        name, _, number = text.partition(":")
        if name not in CHAINS or not number.isascii() or not number.isdecimal():
            raise ConfigError(
                f"samplers is {text!r}; give one of {', '.join(CHAINS)} and the number of "
                "sequences that it draws, as dry:16"
            )
        return cls(name=name, num_sequences=int(number))

    def sampling(self, index: int, *, num_sequences: int, max_tokens: int) -> SamplingParams:
        """Of one sequence of so many."""
        if index < num_sequences - self.num_sequences:
            return greedy(max_tokens)
        return SamplingParams(
            max_tokens=max_tokens, seed=index, temperature=0.7, chain=CHAINS[self.name]
        )


def greedy(max_tokens: int) -> SamplingParams:
    """Without a stop."""
    return SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
