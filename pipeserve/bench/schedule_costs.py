"""Costs of a step on each stage, as straight lines in its work. Pure numbers; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from pipeserve.bench.schedule_run import StepWork
from pipeserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """Seconds of one stage: T = step + row R + prefill token N + KV position K + pair A, and what
    prefill costs for itself where N > 0."""

    step_s: float
    """Whatever is computed: reading the weights, launches."""
    row_s: float
    """Per row that samples."""
    prefill_token_s: float
    kv_position_s: float
    """Per position that a row reads."""
    prefill_pair_s: float = 0.0
    """Per prompt token and position that it attends to: what makes a long prompt's late chunks
    dearer than its first, beyond reading its KV once."""
    prefill_step_s: float = 0.0
    """Of a step with prompt tokens, however few: a GPU dequantises its matrices for those."""

    def time_s(self, work: StepWork) -> float:
        """Of one step."""
        return (
            self.step_s
            + self.row_s * work.num_rows
            + self.prefill_token_s * work.num_prefill_tokens
            + self.kv_position_s * work.num_kv_positions
            + self.prefill_pair_s * work.num_prefill_pairs
            + self.prefill_step_s * (work.num_prefill_tokens > 0)
        )

    def scaled(self, factor: float) -> StageCosts:
        """Everything `factor` times as dear."""
        return stage_costs([factor * each for each in astuple(self)])


def stage_costs(values_s: Sequence[float]) -> StageCosts:
    """From the values in the order of the fields."""
    step_s, row_s, prefill_token_s, kv_position_s, prefill_pair_s, prefill_step_s = values_s
    return StageCosts(
        step_s=step_s,
        row_s=row_s,
        prefill_token_s=prefill_token_s,
        kv_position_s=kv_position_s,
        prefill_pair_s=prefill_pair_s,
        prefill_step_s=prefill_step_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """A pipeline."""

    stages: tuple[StageCosts, ...]
    handoff_s: float
    """From one stage's end to the next one's begin, beside its work; likewise from a submission,
    and from the last stage's ids, to the first stage."""
    host_s: float
    """The engine's time for each step: from its output to the next submission."""


H200_8B = StageCosts(
    step_s=3500e-6,
    row_s=41e-6,
    prefill_token_s=29e-6,
    kv_position_s=0.044e-6,
)
"""All layers of an 8B Llama at Q4_K_M on one H200, from loadtest/README.md: decode of full batches
of 32 and 256 after prompts of 512, attention of 128 sequences, and prefill of 64 prompts."""

HANDOFF_S = 20e-6
"""As runtime.cost_model, which the layers are cut by."""
HOST_S = 300e-6
"""A guess at the engine's time per step; hidden by look-ahead unless steps are shorter."""


def split_costs(
    whole: StageCosts, split: Sequence[int], *, handoff_s: float = HANDOFF_S, host_s: float = HOST_S
) -> CostModel:
    """A model cut into stages with these shares of everything."""
    total = sum(split)
    stages = tuple(whole.scaled(share / total) for share in split)
    return CostModel(stages=stages, handoff_s=handoff_s, host_s=host_s)


def parse_costs(text: str) -> StageCosts:
    """Microseconds of the first four fields of StageCosts in their order, or of five or six.

    Raises:
        ConfigError: anything else.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    is_right = len(values) in (4, 5, 6) and all(0 <= each < float("inf") for each in values)
    if not is_right or not any(values):
        raise ConfigError(
            f"costs is {text!r}; give microseconds per step, row, prefill token and KV position "
            "(and per prefill pair, and per step with prefill), such as 3500,41,29,0.044"
        )
    return stage_costs([each * 1e-6 for each in (*values, 0.0, 0.0)[:6]])
