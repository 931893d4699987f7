"""The pipeline as the engine sees it: same output however the work is cut, facts, ends, faults."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.config import Config
from pipeserve.core.batch import MicroBatch, PipelineFacts, RowStart, StageFailure, StepOutput
from pipeserve.core.loading import LoadEvent, StageProgress
from pipeserve.core.sampling import SamplingParams
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import REFERENCE
from pipeserve.models.registry import check_model
from pipeserve.runtime.devices import resolve_devices
from pipeserve.runtime.pipeline import Pipeline
from pipeserve.runtime.placement import place
from pipeserve.runtime.plan import plan_pipeline
from pipeserve.runtime.sampled import Sampled
from pipeserve.runtime.token_pool import TokenPool
from pipeserve.runtime.transfer import HostTransfer
from tests.models import tiny
from tests.models.agreement import assert_same_output
from tests.runtime.driver import (
    PATIENCE_S,
    Driver,
    Prompt,
    Result,
    Schedule,
    running_driver,
    timings_folder,
)

NUM_TOKENS = 20


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "tiny.gguf"
    return tiny.write_gguf(path, tiny.random_llama(tiny.llama_config()))


def greedy_prompt(index: int, length: int, vocab_size: int, num_tokens: int = NUM_TOKENS) -> Prompt:
    rng = np.random.default_rng([index, length])
    return Prompt(
        token_ids=rng.integers(0, vocab_size, length).tolist(),
        sampling=SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0, num_logprobs=2),
    )


def random_prompt(index: int, length: int, **changes: object) -> Prompt:
    rng = np.random.default_rng([index, length])
    sampling = {"max_tokens": 15 + index, "seed": index, "presence_penalty": 0.5} | changes
    return Prompt(
        token_ids=rng.integers(0, 300, length).tolist(),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
    )


# --- the same output, however the work is cut


@pytest.fixture(scope="module")
def demo_baseline(demo_model_path: Path) -> tuple[list[Prompt], list[Result]]:
    """Three prompts on one stage, one after the other, each in one chunk."""
    prompts = [greedy_prompt(i, length, 49152) for i, length in enumerate((1, 20, 75))]
    with running_driver(demo_model_path, ("cpu",)) as driver:
        schedule = Schedule(chunk_size=128, num_cohorts=1, num_look_ahead=0)
        return prompts, [driver.generate([prompt], schedule)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("num_stages", "block_size", "chunk_size"),
    [
        (1, 16, 128),
        (2, 16, 32),
        (3, 1, 7),
        (30, 5, 16),
        pytest.param(2, 64, 1, marks=pytest.mark.wide),
        pytest.param(4, 16, 13, marks=pytest.mark.wide),
        pytest.param(30, 1, 128, marks=pytest.mark.wide),
    ],
)
def test_demo_output_is_the_same_however_it_is_cut(
    num_stages: int,
    block_size: int,
    chunk_size: int,
    demo_model_path: Path,
    demo_baseline: tuple[list[Prompt], list[Result]],
) -> None:
    prompts, expected = demo_baseline
    schedule = Schedule(chunk_size=chunk_size, num_cohorts=num_stages, seed=num_stages)
    with running_driver(
        demo_model_path, ("cpu",) * num_stages, block_size=block_size, context_length=256
    ) as driver:
        results = driver.generate(prompts, schedule)
    for result, baseline in zip(results, expected, strict=True):
        assert_same_output(result, baseline)


@pytest.mark.parametrize("num_look_ahead", [0, 1])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_tiny_output_is_the_same_alone_and_in_a_crowd(
    num_stages: int, num_look_ahead: int, tiny_path: Path
) -> None:
    prompts = [greedy_prompt(i, 3 + 11 * i, 300) for i in range(4)]
    crowd = [random_prompt(i, 2 + 5 * i) for i in range(9)]
    with running_driver(tiny_path, ("cpu",) * num_stages, block_size=4) as driver:
        schedule = Schedule(num_cohorts=num_stages, num_look_ahead=num_look_ahead, chunk_size=9)
        alone = [driver.generate([prompt], schedule)[0] for prompt in prompts]
        mixed = [*crowd[:5], *prompts, *crowd[5:]]
        for seed in range(3):
            again = Schedule(num_cohorts=num_stages, chunk_size=9 + seed, seed=seed)
            for result, baseline in zip(driver.generate(mixed, again)[5:9], alone, strict=True):
                assert_same_output(result, baseline)


def test_seeded_output_is_the_same_alone_and_in_a_crowd(tiny_path: Path) -> None:
    crowd = [
        random_prompt(0, 9),
        random_prompt(1, 30, top_k=20),
        random_prompt(2, 14, top_p=0.8, temperature=1.4),
        random_prompt(3, 5, min_p=0.05, repetition_penalty=1.3),
        random_prompt(4, 21, frequency_penalty=1.0, logit_bias=((7, 2.0),)),
    ]
    with running_driver(tiny_path, block_size=4) as driver:
        together = driver.generate(crowd, Schedule(chunk_size=11))
        alone = [driver.generate([prompt])[0] for prompt in crowd]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len({tuple(r.token_ids[:10]) for r in together}) == len(crowd)


def test_a_preempted_sequence_goes_on_with_the_same_tokens(tiny_path: Path) -> None:
    whole = random_prompt(3, 12, repetition_penalty=1.2, top_k=50)
    with running_driver(tiny_path, block_size=4) as driver:
        tokens = driver.generate([whole])[0].token_ids
        resumed = Prompt(
            token_ids=[*whole.token_ids, *tokens[:7]],
            sampling=random_prompt(3, 12, repetition_penalty=1.2, top_k=50, max_tokens=11).sampling,
            num_output_tokens=7,
        )
        rest = driver.generate([resumed, random_prompt(1, 4)])[0].token_ids
    assert rest == tokens[7:]


def test_every_stage_reports_its_busy_time(tiny_path: Path) -> None:
    with running_driver(tiny_path, ("cpu",) * 3) as driver:
        driver.generate([greedy_prompt(0, 10, 300)])
    assert (driver.stage_busy_s > 0).all()


# --- what the engine is told, and what is refused


def plan(tiny_path: Path, devices: tuple[str, ...] = ("cpu",), **options: object) -> PipelineFacts:
    with GGUFFile.open(tiny_path) as file:
        model = check_model(file)
        config = Config(**{"cache_dir": timings_folder().name, **options})  # type: ignore[arg-type]
        placement = place(file, model, config, devices)
        return plan_pipeline(model, config, placement.devices, placement.split).facts


BLOCK_BYTES = 2 * 16 * 2 * 8 * 4  # keys and values, 16 tokens, 2 heads of 8, float32


def test_facts_follow_from_options_and_model(tiny_path: Path) -> None:
    facts = plan(
        tiny_path,
        ("cpu", "cpu"),
        kv_cache_bytes=BLOCK_BYTES * 2 * 10 + 5,  # the longer stage has 2 of the 3 layers
        max_num_seqs=7,
        max_num_batched_tokens=33,
        num_look_ahead=0,
    )
    assert facts == PipelineFacts(
        num_stages=2,
        num_rows=7,
        num_blocks=10,
        block_size=16,
        context_length=160,
        max_batch_tokens=33,
        num_look_ahead=0,
        vocab_size=300,
    )


def test_no_more_blocks_than_could_be_in_use(tiny_path: Path) -> None:
    facts = plan(tiny_path, max_num_seqs=3, context_length=40, kv_cache_bytes=10**9)
    assert (facts.num_blocks, facts.context_length) == (9, 40)


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        (("cpu",) * 4, {}, "4 stages, but the model has 3 layers"),
        (("cpu",) * 2, {"layer_split": (3,)}, "layer_split is [3], 1 numbers for 2 devices"),
        (("cpu",) * 2, {"layer_split": (2, 2)}, "4 layers together, but the model has 3"),
        (("cpu",), {"context_length": 257}, "context_length is 257, but the model was trained"),
        (
            ("cpu",),
            {"context_length": 200, "kv_cache_bytes": BLOCK_BYTES * 3 * 12},
            "context_length is 200, but kv_cache_bytes holds 192 tokens",
        ),
        (("cpu",), {"kv_cache_bytes": 100}, "kv_cache_bytes is 100"),
        (
            ("cpu",),
            {"max_num_batched_tokens": 32},
            "max_num_batched_tokens is 32 and max_num_seqs 64",
        ),
        (("gpu0",), {}, "devices names gpu0"),
        (("cuda:99",), {}, "devices names cuda:99"),
        (("cpu:3",), {}, "devices names cpu:3"),
        ((), {}, "devices is empty"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    devices: tuple[str, ...], options: dict[str, object], words: str, tiny_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tiny_path, devices, **options)
    assert words in str(caught.value)


def test_auto_never_takes_more_stages_than_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [device.type for device in resolve_devices(("auto",), num_layers=3)] == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [device.index for device in resolve_devices(("auto",), num_layers=3)] == [0, 1, 2]


def test_each_stage_reports_until_all_bytes_of_its_tensors_are_read(tiny_path: Path) -> None:
    seen: list[LoadEvent] = []
    with GGUFFile.open(tiny_path) as file:
        total = sum(info.num_bytes for info in file.tensors.values())
        pipeline = Pipeline.start(
            file,
            Config(kv_cache_bytes=2**20, cache_dir=timings_folder().name),  # type: ignore[arg-type]
            ("cpu",) * 3,
            post=lambda output: None,
            on_progress=seen.append,
        )
    assert pipeline.close(timeout_s=PATIENCE_S)
    read = [event for event in seen if isinstance(event, StageProgress)]
    by_stage = [[event for event in read if event.stage == stage] for stage in range(3)]
    for events in by_stage:
        num_read = [event.num_read for event in events]
        assert num_read == sorted(num_read)
        assert (events[-1].num_read, events[-1].percent) == (events[-1].num_bytes, 100)
    assert sum(events[-1].num_bytes for events in by_stage) == total


def test_a_stage_touches_its_own_tensors_only(tiny_path: Path) -> None:
    from pipeserve.models.loader import LayerRange, WeightReader
    from pipeserve.models.registry import find_family

    read: list[str] = []
    with GGUFFile.open(tiny_path) as file:
        weights = WeightReader(
            file, device=torch.device("cpu"), backend=REFERENCE, on_read=read.append
        )
        middle = LayerRange(first=1, end=2, num_layers=3)
        decoder = find_family(file).load(check_model(file), middle, weights)
    assert {name.split(".")[1] for name in read} == {"1"}
    assert len(read) == len(set(read)) == 9
    assert decoder.embedding is None and decoder.head is None


# --- stages that fail


class FakeRunner:
    """Samples token 0 for every row, or does what `act` does first."""

    def __init__(self, token_pool: TokenPool, is_last: bool) -> None:
        self.token_pool = token_pool
        self.is_last = is_last
        self.num_steps = 0

    def act(self, batch: MicroBatch) -> None:
        """Nothing."""

    def run(self, batch: MicroBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor | Sampled:
        self.num_steps += 1
        self.act(batch)
        if not self.is_last:
            return torch.zeros(batch.num_tokens, 1)
        ids = torch.zeros(batch.num_rows, dtype=torch.int64)
        self.token_pool.publish(batch.step_id, batch.rows_S, ids)
        return Sampled(
            ids_S=torch.zeros(batch.num_rows, dtype=torch.int32), arrived=None, logprobs=None
        )


class RaisingRunner(FakeRunner):
    def act(self, batch: MicroBatch) -> None:
        raise ValueError("the maths went wrong")


class BlockingRunner(FakeRunner):
    """Blocks until it is let go."""

    def __init__(self, token_pool: TokenPool, is_last: bool) -> None:
        super().__init__(token_pool, is_last)
        self.entered, self.let_go = threading.Event(), threading.Event()

    def act(self, batch: MicroBatch) -> None:
        self.entered.set()
        self.let_go.wait(PATIENCE_S)


Outputs = queue.SimpleQueue[StepOutput | StageFailure]


def fake_pipeline(
    *kinds: type[FakeRunner], threads_per_stage: int = 1
) -> tuple[Pipeline, list[FakeRunner], Outputs]:
    token_pool = TokenPool(num_rows=4, device=torch.device("cpu"), transfer=HostTransfer())
    runners = [kind(token_pool, index == len(kinds) - 1) for index, kind in enumerate(kinds)]
    outputs: Outputs = queue.SimpleQueue()
    pipeline = Pipeline(
        facts=PipelineFacts(
            num_stages=len(kinds),
            num_rows=4,
            num_blocks=8,
            block_size=4,
            context_length=16,
            max_batch_tokens=8,
            num_look_ahead=1,
            vocab_size=10,
        ),
        runners=runners,
        devices=[torch.device("cpu")] * len(kinds),
        transfers=[HostTransfer()] * (len(kinds) - 1),
        token_pool=token_pool,
        threads_per_stage=threads_per_stage,
        post=outputs.put,
    )
    return pipeline, runners, outputs


def step(step_id: int, needs_step: int | None = None) -> MicroBatch:
    one, none = np.ones(1, dtype=np.int32), np.zeros(0, dtype=np.int32)
    return MicroBatch(
        step_id=step_id,
        num_decode_rows=1,
        rows_S=one,
        first_positions_S=one,
        num_tokens_S=one,
        samples_S=np.ones(1, dtype=np.bool_),
        prefill_token_ids=none,
        starts=(),
        block_rows=none,
        block_columns=none,
        block_ids=none,
        needs_step=needs_step,
    )


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_stage_that_raises_is_reported_and_ends_the_others(failing: int) -> None:
    kinds = [RaisingRunner if index == failing else FakeRunner for index in range(3)]
    pipeline, runners, outputs = fake_pipeline(*kinds)
    for step_id in range(4):
        pipeline.submit(step(step_id, needs_step=step_id - 1 if step_id else None))
    failure = outputs.get(timeout=PATIENCE_S)
    assert failure == StageFailure(stage=failing, error="ValueError: the maths went wrong")
    assert pipeline.close(timeout_s=PATIENCE_S)
    assert runners[failing].num_steps == 1
    assert outputs.empty()


def test_a_stage_that_raises_in_the_real_pipeline(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_driver(tiny_path) as driver:
        bad = RowStart(
            row=10**6,
            sampling=SamplingParams(max_tokens=1, seed=0),
            token_ids=np.zeros(1, dtype=np.int32),
            num_prompt_tokens=1,
        )
        batch = step(0)
        driver.pipeline.submit(
            MicroBatch(
                **{name: getattr(batch, name) for name in batch.__slots__} | {"starts": (bad,)}
            )
        )
        failure = driver.outputs.get(timeout=PATIENCE_S)
    assert isinstance(failure, StageFailure)
    assert failure.stage == 1
    assert "IndexError" in failure.error


def test_a_stage_that_blocks_is_named_and_does_not_close() -> None:
    pipeline, runners, outputs = fake_pipeline(FakeRunner, BlockingRunner, FakeRunner)
    blocking = runners[1]
    assert isinstance(blocking, BlockingRunner)
    assert pipeline.describe_stall() == "no stage is computing; all wait for work"
    pipeline.submit(step(0))
    assert blocking.entered.wait(PATIENCE_S)
    assert pipeline.describe_stall().startswith("stage 1 (cpu) has been computing step 0 for ")
    assert not pipeline.close(timeout_s=0.05)
    assert all(stage.thread.daemon for stage in pipeline._stages)
    blocking.let_go.set()
    assert pipeline.close(timeout_s=PATIENCE_S)
    assert outputs.empty()


def test_submit_does_not_wait_for_a_blocked_stage() -> None:
    pipeline, runners, outputs = fake_pipeline(BlockingRunner, FakeRunner)
    blocking = runners[0]
    assert isinstance(blocking, BlockingRunner)
    for step_id in range(50):
        pipeline.submit(step(step_id))
    assert blocking.entered.wait(PATIENCE_S)
    blocking.let_go.set()
    seen = [outputs.get(timeout=PATIENCE_S) for _ in range(50)]
    assert [output.step_id for output in seen if isinstance(output, StepOutput)] == [*range(50)]
    assert pipeline.close(timeout_s=PATIENCE_S)


def test_stages_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2)

    class MeetingRunner(FakeRunner):
        def act(self, batch: MicroBatch) -> None:
            # Stage 0 in step 1 meets stage 1 in step 0: neither could pass alone.
            if batch.step_id == (0 if self.is_last else 1):
                meeting.wait(PATIENCE_S)

    pipeline, _, outputs = fake_pipeline(MeetingRunner, MeetingRunner)
    pipeline.submit(step(0))
    pipeline.submit(step(1))
    seen = [outputs.get(timeout=PATIENCE_S) for _ in range(2)]
    assert [type(output) for output in seen] == [StepOutput, StepOutput]
    assert pipeline.close(timeout_s=PATIENCE_S)


def test_the_first_stage_waits_for_the_tokens_it_reads() -> None:
    pipeline, runners, outputs = fake_pipeline(FakeRunner, BlockingRunner)
    blocking = runners[1]
    assert isinstance(blocking, BlockingRunner)
    pipeline.submit(step(0))
    pipeline.submit(step(1, needs_step=0))
    assert blocking.entered.wait(PATIENCE_S)
    assert runners[0].num_steps == 1
    blocking.let_go.set()
    for _ in range(2):
        assert isinstance(outputs.get(timeout=PATIENCE_S), StepOutput)
    assert runners[0].num_steps == 2
    assert pipeline.close(timeout_s=PATIENCE_S)


def test_closing_wakes_a_first_stage_that_waits_for_tokens() -> None:
    pipeline, runners, _ = fake_pipeline(FakeRunner, FakeRunner)
    pipeline.submit(step(0, needs_step=5))
    assert pipeline.close(timeout_s=PATIENCE_S)
    assert runners[0].num_steps == 0


def test_each_stage_thread_has_its_own_number_of_compute_threads() -> None:
    seen: queue.SimpleQueue[int] = queue.SimpleQueue()

    class CountingRunner(FakeRunner):
        def act(self, batch: MicroBatch) -> None:
            seen.put(torch.get_num_threads())

    here = torch.get_num_threads()
    single, _, _ = fake_pipeline(CountingRunner)
    single.submit(step(0))
    assert seen.get(timeout=PATIENCE_S) == 1
    triple, _, _ = fake_pipeline(CountingRunner, threads_per_stage=3)
    triple.submit(step(0))
    assert seen.get(timeout=PATIENCE_S) == 3
    single.submit(step(1))
    assert seen.get(timeout=PATIENCE_S) == 1
    assert torch.get_num_threads() == here
    assert single.close(timeout_s=PATIENCE_S) and triple.close(timeout_s=PATIENCE_S)


def test_a_driver_is_told_of_a_failure() -> None:
    pipeline, _, outputs = fake_pipeline(FakeRunner, RaisingRunner)
    with pytest.raises(AssertionError, match="StageFailure"):
        Driver(pipeline, outputs).generate([greedy_prompt(0, 3, 10, num_tokens=2)])
    assert pipeline.close(timeout_s=PATIENCE_S)
