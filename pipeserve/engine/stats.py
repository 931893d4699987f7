"""EngineStats: an immutable snapshot of what the engine holds and has done since its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeserve.engine.step_figures import StepFigures, total_figures


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges first, then counters since the start."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_steps: int
    num_prompt_tokens: int
    """Prompt tokens, once per sequence, whether computed or found in the prefix cache."""
    num_generated_tokens: int
    num_preemptions: int
    stage_busy_s: tuple[float, ...]
    """Per stage: seconds spent working; of all replicas, one replica's stages after another's."""
    uptime_s: float
    """Seconds since the engine started; the wall time that stage_busy_s is a share of."""
    figures: StepFigures = field(default_factory=StepFigures)
    num_prefix_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Of them, those that were found."""
    num_replicas: int = 1
    """Equal pipelines of which stage_busy_s lists the stages."""
    num_live_replicas: int = 1
    """Of them, those that take sequences."""

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks

    @property
    def stages_per_replica(self) -> int:
        return len(self.stage_busy_s) // self.num_replicas

    @classmethod
    def of_nothing(cls, num_stages: int) -> EngineStats:
        """Of an engine that does not run and never did anything."""
        return cls(
            num_waiting=0,
            num_running=0,
            num_blocks=0,
            num_free_blocks=0,
            num_steps=0,
            num_prompt_tokens=0,
            num_generated_tokens=0,
            num_preemptions=0,
            stage_busy_s=(0.0,) * num_stages,
            uptime_s=0.0,
            num_live_replicas=0,
        )

    def with_past(self, past: EngineStats) -> EngineStats:
        """These gauges, and the counters of `past`, the same stages' earlier lives, on top."""
        return replace(
            self,
            num_steps=self.num_steps + past.num_steps,
            num_prompt_tokens=self.num_prompt_tokens + past.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens + past.num_generated_tokens,
            num_preemptions=self.num_preemptions + past.num_preemptions,
            num_prefix_queries=self.num_prefix_queries + past.num_prefix_queries,
            num_prefix_hits=self.num_prefix_hits + past.num_prefix_hits,
            stage_busy_s=tuple(
                now_s + past_s
                for now_s, past_s in zip(self.stage_busy_s, past.stage_busy_s, strict=True)
            ),
            uptime_s=self.uptime_s + past.uptime_s,
            figures=self.figures.with_past(past.figures),
        )


def total_stats(replicas: Sequence[EngineStats]) -> EngineStats:
    """Those of all replicas together; the longest uptime counts."""
    return EngineStats(
        num_waiting=sum(each.num_waiting for each in replicas),
        num_running=sum(each.num_running for each in replicas),
        num_blocks=sum(each.num_blocks for each in replicas),
        num_free_blocks=sum(each.num_free_blocks for each in replicas),
        num_steps=sum(each.num_steps for each in replicas),
        num_prompt_tokens=sum(each.num_prompt_tokens for each in replicas),
        num_generated_tokens=sum(each.num_generated_tokens for each in replicas),
        num_preemptions=sum(each.num_preemptions for each in replicas),
        num_prefix_queries=sum(each.num_prefix_queries for each in replicas),
        num_prefix_hits=sum(each.num_prefix_hits for each in replicas),
        stage_busy_s=tuple(busy_s for each in replicas for busy_s in each.stage_busy_s),
        uptime_s=max(each.uptime_s for each in replicas),
        figures=total_figures([each.figures for each in replicas]),
        num_replicas=len(replicas),
        num_live_replicas=sum(each.num_live_replicas for each in replicas),
    )
