"""What crosses between the halves, and between engine and pipeline, survives a process boundary."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from pipeserve.config import Config
from pipeserve.core import batch, layout, loading
from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import (
    GivenTokens,
    LateOutput,
    MicroBatch,
    PromptLogprobs,
    RowStart,
    Span,
    StageFailure,
    StepLogprobs,
    StepMasks,
    StepOutput,
)
from pipeserve.core.constraint import BannedStrings, Grammar
from pipeserve.core.layout import LayoutForecast, LayoutSurvey
from pipeserve.core.loading import LoadNotice, LoadReport, StageProgress
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine import messages
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    Finish,
    FinishReason,
    GetStats,
    GrammarFailed,
    Load,
    Loaded,
    LoadFailed,
    ReplicasChanged,
    SequencesFailed,
    SequenceTimes,
    SetLogLevel,
    Shutdown,
    StageWork,
    StatsReply,
    Submit,
    Surveyed,
    SurveyLayouts,
    TokenEvents,
    TokenLogprobs,
    TraceMark,
)
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import UnsupportedModelError
from tests.fakes import facts

SAMPLING = SamplingParams(
    max_tokens=5, seed=2**63 - 1, logit_bias=((3, -100.0),), num_logprobs=2, stop_token_ids=(0, 2)
)
FORECAST = LayoutForecast(num_replicas=2, output_tokens_per_s=None)
SURVEY = LayoutSurvey(devices=("cuda:0", "cuda:1"), forecasts=(FORECAST,))
IDS = np.array([1, 2, 3], np.int32)
LOGPROBS = StepLogprobs(
    token_S=np.array([-0.5], np.float32),
    top_ids_SK=np.array([[7, 8]], np.int32),
    top_SK=np.array([[-0.5, -np.inf]], np.float32),
)

EXAMPLES: tuple[Any, ...] = (
    Submit(seq_id=1, prompt_token_ids=(1, 2), sampling=SAMPLING),
    Submit(
        seq_id=2, prompt_token_ids=(1,), sampling=SAMPLING, grammar=Grammar(definition="start: A")
    ),
    Submit(
        seq_id=3,
        prompt_token_ids=(1,),
        sampling=SAMPLING,
        banned=BannedStrings(strings=("a", "b"), stop=("c",), shown_token_ids=(7,)),
    ),
    GrammarFailed(seq_id=1, error="too complex"),
    Finish(seq_id=1),
    Abort(seq_id=1),
    GetStats(reply_id=4),
    SetLogLevel(level="debug"),
    Shutdown(),
    SequenceTimes(
        mark=TraceMark(parent="00-1-2-01", choice=0, submitted_s=0.5),
        ended_s=9.0,
        prefill=(StageWork(start_s=1.0, end_s=2.0, busy_s=0.5, num_steps=1),),
    ),
    TokenEvents(
        seq_ids=(1, 2),
        token_ids=(5, 6),
        finish_reasons=(None, FinishReason.STOP),
        logprobs=(
            None,
            TokenLogprobs(logprob=-0.5, top_ids=(6,), top_logprobs=(float("-inf"),)),
        ),
    ),
    StatsReply(
        reply_id=4,
        stats=EngineStats(
            num_waiting=1,
            num_running=2,
            num_blocks=3,
            num_free_blocks=1,
            num_steps=4,
            num_prompt_tokens=5,
            num_generated_tokens=6,
            num_preemptions=0,
            stage_busy_s=(0.5, 0.25),
            uptime_s=9.0,
        ),
    ),
    EngineFailed(error="stage 1 failed", stalled=True),
    SequencesFailed(seq_ids=(1, 2), cause=EngineFailed(error="killed", stalled=False)),
    ReplicasChanged(degradation="1 of 2 replicas takes requests"),
    SurveyLayouts(config=Config(layout="replicas"), model_path=Path("/a/b.gguf")),
    FORECAST,
    SURVEY,
    Surveyed(survey=SURVEY),
    Load(config=Config(devices=("cpu",), processes="two"), model_path=Path("/a/b.gguf")),
    StageProgress(stage=0, num_stages=2, num_read=1, num_bytes=3),
    LoadNotice(text="IQ1_S becomes bf16"),
    LoadReport(text="63 CUDA graphs"),
    Loaded(facts=facts()),
    LoadFailed(error=UnsupportedModelError("b.gguf", "no such architecture")),
    facts(),
    MicroBatch(
        step_id=3,
        num_decode_rows=1,
        rows_S=IDS[:2],
        first_positions_S=np.array([4, 0], np.int32),
        num_tokens_S=np.array([1, 3], np.int32),
        samples_S=np.array([True, False]),
        prefill_token_ids=IDS,
        starts=(RowStart(row=2, sampling=SAMPLING, token_ids=IDS, num_prompt_tokens=2),),
        block_rows=np.array([2], np.int32),
        block_columns=np.array([0], np.int32),
        block_ids=np.array([9], np.int32),
        needs_step=2,
        masks=StepMasks(seqs_M=IDS[:1], words_MW=IDS.reshape(1, 3)),
        late_seqs_L=np.array([0], np.int32),
        given=GivenTokens(rows_G=IDS[:1], ids_G=IDS[1:2]),
    ),
    LateOutput(step_id=3, token_ids=IDS[:1], logprobs=LOGPROBS),
    StepOutput(
        step_id=3,
        token_ids=IDS[:1],
        logprobs=LOGPROBS,
        stage_spans=(Span(start_s=0.1, end_s=0.2),) * 2,
    ),
    PromptLogprobs(
        seq_id=3,
        first=1,
        token_P=np.array([-0.5], np.float32),
        top_ids_PK=np.array([[7]], np.int32),
        top_PK=np.array([[-0.25]], np.float32),
    ),
    Span(start_s=0.1, end_s=0.2),
    StageFailure(stage=1, error="RuntimeError: out of memory"),
)


def same(one: Any, other: Any) -> bool:
    """Equality to the type and the last bit, also where a class compares by identity."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, Exception):
        return same(one.args, other.args) and vars(one) == vars(other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_survives_pickle(message: Any) -> None:
    assert same(pickle.loads(pickle.dumps(message)), message)


def test_every_message_has_an_example() -> None:
    defined = {
        kind
        for module in (messages, batch, loading, layout)
        for _, kind in inspect.getmembers(module, dataclasses.is_dataclass)
    }
    nested = {AdmissionParams, SamplingParams, EngineStats, TokenLogprobs, RowStart, StepLogprobs}
    nested |= {BannedStrings, GivenTokens, Grammar, StageWork, StepMasks, TraceMark}
    assert {type(message) for message in EXAMPLES} == defined - nested
    unions = (messages.FrontMessage, messages.RouterMessage, messages.StartMessage)
    assert {kind for union in unions for kind in get_args(union)} <= defined
