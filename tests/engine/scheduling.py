"""What scheduler tests share: sequences, and stages that are run by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import MicroBatch
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.messages import TokenEvents
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.reserve import MEMORY
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence, SequenceStatus
from tests.fakes import FakeStages, expected_tokens, facts


def sequence(
    seq_id: int,
    num_prompt: int = 4,
    max_tokens: int = 8,
    *,
    prompt: Iterable[int] | None = None,
    num_prompt_logprobs: int | None = None,
    **admission: object,
) -> Sequence:
    """A prompt of its own, unless one is given."""
    own = range(1000 * seq_id, 1000 * seq_id + num_prompt)
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=tuple(own if prompt is None else prompt),
        sampling=SamplingParams(
            max_tokens=max_tokens, seed=seq_id, num_prompt_logprobs=num_prompt_logprobs
        ),
        admission=AdmissionParams(**admission),  # type: ignore[arg-type]
    )


def fill(scheduler: Scheduler, stages: FakeStages) -> list[MicroBatch]:
    """Schedule until the scheduler has no more for the pipeline."""
    batches = []
    while (batch := scheduler.schedule()) is not None:
        stages.submit(batch)
        scheduler.check_integrity()
        batches.append(batch)
    return batches


def run_step(scheduler: Scheduler, stages: FakeStages) -> TokenEvents:
    """Take the oldest step in flight through all stages."""
    for index in range(scheduler.facts.num_stages):
        output = stages.advance(index)
    assert output is not None
    return scheduler.update(output)


def run_until(
    scheduler: Scheduler, stages: FakeStages, holds: Callable[[], bool], *, most: int = 20_000
) -> list[MicroBatch]:
    """Step by step until something holds, or for so many steps."""
    batches: list[MicroBatch] = []
    for _ in range(most):
        if holds():
            return batches
        batches += fill(scheduler, stages)
        assert scheduler.has_steps_in_flight, "nobody can go on"
        run_step(scheduler, stages)
    raise AssertionError(f"not within {most} steps")


def run_all(scheduler: Scheduler, stages: FakeStages) -> list[MicroBatch]:
    """Until every sequence has ended."""
    return run_until(scheduler, stages, lambda: scheduler.num_waiting + scheduler.num_running == 0)


def expect_short_outputs(scheduler: Scheduler) -> None:
    """So that it admits more than it can finish without preemption."""
    for _ in range(MEMORY):
        scheduler.reserve.note_finished(1)


def assert_right(ended: Sequence) -> None:
    """It finished with the tokens that it has alone."""
    assert ended.status is SequenceStatus.FINISHED
    expected = expected_tokens(ended.prompt_token_ids, ended.sampling)
    assert ended.token_ids[ended.num_prompt_tokens :] == expected


def rig(policy: AdmissionPolicy | None = None, **changes: int) -> tuple[Scheduler, FakeStages]:
    """A scheduler and stages that fit it."""
    scheduler = Scheduler(facts(**changes), policy)
    return scheduler, FakeStages(scheduler.facts)
