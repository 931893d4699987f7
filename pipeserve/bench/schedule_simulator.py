"""Simulator: a trace through a policy and a pipeline of known costs, in virtual time.

Pure and deterministic: no clock, no thread. Since every stage works through its steps in order,
all of a step's times are known when it is submitted.
"""

from __future__ import annotations

import heapq
from collections import deque

from pipeserve.bench.arrivals import Trace
from pipeserve.bench.recording import Step
from pipeserve.bench.schedule_costs import CostModel
from pipeserve.bench.schedule_policy import PlannedStep, SimulatedPolicy
from pipeserve.bench.schedule_run import Run, TimedStep
from pipeserve.core.batch import Span


def simulate(trace: Trace, policy: SimulatedPolicy, costs: CostModel) -> Run:
    """Until the last request has ended."""
    simulation = _Simulation(trace, policy, costs)
    simulation.run()
    return Run(
        trace=trace,
        num_stages=len(costs.stages),
        submitted_s=simulation.submitted_s,
        steps=simulation.steps,
        tokens=simulation.tokens,
    )


class _Stages:
    """When each stage is free, and when the ids of each step are there for the first one."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._free_s = [0.0] * len(costs.stages)
        self._ids_s: dict[int, float] = {}

    def run(self, planned: PlannedStep, submitted_s: float) -> TimedStep:
        """One step; in the order of submission."""
        handoff_s = self._costs.handoff_s
        arrival_s = submitted_s + handoff_s
        if planned.needs_step is not None:
            arrival_s = max(arrival_s, self._ids_s[planned.needs_step])
        spans = []
        for stage, costs in enumerate(self._costs.stages):
            start_s = max(arrival_s, self._free_s[stage])
            end_s = start_s + costs.time_s(planned.work)
            spans.append(Span(start_s=start_s, end_s=end_s))
            self._free_s[stage] = end_s
            arrival_s = end_s + handoff_s
        # A single stage keeps its ids.
        self._ids_s[planned.step_id] = arrival_s if len(spans) > 1 else spans[-1].end_s
        return TimedStep(
            step_id=planned.step_id,
            work=planned.work,
            submitted_s=submitted_s,
            spans=tuple(spans),
        )


class _Simulation:
    """The engine's loop: take in all that has happened, then submit all that fits."""

    def __init__(self, trace: Trace, policy: SimulatedPolicy, costs: CostModel) -> None:
        self._trace = trace
        self._policy = policy
        self._costs = costs
        self._stages = _Stages(costs)
        num_first = trace.num_first
        is_open = trace.num_clients is None
        first = [request.arrival_s if is_open else 0.0 for request in trace.requests[:num_first]]
        self._arrivals = [(at_s, seq_id) for seq_id, at_s in enumerate(first)]
        heapq.heapify(self._arrivals)
        self._next_seq_id = num_first
        self._num_ended = 0
        self._outputs: deque[float] = deque()  # when each step in flight comes back, in order
        self.submitted_s: dict[int, float] = {}
        self.steps: list[TimedStep] = []
        self.tokens: list[Step] = []

    def run(self) -> None:
        now_s = 0.0
        while self._arrivals or self._outputs:
            now_s = max(now_s, self._next_event_s())
            self._policy.tell_time(now_s)
            now_s = self._take_in(now_s)
            while (planned := self._policy.schedule()) is not None:
                step = self._stages.run(planned, now_s)
                self.steps.append(step)
                self._outputs.append(step.spans[-1].end_s)
        assert self._num_ended == len(self._trace.requests), "every request has ended"

    def _next_event_s(self) -> float:
        heads_s = [*self._outputs][:1] + [at_s for at_s, _ in self._arrivals[:1]]
        return min(heads_s)

    def _take_in(self, now_s: float) -> float:
        """All that has happened by now_s, which moves on by the engine's own work."""
        while (self._arrivals or self._outputs) and self._next_event_s() <= now_s:
            at_s = self._next_event_s()
            if self._outputs and self._outputs[0] == at_s:
                self._outputs.popleft()
                now_s += self._costs.host_s
                self._take_tokens(now_s)
            else:
                _, seq_id = heapq.heappop(self._arrivals)
                self.submitted_s[seq_id] = at_s
                self._policy.add(seq_id, self._trace.requests[seq_id])
        return now_s

    def _take_tokens(self, now_s: float) -> None:
        sampled = self._policy.complete(self.steps[len(self.tokens)].spans)
        self.tokens.append(Step(time_s=now_s, seq_ids=sampled.seq_ids))
        self._num_ended += len(sampled.ended)
        for _ in sampled.ended:
            if self._next_seq_id < len(self._trace.requests):
                heapq.heappush(self._arrivals, (now_s, self._next_seq_id))
                self._next_seq_id += 1
