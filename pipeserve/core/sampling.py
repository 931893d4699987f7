"""SamplingParams: how one sequence picks its tokens, validated once, shared by every layer."""

from __future__ import annotations

from dataclasses import dataclass

from pipeserve.core.sampler_chain import SamplerChain, SamplerName
from pipeserve.errors import InvalidParameterError

MAX_LOGPROBS = 20
"""Most alternatives per token that a request may ask for (OpenAI's limit)."""

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence picks its tokens and when it ends.

    The order of application is: logit_bias, penalties, min_tokens, temperature, top_k, top_p,
    min_p; with a chain it is the chain's. Log-probabilities are those of the unmodified logits.

    Raises:
        InvalidParameterError: a value is out of its range; `param` names the field.
    """

    max_tokens: int
    """Most tokens to generate, at least 1."""
    seed: int
    """Root of the sequence's random numbers: (seed, position) decides each draw."""
    min_tokens: int = 0
    """No stop token is sampled before this many tokens were generated."""
    temperature: float = 1.0
    """0 picks the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens; None keeps all."""
    top_p: float = 1.0
    """Only the smallest set of tokens whose probability reaches top_p."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs, added to the logits."""
    num_logprobs: int | None = None
    """None: no log-probabilities. k: the sampled token's and those of the k likeliest."""
    num_prompt_logprobs: int | None = None
    """The same for every token of the prompt but the first; None: none."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence: the model's end-of-sequence tokens and the request's own."""
    chain: SamplerChain | None = None
    """Further samplers, and their order; None for a sequence that needs neither."""

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed <= MAX_SEED, f"between 0 and {MAX_SEED}"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or left out"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, at most 100"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            *(
                (name, count is None or 0 <= count <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
                for name, count in (
                    ("num_logprobs", self.num_logprobs),
                    ("num_prompt_logprobs", self.num_prompt_logprobs),
                )
            ),
        )
        for field, holds, mend in checks:
            if not holds:
                raise InvalidParameterError(
                    f"{field} is {getattr(self, field)}; it must be {mend}", param=field
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Over the whole sequence; those of a chain with a window are not meant."""
        chain = self.chain
        if chain is not None and (chain.mirostat is not None or chain.penalty_window is not None):
            return False
        return self._penalises

    @property
    def _penalises(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def active_samplers(self) -> tuple[SamplerName, ...]:
        """Those of the chain, in its order, that change something."""
        chain = self.chain
        if chain is None:
            return ()
        has_range = chain.dynatemp_range > 0.0 and chain.mirostat is None
        acts = {
            SamplerName.PENALTIES: bool(chain.penalty_window) and self._penalises,
            SamplerName.DRY: chain.dry is not None,
            SamplerName.TOP_N_SIGMA: chain.top_n_sigma > 0.0,
            SamplerName.TOP_K: self.top_k is not None,
            SamplerName.TYPICAL_P: chain.typical_p < 1.0,
            SamplerName.TOP_P: self.top_p < 1.0,
            SamplerName.MIN_P: self.min_p > 0.0,
            # Two tokens cannot both be likelier than one half.
            SamplerName.XTC: chain.xtc_probability > 0.0 and chain.xtc_threshold <= 0.5,
            SamplerName.TEMPERATURE: self.temperature != 1.0 or has_range,
            SamplerName.MIROSTAT: True,
        }
        order = chain.order
        if chain.mirostat is not None:
            order = (SamplerName.TEMPERATURE, SamplerName.MIROSTAT)
        return tuple(name for name in order if acts[name])
