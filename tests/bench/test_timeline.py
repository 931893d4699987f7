"""The timeline: bars of known steps, their window, their shares and their picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from pipeserve.bench import engine, report
from pipeserve.bench.arrivals import Lengths
from pipeserve.bench.shapes import find_shape
from pipeserve.bench.synthetic import provide_model
from pipeserve.bench.timeline import Bar, as_svg, busy_shares, middle
from pipeserve.bench.workload import make_workload
from pipeserve.config import Config

SVG = "{http://www.w3.org/2000/svg}"


def bar(step_id: int, stage: int, start_s: float, end_s: float, rows: int, tokens: int) -> Bar:
    return Bar(
        step_id=step_id,
        stage=stage,
        start_s=start_s,
        end_s=end_s,
        num_decode_rows=rows,
        num_prefill_tokens=tokens,
    )


BARS = [
    bar(0, 0, 10.0, 10.1, 0, 64),
    bar(0, 1, 10.1, 10.2, 0, 64),
    bar(1, 0, 10.1, 10.2, 4, 32),
    bar(1, 1, 10.2, 10.4, 4, 32),
    bar(2, 0, 10.2, 10.3, 4, 0),
]


def test_kinds_and_shares() -> None:
    assert [each.kind for each in BARS] == ["prefill", "prefill", "mixed", "mixed", "decode"]
    assert busy_shares(BARS, 2) == [pytest.approx(0.75), pytest.approx(0.75)]


def test_the_middle_holds_what_touches_it() -> None:
    assert middle(BARS, window_s=0.02) == [
        each for each in BARS if each.end_s > 10.19 and each.start_s < 10.21
    ]
    assert middle(BARS, window_s=10.0) == BARS


def test_every_bar_is_drawn_in_the_lane_of_its_stage() -> None:
    root = ElementTree.fromstring(as_svg(BARS, num_stages=2, title="a < b"))
    drawn = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    assert len(drawn) == len(BARS)
    assert len({rect.get("y") for rect in drawn}) == 2
    (first, *_) = drawn
    title = first.find(f"{SVG}title")
    assert title is not None
    assert title.text == "step 0: 0 decode rows, 64 prefill tokens, 100.00 ms"


def test_a_run_leaves_bars_of_all_its_steps(tmp_path: Path) -> None:
    path = provide_model("tiny", find_shape("tiny"), "q4_k_m", folder=tmp_path)
    workload = make_workload(
        prompt=Lengths.parse("20"),
        output=Lengths.parse("5"),
        batches=(2,),
        num_clients=None,
        num_requests=None,
    )
    config = Config(model=str(path), devices=("cpu", "cpu"), cache_dir=tmp_path)
    result = engine.measure(config, workload, on_run=lambda figures: None)
    steps = {each.step_id for each in result.bars}
    assert len(result.bars) == 2 * len(steps)
    assert sum(each.num_prefill_tokens for each in result.bars) == 2 * 2 * 20
    assert sum(each.num_decode_rows for each in result.bars) == 2 * 2 * 4
    for stage in (0, 1):
        own = [each for each in result.bars if each.stage == stage]
        assert all(one.end_s <= other.start_s for one, other in pairwise(own))
    assert "tiny-q4_k_m.gguf on cpu + cpu" in report.as_svg(result)
    assert "bars" not in report.as_json(result)
