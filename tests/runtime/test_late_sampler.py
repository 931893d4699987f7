"""Late rows on the device: the tokens of rows in the step, whatever runs beside them; ends, faults.

On a GPU also under CUDA graphs, whose logits are written over by the next step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeserve.core.batch import (
    IntArray,
    LateOutput,
    MicroBatch,
    RowStart,
    StageFailure,
    StepOutput,
)
from pipeserve.core.sampling import SamplingParams
from pipeserve.kernels.sampling_backend import sampling_backend_for
from pipeserve.runtime.chain_sampler import ChainSampler
from pipeserve.runtime.collector import make_output
from pipeserve.runtime.devices import stage_stream
from pipeserve.runtime.late_sampler import LateSampler
from pipeserve.runtime.late_thread import LateThread
from pipeserve.runtime.link import Handoff
from pipeserve.runtime.model_runner import ModelRunner
from pipeserve.runtime.prompt_scorer import ScoredChunk
from pipeserve.runtime.sampled import Sampled, to_host
from pipeserve.runtime.sampler import Sampler
from tests.models import tiny
from tests.runtime.driver import Prompt, Schedule, running_driver
from tests.runtime.test_chain_sampler import CHAINS, MIROSTAT, VOCAB_SIZE, masks_of, start
from tests.runtime.test_sampler import PARAMETERS, params

PATIENCE_S = 60.0
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
MIX: list[dict[str, object]] = [
    each
    for index, chain in enumerate([*CHAINS.values(), MIROSTAT])
    for each in (chain, list(PARAMETERS.values())[index % len(PARAMETERS)])
]
NUM_STEPS = 24

Posted = queue.SimpleQueue[StepOutput | LateOutput | StageFailure]


def sampling_of(row: int, seed: int) -> SamplingParams:
    return params(seed=seed, num_logprobs=row % 4 if row % 3 else None, **MIX[row])


def make_sampler(device: torch.device) -> Sampler:
    return Sampler(
        num_rows=len(MIX),
        vocab_size=VOCAB_SIZE,
        device=device,
        backend=sampling_backend_for(device),
    )


def running_thread(device: torch.device, posted: Posted) -> LateThread:
    thread = LateThread(stage=0, device=device, num_threads=1)
    thread.begin(post=posted.put, on_failure=lambda: None)
    return thread


def step_batch(step: int, rows: list[int], *, may_be_late: bool, seed: int = 0) -> MicroBatch:
    """Rows that sample, each in its own place; in every fourth step some under a mask."""
    is_late = [MIX[row].get("chain") is not None for row in rows]
    masked = {at: list(range(at, at + 90)) for at in range(len(rows)) if at % 3 == 0}
    none = np.zeros(0, dtype=np.int32)
    starts = tuple(start(row, sampling_of(row, seed + row), seq_id=seed + row) for row in rows)
    late = np.flatnonzero(is_late).astype(np.int32)
    return MicroBatch(
        step_id=step,
        num_decode_rows=len(rows),
        rows_S=np.array(rows, dtype=np.int32),
        first_positions_S=np.full(len(rows), 8 + step % NUM_STEPS, dtype=np.int32),
        num_tokens_S=np.ones(len(rows), dtype=np.int32),
        samples_S=np.ones(len(rows), dtype=np.bool_),
        prefill_token_ids=none,
        starts=starts if step % NUM_STEPS == 0 else (),
        block_rows=none,
        block_columns=none,
        block_ids=none,
        needs_step=None,
        masks=masks_of(masked) if step % 4 == 3 else None,
        late_seqs_L=late if may_be_late and len(late) else None,
    )


def logits_of(step: int, num_rows: int) -> Tensor:
    logits_SV = torch.randn((num_rows, VOCAB_SIZE), generator=torch.Generator().manual_seed(step))
    logits_SV[:, 5:12] += 3.5
    return logits_SV


Tokens = dict[tuple[int, int], tuple[int, list[float]]]
"""By step and row: the id, and the log-probabilities that were asked for."""


def note(tokens: Tokens, rows: IntArray, output: StepOutput | LateOutput) -> None:
    for at, (row, token_id) in enumerate(
        zip(rows.tolist(), output.token_ids.tolist(), strict=True)
    ):
        count = sampling_of(row, 0).num_logprobs
        values: list[float] = []
        if count is not None:
            assert output.logprobs is not None
            top = output.logprobs.top_SK[at, :count].tolist()
            values = [float(output.logprobs.token_S[at]), *top]
        tokens[output.step_id, row] = token_id, values


def output_of(batch: MicroBatch, sampled: Sampled) -> StepOutput:
    return make_output(Handoff(batch=batch, hidden_TD=None, spans=()), sampled)


def steps() -> list[MicroBatch]:
    """Of two generations of rows: all together, those without a chain, and those with."""
    everyone = list(range(len(MIX)))
    chained = [row for row in everyone if MIX[row].get("chain") is not None]
    plain = [row for row in everyone if row not in chained]
    kinds = [everyone, everyone, chained, chained, plain, everyone]
    made = []
    for step in range(2 * NUM_STEPS):
        rows = everyone if step % NUM_STEPS == 0 else kinds[step % len(kinds)]
        is_late = rows is everyone or step % 5 == 0
        made.append(step_batch(step, rows, may_be_late=is_late, seed=step // NUM_STEPS * 100))
    return made


def in_step(batches: list[MicroBatch], device: torch.device) -> Tokens:
    """The tokens of a sampler that samples all in the step."""
    tokens: Tokens = {}
    sampler = make_sampler(device)
    for batch in batches:
        for each in batch.starts:
            sampler.start(each)
        logits_SV = logits_of(batch.step_id, batch.num_rows).to(device)
        whole = replace(batch, late_seqs_L=None)
        sampled = to_host(sampler.sample_step(logits_SV, whole))
        note(tokens, batch.sampled_rows, output_of(whole, sampled))
    return tokens


@pytest.mark.parametrize("device_name", DEVICES)
def test_the_same_tokens_as_in_the_step(device_name: str) -> None:
    """The logits are written over, and the host runs ahead as far as it can."""
    device = torch.device(device_name)
    batches = steps()
    all_logits = [logits_of(batch.step_id, batch.num_rows).to(device) for batch in batches]
    buffer_SV = torch.zeros((len(MIX), VOCAB_SIZE), device=device)
    posted: Posted = queue.SimpleQueue()
    thread = running_thread(device, posted)
    sampler = LateSampler(make_sampler=partial(make_sampler, device), thread=thread)
    stream = stage_stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    sent: list[Sampled] = []
    with torch.cuda.stream(stream), torch.inference_mode():  # type: ignore[arg-type]
        for batch, logits_SV in zip(batches, all_logits, strict=True):
            for each in batch.starts:
                sampler.start(each)
            shown_SV = buffer_SV[: batch.num_rows].copy_(logits_SV)
            sent.append(to_host(sampler.sample_step(shown_SV, batch)))
            buffer_SV.fill_(float("nan"))
    tokens: Tokens = {}
    for batch, sampled in zip(batches, sent, strict=True):
        late_L = np.zeros(0, np.int32) if batch.late_seqs_L is None else batch.late_seqs_L
        note(tokens, np.delete(batch.sampled_rows, late_L), output_of(batch, sampled))
        if batch.late_seqs_L is not None:
            late = posted.get(timeout=PATIENCE_S)
            assert isinstance(late, LateOutput) and late.step_id == batch.step_id, late
            note(tokens, batch.sampled_rows[late_L], late)
    thread.close()
    thread.thread.join(PATIENCE_S)
    assert not thread.thread.is_alive()
    assert posted.empty()
    assert tokens == in_step(batches, device)


# --- in a whole pipeline


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("late") / "tiny.gguf"
    return tiny.write_gguf(path, tiny.random_llama(tiny.llama_config()))


def mixed_prompts(vocab_size: int, num_tokens: int) -> list[Prompt]:
    """Of both kinds in either half of the rows, the even and the odd ones."""
    rng = np.random.default_rng(3)
    pairs = [MIX[first : first + 2] for first in range(0, len(MIX), 2)]
    mixed = [each for at, pair in enumerate(pairs) for each in (pair if at % 2 else pair[::-1])]
    return [
        Prompt(
            token_ids=rng.integers(0, vocab_size, 3 + row).tolist(),
            sampling=params(seed=row, **{**changes, "logit_bias": (), "max_tokens": num_tokens}),
        )
        for row, changes in enumerate(mixed)
    ]


@contextmanager
def recorded_logits(logits: dict[tuple[int, int], Tensor]) -> Iterator[None]:
    """By row and position, on the device: the host waits for nothing."""
    sample = ModelRunner._sample

    def recording(
        self: ModelRunner,
        sampler: Sampler | LateSampler,
        batch: MicroBatch,
        logits_SV: Tensor,
        scored: tuple[ScoredChunk, ...],
    ) -> Sampled:
        places = zip(batch.sampled_rows.tolist(), batch.sampled_positions.tolist(), strict=True)
        logits.update(zip(places, logits_SV.clone(), strict=True))
        return sample(self, sampler, batch, logits_SV, scored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "_sample", recording)
        yield


def drawn_alone(
    prompt: Prompt, row: int, logits: dict[tuple[int, int], Tensor], device: torch.device
) -> list[int]:
    """What a sampler draws in the step from the logits that a pipeline had for this row."""
    first, count = len(prompt.token_ids), prompt.sampling.max_tokens
    ids = np.array(prompt.token_ids, dtype=np.int32)
    alone = Sampler(
        num_rows=1,
        vocab_size=len(logits[row, first]),
        device=device,
        backend=sampling_backend_for(device),
    )
    alone.start(RowStart(row=0, sampling=prompt.sampling, token_ids=ids, num_prompt_tokens=first))
    tokens = []
    for position in range(first, first + count):
        drawn = alone.sample(
            logits[row, position][None],
            np.zeros(1, dtype=np.int32),
            np.array([position], dtype=np.int32),
        )
        tokens += drawn.ids_S.tolist()
    return tokens


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("device_name", DEVICES)
def test_a_pipeline_draws_what_its_logits_say(
    device_name: str, num_stages: int, tiny_path: Path, request: pytest.FixtureRequest
) -> None:
    """On a GPU with the demo model, whose steps are replayed from graphs."""
    device, path = torch.device(device_name), tiny_path
    if device.type == "cuda":
        path = request.getfixturevalue("demo_model_path")
    logits: dict[tuple[int, int], Tensor] = {}
    with running_driver(
        path, (device_name,) * num_stages, samples_late=True, max_num_seqs=40
    ) as driver:
        facts = driver.pipeline.facts
        prompts = mixed_prompts(min(facts.vocab_size, 300), 16)
        schedule = Schedule(num_cohorts=num_stages, chunk_size=64)
        with recorded_logits(logits):
            results = driver.generate(prompts, schedule)
        assert driver.num_late > 2 * len(prompts) // 3, "not their first tokens alone"
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        row = facts.num_rows - 1 - index
        assert result.token_ids == drawn_alone(prompt, row, logits, device), prompt.sampling


# --- ends and faults


def test_a_fault_is_reported_and_nobody_waits_for_the_rest() -> None:
    posted: Posted = queue.SimpleQueue()
    thread, ended = LateThread(stage=2, device=CPU, num_threads=1), threading.Event()
    thread.begin(post=posted.put, on_failure=ended.set)

    def fail() -> None:
        raise ValueError("the maths went wrong")

    thread.add(fail)
    thread.add(lambda: None)
    failure = posted.get(timeout=PATIENCE_S)
    assert failure == StageFailure(stage=2, error="ValueError: the maths went wrong")
    assert ended.wait(PATIENCE_S)
    thread.do_at_once(lambda: None)
    thread.thread.join(PATIENCE_S)
    assert not thread.thread.is_alive()


def test_what_was_added_before_closing_is_done() -> None:
    posted: Posted = queue.SimpleQueue()
    thread, go_on = running_thread(CPU, posted), threading.Event()
    one = LateOutput(step_id=7, token_ids=np.zeros(1, np.int32), logprobs=None)

    def work() -> LateOutput:
        go_on.wait(PATIENCE_S)
        return one

    thread.add(work)
    thread.add(lambda: one)
    thread.close()
    go_on.set()
    thread.thread.join(PATIENCE_S)
    assert [posted.get_nowait() for _ in range(2)] == [one, one]
    assert posted.empty()
    thread.do_at_once(lambda: posted.put(one))
    assert posted.get_nowait() is one


def test_a_pipeline_ends_with_its_late_sampler(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ChainSampler, *rest: object) -> None:
        raise ValueError("the maths went wrong")

    monkeypatch.setattr(ChainSampler, "sample", fail)
    with running_driver(tiny_path, samples_late=True) as driver:
        with pytest.raises(AssertionError, match="stage=1, error='ValueError: the maths"):
            driver.generate([*mixed_prompts(300, 4)[:2]])
        for stage in driver.pipeline._stages:
            stage.thread.join(PATIENCE_S)
            assert not stage.thread.is_alive()


def test_a_late_sampler_that_hangs_is_named(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    sample = ChainSampler.sample

    def hang(self: ChainSampler, *rest: Any) -> None:
        entered.set()
        go_on.wait(PATIENCE_S)
        sample(self, *rest)

    monkeypatch.setattr(ChainSampler, "sample", hang)
    with running_driver(tiny_path, samples_late=True) as driver:
        running = threading.Thread(target=driver.generate, args=(mixed_prompts(300, 4)[:2],))
        running.start()
        assert entered.wait(PATIENCE_S)
        while "chain of samplers have been sampled for" not in driver.pipeline.describe_stall():
            assert running.is_alive()
        go_on.set()
        running.join(PATIENCE_S)
        assert not running.is_alive()
