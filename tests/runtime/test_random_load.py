"""A random load on CPU stages: every token as in float32, whatever ran beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.core.sampling import SamplingParams
from tests.models import tiny
from tests.models.decided import ERROR_PER_SPREAD, FLOAT32, INT8, Precision, decided_tokens
from tests.runtime.load_agreement import Verdict, assert_same_alone, compare
from tests.runtime.random_load import DRAWN, FILTERED, GREEDY, Load, Phase, Served, loaded_engine

NUM_ROWS = 6
BLOCK_SIZE = 4
NUM_BLOCKS = 40
"""Too few for the six sequences that grow together in the last phase."""
LOAD = Load(
    phases=[
        Phase(num_live=3, max_prompt=40),
        Phase(num_live=1, max_prompt=20),
        Phase(num_live=9, max_prompt=8, least_output=36),
    ],
    events_per_phase=40,
    num_tokens=600,
    max_output=40,
    abort_chance=0.01,
)


def test_tokens_under_load_are_those_of_float32(tmp_path: Path) -> None:
    reference = tiny.random_llama(tiny.llama_config())
    path = tiny.write_gguf(tmp_path / "m.gguf", reference)
    kv_bytes = NUM_BLOCKS * 2 * BLOCK_SIZE * 2 * 8 * 4 * 2  # two layers on the larger stage
    with loaded_engine(
        path,
        ("cpu", "cpu"),
        record_every=5,
        max_num_seqs=NUM_ROWS,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=kv_bytes,
        max_num_batched_tokens=24,
    ) as loaded:
        served = loaded.run(LOAD)
        verdicts = compare(served, reference, FLOAT32)
        complete = [verdict for verdict in verdicts if not verdict.served.is_aborted]
        assert_same_alone(loaded, complete[-12:])
        stats = loaded.stats()
        sizes = loaded.watched.sizes
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    assert any(len(verdict.served.admitted_lengths) > 1 for verdict in complete)
    assert any(verdict.served.is_aborted for verdict in verdicts)
    assert any(size.num_decode_rows and size.num_prefill_tokens for size in sizes)
    assert sum(len(verdict.served.token_ids) for verdict in verdicts) >= LOAD.num_tokens
    divergences = [kl for verdict in verdicts for kl in verdict.kl]
    assert len(divergences) > 50
    assert np.mean(divergences) < FLOAT32.mean_kl
    for params in (GREEDY, DRAWN, FILTERED):
        assert share_decided(verdicts, params) > 0.8


def share_decided(verdicts: list[Verdict], params: SamplingParams) -> float:
    """Among tokens sampled by these parameters."""
    kinds = [v.served.sampling for v in verdicts]
    chosen = [
        verdict.decided
        for verdict, kind in zip(verdicts, kinds, strict=True)
        if (kind.temperature, kind.top_k) == (params.temperature, params.top_k)
    ]
    return float(np.concatenate(chosen).mean())


def test_a_wrong_token_is_noticed() -> None:
    reference = tiny.random_llama(tiny.llama_config())
    prompt = (5, 6, 7)
    with torch.inference_mode():
        ids = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 3:].tolist()
    right = Served(seq_id=0, prompt=prompt, sampling=replace(GREEDY, max_tokens=8), token_ids=ids)
    (verdict,) = compare([right], reference, FLOAT32)
    assert verdict.decided[-1]
    with torch.inference_mode():
        top_2 = reference(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, -1].topk(2).values
    right.token_ids[-1] += 1
    with pytest.raises(AssertionError, match="seed=0"):
        compare([right], reference, FLOAT32)
    with pytest.raises(AssertionError, match="seed=0"):
        compare([right], reference, replace(FLOAT32, most_different=1.0))
    # An error of a quarter of the margin does not make it, four times that could.
    error = float(top_2[0] - top_2[1]) / 4
    tail = Precision(mean_kl=(error / ERROR_PER_SPREAD) ** 2 / 2, most_different=1.0)
    (verdict,) = compare([right], reference, tail)
    assert verdict.num_different == 1
    with pytest.raises(AssertionError, match="seed=0"):
        compare([right], reference, replace(tail, most_different=1e-3))


def test_logits_of_dropped_steps_are_left_out() -> None:
    """Preempted at 6 known tokens and again at 8: the first admission kept tokens up to 5."""
    served = Served(
        seq_id=0,
        prompt=(1, 2, 3, 4),
        sampling=replace(GREEDY, max_tokens=9),
        token_ids=[0] * 6,
        admitted_lengths=[4, 6, 8],
    )
    marks = {
        key: torch.tensor(float(number))
        for number, key in enumerate(
            [(0, 4), (0, 5), (0, 6), (1, 6), (1, 7), (1, 8), (2, 8), (2, 9), (2, 10)]
        )
    }
    served.logits.update(marks)
    kept = {index: int(mark) for index, mark in served.final_logits().items()}
    assert kept == {0: 0, 1: 1, 2: 3, 3: 4, 4: 6, 5: 7}


def test_decided_greedy_steps_have_a_margin() -> None:
    margin = 2 * INT8.logit_error
    assert margin == pytest.approx(1.0)
    logits = torch.tensor([[0.0, 3.0, 3.0 - 0.9 * margin], [3.0 - 1.1 * margin, 3.0, 0.0]])
    ids, decided = decided_tokens(logits, GREEDY, 0, INT8.logit_error)
    assert ids.tolist() == [1, 1]
    assert decided.tolist() == [False, True]


@pytest.mark.parametrize("params", [DRAWN, FILTERED], ids=["plain", "top-k"])
def test_no_allowed_error_changes_a_decided_draw(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((400, 12), generator=generator) * 4
    ids, decided = decided_tokens(logits, params, 7, INT8.logit_error)
    assert 0.1 < decided.float().mean() < 0.9
    changed = torch.zeros(400, dtype=torch.bool)
    for _ in range(50):
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        errors = INT8.logit_error * signs
        others, _ = decided_tokens(logits + errors, params, 7, INT8.logit_error)
        changed |= others != ids
    assert not (changed & decided).any()
    assert (changed & ~decided).any()
