"""SamplingBackend: the sampling functions of one kind of device as one value.

Triton is imported only where a GPU asks for it: a CPU-only installation comes without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeserve.kernels import reference_dry, reference_sampling
from pipeserve.kernels.sampling_state import BiasEntries, Penalties


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBackend:
    """Each function as its twin in reference_sampling.py or reference_dry.py describes it."""

    uniform: Callable[[Tensor, Tensor], Tensor]
    greedy: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sample_filtered: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    apply_penalties: Callable[[Tensor, Tensor, Penalties], Tensor]
    apply_bias: Callable[[Tensor, Tensor, BiasEntries, Tensor, Penalties | None], None]
    apply_masks: Callable[[Tensor, Tensor, Tensor], None]
    record: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]
    log_probs: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    repeat_lengths: Callable[[Tensor, Tensor], Tensor]


REFERENCE = SamplingBackend(
    uniform=reference_sampling.uniform,
    greedy=reference_sampling.greedy,
    sample=reference_sampling.sample,
    sample_filtered=reference_sampling.sample_filtered,
    apply_penalties=reference_sampling.apply_penalties,
    apply_bias=reference_sampling.apply_bias,
    apply_masks=reference_sampling.apply_masks,
    record=reference_sampling.record,
    log_probs=reference_sampling.log_probs,
    repeat_lengths=reference_dry.repeat_lengths,
)
"""Plain torch: the CPU path."""


def sampling_backend_for(device: torch.device) -> SamplingBackend:
    """The sampling functions for a last stage on this device."""
    return REFERENCE if device.type == "cpu" else triton_sampling()


def triton_sampling() -> SamplingBackend:
    """The kernels: for a GPU, or on the CPU in Triton's interpreter."""
    from pipeserve.kernels import (
        dry,
        sampling,
        sampling_adjust,
        sampling_logprobs,
        sampling_mask,
        sampling_uniform,
    )

    return SamplingBackend(
        uniform=sampling_uniform.uniform,
        greedy=sampling.greedy,
        sample=sampling.sample,
        sample_filtered=sampling.sample_filtered,
        apply_penalties=sampling_adjust.apply_penalties,
        apply_bias=sampling_adjust.apply_bias,
        apply_masks=sampling_mask.apply_masks,
        record=sampling_adjust.record,
        log_probs=sampling_logprobs.log_probs,
        repeat_lengths=dry.repeat_lengths,
    )
