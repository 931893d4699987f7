"""Sampled: what the last stage made of a step, on its way from the device to the host.

Started on the last stage's thread and read on whichever thread may wait for it.

Shapes: S sampled rows of a step, G rows of them that asked for log-probabilities, K alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import IntArray, PromptLogprobs, StepLogprobs
from pipeserve.runtime.prompt_scorer import ScoredChunk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskedLogprobs:
    """Log-probabilities of the rows that asked, on the device or on the host."""

    asked_G: IntArray
    """Which rows of the step: from 0 to S - 1."""
    token_G: Tensor
    top_ids_GK: Tensor
    top_GK: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """A step's tokens on the device."""

    ids_S: Tensor
    """int64."""
    logprobs: AskedLogprobs | None
    """None where no row asked."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """A token for every row with samples_S.

    Of a GPU it is on its way to the host: reading it waits, so not on a stage's thread.
    """

    ids_S: Tensor
    """Integers on the host."""
    arrived: torch.cuda.Event | None
    """Recorded behind the copies; None where they are done."""
    logprobs: AskedLogprobs | None
    """On the host."""
    scored: tuple[ScoredChunk, ...] = ()
    """On the host, too."""

    def token_ids(self) -> IntArray:
        """Wait for the ids."""
        self._wait()
        return self.ids_S.numpy().astype(np.int32)

    def step_logprobs(self) -> StepLogprobs | None:
        """Wait for what the rows asked for; the lines of the others hold zeros."""
        if self.logprobs is None:
            return None
        self._wait()
        asked_G, num_rows = self.logprobs.asked_G, len(self.ids_S)
        shape = (num_rows, self.logprobs.top_GK.shape[1])
        token_S = np.zeros(num_rows, dtype=np.float32)
        top_ids_SK, top_SK = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        token_S[asked_G] = self.logprobs.token_G.numpy()
        top_ids_SK[asked_G] = self.logprobs.top_ids_GK.numpy()
        top_SK[asked_G] = self.logprobs.top_GK.numpy()
        return StepLogprobs(token_S=token_S, top_ids_SK=top_ids_SK, top_SK=top_SK)

    def prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        """Wait for what prompts were scored."""
        if self.scored:
            self._wait()
        return tuple(chunk.read() for chunk in self.scored)

    def _wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()


def to_host(
    drawn: Drawn,
    scored: tuple[ScoredChunk, ...] = (),
    *,
    stream: torch.cuda.Stream | None = None,
) -> Sampled:
    """Start the copies, behind the device's work on the current stream; waits for nothing.

    stream: that the copies go to, so that what is launched next need not wait for them; None: the
    current one.
    """
    device = drawn.ids_S.device
    if device.type == "cpu":
        return Sampled(ids_S=drawn.ids_S, arrived=None, logprobs=drawn.logprobs, scored=scored)
    if stream is None:
        return _copied(drawn, scored)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        return _copied(drawn, scored)


def _copied(drawn: Drawn, scored: tuple[ScoredChunk, ...]) -> Sampled:
    """By the current stream."""
    ids_S, logprobs = _pinned_copy(drawn.ids_S), drawn.logprobs
    if logprobs is not None:
        logprobs = replace(
            logprobs,
            token_G=_pinned_copy(logprobs.token_G),
            top_ids_GK=_pinned_copy(logprobs.top_ids_GK),
            top_GK=_pinned_copy(logprobs.top_GK),
        )
    scored = tuple(
        replace(
            chunk,
            token_P=_pinned_copy(chunk.token_P),
            top_ids_PK=_pinned_copy(chunk.top_ids_PK),
            top_PK=_pinned_copy(chunk.top_PK),
        )
        for chunk in scored
    )
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(drawn.ids_S.device))
    return Sampled(ids_S=ids_S, arrived=arrived, logprobs=logprobs, scored=scored)


def _pinned_copy(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return pinned.copy_(tensor, non_blocking=True)
