"""What the functions that adjust logits read beside them, the same for kernels and their twins.

Shapes: S rows of a step, R row slots, V vocabulary, E biased logits of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Penalties:
    """What each row slot has seen, and how strongly that counts for the rows of a step."""

    in_prompt_RV: Tensor
    """bool."""
    output_counts_RV: Tensor
    """int32."""
    repetition_S: Tensor
    """float32 as the two below; 1 and 0, 0 change nothing, whatever the row has seen."""
    presence_S: Tensor
    frequency_S: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BiasEntries:
    """What is added to single logits of a step; no logit has two entries."""

    seqs_E: Tensor
    """int32: which row of the step, from 0 to S - 1."""
    ids_E: Tensor
    """int32 token ids."""
    values_E: Tensor
    """float32; -inf bans the token."""
