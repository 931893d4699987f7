"""ModelFacts: what /v1/models tells of the model file.

Immutable; made once when the model is loaded. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Numbers are those of the file, not of what is served of it."""

    architecture: str
    quantisation: str
    """Such as Q4_K_M, as the file calls itself."""
    num_parameters: int
    num_bytes: int
    """Of the file, all shards together."""
    trained_context: int
    """Most tokens of a sequence that the model was trained for; 0 where the file does not say."""
