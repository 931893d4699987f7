"""Alert rules and dashboard: their syntax, and that every metric in them is one that is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pipeserve.engine.stats import EngineStats, total_stats
from pipeserve.engine.step_figures import StepFigures, Wait
from pipeserve.server.metrics import Metrics
from tests.processes import ROOT

FOLDER = ROOT / "systemd" / "monitoring"
PROMETHEUS_OWN = {"up"}


def alert_rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def dashboard_queries() -> list[str]:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def samples() -> dict[str, set[str]]:
    """Of everything that a daemon with two replicas tells: name -> its labels."""
    figures = StepFigures(
        stage_bubble_s=(1.0,), stage_hand_off_s=(1.0,), waits={"alice": Wait(count=1, sum_s=0.5)}
    )
    one = EngineStats.of_nothing(1)
    stats = total_stats(
        [EngineStats(**{**_fields(one), "num_blocks": 1, "figures": figures}) for _ in range(2)]
    )
    metrics = Metrics()
    metrics.request_refused(429)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render(stats).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _fields(stats: EngineStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in stats.__slots__}


@pytest.mark.parametrize("query", [*(rule["expr"] for rule in alert_rules()), *dashboard_queries()])
def test_every_metric_and_label_is_one_that_is_there(query: str) -> None:
    known = samples()
    names = set(re.findall(r"pipeserve:\w+", query))
    assert names or "up{" in query
    assert names <= set(known), names - set(known)
    labels = set().union(*(known[name] for name in names)) | {"instance", "job", "le"}
    asked = {
        label.strip()
        for labels_asked in re.findall(r"\bby \(([^)]*)\)", query)
        for label in labels_asked.split(",")
    }
    asked |= set(re.findall(r"[{,](\w+)=", query))
    assert asked <= labels, asked - labels


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    queries = " ".join([*dashboard_queries(), *(rule["expr"] for rule in alert_rules())])
    shown = {re.sub("_(total|bucket|sum|count)$", "", name) for name in samples()}
    assert {name for name in shown if name not in queries} == set()


def test_brackets_are_balanced() -> None:
    for query in [*dashboard_queries(), *(rule["expr"] for rule in alert_rules())]:
        for opening, closing in ("()", "[]", "{}"):
            assert query.count(opening) == query.count(closing), query


def test_every_alert_says_how_bad_and_what() -> None:
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+m", rule["for"])


def check_rules(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["promtool", "check", "rules", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    done = check_rules(FOLDER / "alerts.yml")
    assert done.returncode == 0, done.stderr


@needs_promtool
def test_promtool_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    """As recording rules, with what Grafana puts in for its variables."""
    queries = [re.sub(r"\$__\w+", "5m", query) for query in dashboard_queries()]
    rules = [
        {"record": f"panel:{index}", "expr": re.sub(r"\$\w+", "x", query)}
        for index, query in enumerate(queries)
    ]
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = check_rules(path)
    assert done.returncode == 0, done.stderr
    path.write_text(path.read_text().replace("rate(", "rate((", 1))
    assert check_rules(path).returncode != 0
