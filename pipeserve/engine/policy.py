"""AdmissionPolicy: what the options say about scheduling, as the scheduler reads it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeserve.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPolicy:
    """The defaults are those of the options."""

    shares_prefixes: bool = True
    """Whether prompts read the blocks of others."""
    mixes_prefill: bool = True
    """Whether a micro-batch may hold both decode rows and prompt chunks."""
    max_wait_s: float = 30.0
    """So often the sequence that arrived first is next, whatever its priority and account."""

    @classmethod
    def from_config(cls, config: Config) -> AdmissionPolicy:
        return cls(
            shares_prefixes=config.prefix_cache,
            mixes_prefill=config.mix_prefill != "off",
            max_wait_s=config.max_wait_s,
        )
