"""EngineStats: an immutable snapshot of what the engine holds and has done since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges first, then counters since the start."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_steps: int
    num_prompt_tokens: int
    """Prompt tokens computed, once per sequence (recomputation after preemption not counted)."""
    num_generated_tokens: int
    num_preemptions: int
    stage_busy_s: tuple[float, ...]
    """Per stage: seconds spent working."""
    uptime_s: float
    """Seconds since the engine started; the wall time that stage_busy_s is a share of."""

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks
