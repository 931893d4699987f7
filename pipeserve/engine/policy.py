"""AdmissionPolicy: what the options say about scheduling, as the scheduler reads it, and what no
option says: parts that only the benchmarks leave out, to show what each is worth."""

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
    balances_cohorts: bool = True
    """Whether newcomers join the smallest cohort and sequences move to even them out; else the
    cohorts take newcomers in turn, and keep them."""
    throttles_prefill: bool = True
    """Whether waiting prompts are spread over the micro-batches to come; else they fill each one
    up to max_batch_tokens."""
    weighs_attention: bool = True
    """Whether a long prompt's late chunks are cut smaller, by what they are found to cost."""
    keeps_reserve: bool = True
    """Whether KV blocks are held back for the outputs to come, as long as others had."""

    @classmethod
    def from_config(cls, config: Config) -> AdmissionPolicy:
        return cls(
            shares_prefixes=config.prefix_cache,
            mixes_prefill=config.mix_prefill != "off",
            max_wait_s=config.max_wait_s,
        )
