"""Recorded runs as JSON lines: written by `bench engine --record`, read by `bench schedule`.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeserve.bench.arrivals import Request, Trace
from pipeserve.bench.recording import Recording, Step
from pipeserve.bench.schedule_run import Run, StepWork, TimedStep
from pipeserve.core.batch import PipelineFacts, Span
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.errors import ConfigError

_DIGITS = 7  # of seconds: tenths of a microsecond


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One run of a real pipeline."""

    about: str
    """Model, devices and load, for people."""
    facts: PipelineFacts
    run: Run
    policy: AdmissionPolicy = field(default_factory=AdmissionPolicy)
    """What the options said."""


def make_run(recording: Recording, steps: Sequence[TimedStep]) -> Run:
    """The run that has just been recorded; steps of an earlier one are left out."""
    began_s = min(recording.submitted_s.values())
    places = {seq_id: place for place, seq_id in enumerate(recording.requests)}
    requests = tuple(recording.requests.values())
    return Run(
        trace=Trace(requests=requests, num_clients=recording.num_clients),
        num_stages=len(steps[0].spans),
        submitted_s={place: request.arrival_s for place, request in enumerate(requests)},
        steps=[step.since(began_s) for step in steps if step.submitted_s >= began_s],
        tokens=[
            Step(
                time_s=step.time_s - began_s,
                seq_ids=tuple(places[seq_id] for seq_id in step.seq_ids),
            )
            for step in recording.steps
        ],
    )


def check_record(path: Path) -> None:
    """Raise ConfigError unless lines can be appended to the file; makes it where it is not."""
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(f"cannot write the record {path}: {error.strerror}") from None


def append_run(path: Path, recorded: RecordedRun) -> None:
    """Write a run's lines at the end of the file: one of kind "run", then those of its requests,
    steps and tokens."""
    with path.open("a", encoding="utf-8") as file:
        for line in _lines(recorded):
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def _lines(recorded: RecordedRun) -> Iterator[dict[str, Any]]:
    run = recorded.run
    yield {
        "kind": "run",
        "about": recorded.about,
        "facts": asdict(recorded.facts),
        "policy": asdict(recorded.policy),
        "num_clients": run.trace.num_clients,
    }
    for seq_id, request in enumerate(run.trace.requests):
        yield {
            "kind": "request",
            "arrival_s": round(run.submitted_s[seq_id], _DIGITS),
            "prompt_tokens": request.num_prompt_tokens,
            "output_tokens": request.num_output_tokens,
        }
    for step in run.steps:
        yield {
            "kind": "step",
            "step_id": step.step_id,
            **asdict(step.work),
            "submitted_s": round(step.submitted_s, _DIGITS),
            "spans_s": [
                [round(span.start_s, _DIGITS), round(span.end_s, _DIGITS)] for span in step.spans
            ],
        }
    for step_tokens in run.tokens:
        yield {
            "kind": "tokens",
            "time_s": round(step_tokens.time_s, _DIGITS),
            "seq_ids": step_tokens.seq_ids,
        }


def read_runs(path: Path) -> tuple[RecordedRun, ...]:
    """All runs of a file.

    Raises:
        ConfigError: the file cannot be read or is no such record.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return tuple(_parse_run(lines) for lines in _split_runs(map(json.loads, file)))
    except OSError as error:
        raise ConfigError(f"cannot read the record {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a record of this version ({error!r}); write one with "
            "pipeserve bench engine --record"
        ) from None


def _split_runs(lines: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    runs: list[list[dict[str, Any]]] = []
    for line in lines:
        if line["kind"] == "run":
            runs.append([])
        elif not runs:
            raise ValueError("its first line begins no run")
        runs[-1].append(line)
    if not runs:
        raise ValueError("it is empty")
    return runs


def _parse_run(lines: list[dict[str, Any]]) -> RecordedRun:
    head, *rest = lines
    requests = [line for line in rest if line["kind"] == "request"]
    facts = PipelineFacts(**head["facts"])
    trace = Trace(requests=tuple(map(_parse_request, requests)), num_clients=head["num_clients"])
    run = Run(
        trace=trace,
        num_stages=facts.num_stages,
        submitted_s={seq_id: line["arrival_s"] for seq_id, line in enumerate(requests)},
        steps=[_parse_step(line) for line in rest if line["kind"] == "step"],
        tokens=[
            Step(time_s=line["time_s"], seq_ids=tuple(line["seq_ids"]))
            for line in rest
            if line["kind"] == "tokens"
        ],
    )
    told = {seq_id for step in run.tokens for seq_id in step.seq_ids}
    if not requests or told != set(run.submitted_s):
        raise ValueError("of a run some requests or their tokens are missing")
    policy = AdmissionPolicy(**head.get("policy", {}))
    return RecordedRun(about=head["about"], facts=facts, run=run, policy=policy)


def _parse_request(line: dict[str, Any]) -> Request:
    return Request(
        arrival_s=line["arrival_s"],
        num_prompt_tokens=line["prompt_tokens"],
        num_output_tokens=line["output_tokens"],
    )


def _parse_step(line: dict[str, Any]) -> TimedStep:
    return TimedStep(
        step_id=line["step_id"],
        work=StepWork(
            num_decode_rows=line["num_decode_rows"],
            num_rows=line["num_rows"],
            num_prefill_tokens=line["num_prefill_tokens"],
            num_kv_positions=line["num_kv_positions"],
            num_prefill_pairs=line["num_prefill_pairs"],
        ),
        submitted_s=line["submitted_s"],
        spans=tuple(Span(start_s=start_s, end_s=end_s) for start_s, end_s in line["spans_s"]),
    )
