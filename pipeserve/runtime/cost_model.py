"""Cost model: how long stages take for micro-batches, from the measured times of their parts.

Pure numbers; knows neither torch nor files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128
"""The sequence that cuts are made for, 4 tokens of prompt to 1 of output: between a chat, whose
history is sent anew with every turn, and the summary of a document; and what is benchmarked."""

HANDOFF_S = 20e-6
"""Of hidden states to the next stage, beside its work: peer copies of 8 to 512 KB take 12 to 18
microseconds between two H200, threads of a CPU wake each other in about the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds at a few sizes, smallest first."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, size: float) -> float:
        """Straight lines between the sizes, level below the smallest, in proportion above the
        largest."""
        index = bisect_left(self.sizes, size)
        if index == 0:
            return self.seconds[0]
        if index == len(self.sizes):
            return self.seconds[-1] * size / self.sizes[-1]
        (low, high), (least, most) = (
            values[index - 1 : index + 1] for values in (self.sizes, self.seconds)
        )
        return least + (most - least) * (size - low) / (high - low)

    def scaled(self, factor: float) -> Curve:
        """Every time `factor` times as long."""
        return Curve(sizes=self.sizes, seconds=tuple(factor * each for each in self.seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Of one layer of a kind."""

    decode: Curve
    """By rows."""
    prefill: Curve
    """By tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """What was measured on one device."""

    layers: Mapping[str, LayerTimes]
    """By kind of layer."""
    head: Curve
    """Final norm, output head and sampling, by rows that sample."""
    spared: Curve
    """What the model's last layer takes less than others of its kind, by prompt tokens: its
    feed-forward is computed for sampled tokens alone."""
    step_s: float
    """Of a step whatever it has to compute."""

    def scaled(self, factor: float) -> DeviceTimes:
        """Those of a device that takes `factor` times as long for everything."""
        return DeviceTimes(
            layers={
                kind: LayerTimes(
                    decode=times.decode.scaled(factor), prefill=times.prefill.scaled(factor)
                )
                for kind, times in self.layers.items()
            },
            head=self.head.scaled(factor),
            spared=self.spared.scaled(factor),
            step_s=self.step_s * factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """The work that a cut is made for: all rows decode while prompts of others come in."""

    rows: int
    """Of one stage's decode step: those of one cohort."""
    chunk_tokens: int
    """Prompt tokens in one step."""
    prompt_per_output: float = PROMPT_TOKENS / OUTPUT_TOKENS

    def per_output_token_s(self, decode_s: float, prefill_s: float) -> float:
        """Time per output token of something that takes decode_s for a decode step of all rows and
        prefill_s for a chunk: decode_s / rows + prefill_s / chunk_tokens * prompt_per_output."""
        return decode_s / self.rows + prefill_s / self.chunk_tokens * self.prompt_per_output

    def layer_s(self, times: LayerTimes) -> float:
        """One layer's, per output token."""
        return self.per_output_token_s(
            times.decode.at(self.rows), times.prefill.at(self.chunk_tokens)
        )

    def head_s(self, times: DeviceTimes) -> float:
        """The head's, per output token: each passes it once, prompt tokens do not, and it spares
        them a part of the last layer, so that it may be negative."""
        return self.per_output_token_s(
            times.head.at(self.rows), -times.spared.at(self.chunk_tokens)
        )

    def step_s(self, times: DeviceTimes) -> float:
        """What steps take without their layers, per output token."""
        return self.per_output_token_s(times.step_s, times.step_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """One stage of a cut."""

    times: DeviceTimes
    kinds: Sequence[str]
    """Of its layers."""
    has_head: bool

    def decode_s(self, rows: float) -> float:
        """Of a step in which so many rows decode."""
        layers_s = sum(self.times.layers[kind].decode.at(rows) for kind in self.kinds)
        return self.times.step_s + layers_s + (self.times.head.at(rows) if self.has_head else 0.0)

    def prefill_s(self, num_tokens: float) -> float:
        """Of a step that computes so many prompt tokens and samples nothing."""
        layers_s = sum(self.times.layers[kind].prefill.at(num_tokens) for kind in self.kinds)
        spared_s = self.times.spared.at(num_tokens) if self.has_head else 0.0
        return self.times.step_s + layers_s - spared_s


def decode_tokens_per_s(stages: Sequence[StageTimes], num_sequences: int) -> float:
    """Of so many decoding sequences together.

    They form as many cohorts as there are stages, or as they are. In one cycle each cohort passes
    through all stages (which takes the sum of their times) and each stage computes every cohort
    (as many times its own): the longer of the two is the cycle's time, and brings a token each.
    """
    num_cohorts = min(len(stages), num_sequences)
    steps_s = [stage.decode_s(num_sequences / num_cohorts) for stage in stages]
    # From the last stage, ids travel back to the first.
    handoffs_s = HANDOFF_S * len(stages) if len(stages) > 1 else 0.0
    return num_sequences / max(sum(steps_s) + handoffs_s, num_cohorts * max(steps_s))


def prefill_tokens_per_s(stages: Sequence[StageTimes], chunk_tokens: int) -> float:
    """Of prompts whose chunks follow each other through the stages: at the slowest one's pace."""
    return chunk_tokens / max(stage.prefill_s(chunk_tokens) for stage in stages)
