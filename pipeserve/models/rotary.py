"""Rotary position embedding: a model's frequencies, and the scale of its cosines and sines.

Pure functions. Shapes: R rotated entries of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeserve.models.config import LinearScaling, ModelConfig, RopeScaling, YarnScaling


def rotary_frequencies(config: ModelConfig, divisors: Tensor | None) -> Tensor:
    """Radians per position of each pair, [R / 2] float32.

    `divisors` [R / 2] is the file's rope_freqs tensor, by which Llama 3 slows low frequencies
    (https://github.com/meta-llama/llama-models, apply_scaling; the converter stores the result).
    """
    dim = config.rope_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / config.rope_theta**exponents
    if divisors is not None:
        frequencies = frequencies / divisors
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / factor
        case YarnScaling() as yarn:
            kept = _yarn_kept_share(yarn, theta=config.rope_theta, dim=dim)
            return frequencies * kept + frequencies / yarn.factor * (1.0 - kept)


def rotary_scale(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied by: YaRN makes attention sharper (section 3.4)."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    return scaling.attention_factor * (0.1 * math.log(scaling.factor) + 1.0)


def _yarn_kept_share(yarn: YarnScaling, *, theta: float, dim: int) -> Tensor:
    """Share of each unscaled frequency that is kept, [R / 2]: 1 for fast ones, 0 for slow ones."""

    def pair_that_turns(num_turns: float) -> float:
        wavelength = yarn.original_context_length / (num_turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    ramp = (pairs - first) / max(last - first, 0.001)
    return 1.0 - ramp.clamp(0.0, 1.0)
