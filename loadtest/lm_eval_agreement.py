"""lm-evaluation-harness through the API and on transformers' own model: the same scores?

Runs in the environment of `make lm-eval`. Starts a daemon with the demo model on CPU stages, has
the harness ask it through local-completions and local-chat-completions, then has it compute the
same tasks with transformers on the dequantised weights of the same file, and compares both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import lm_eval
from daemons import running_daemon, wait_ready
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from pipeserve.config import default_cache_dir
from pipeserve.hub import resolve_model

ITEMS = json.loads(Path(__file__).with_name("lm_eval_items.json").read_text())
MOST_DIFFERENCE = 0.01
"""Of log-likelihoods of whole texts, in nats."""

_GENERATE: Mapping[str, Any] = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
    "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}]}],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
        }
    ],
}
TASKS: Mapping[str, Mapping[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "generate": {**_GENERATE, "doc_to_text": "{{question}}"},
    "chat": {**_GENERATE, "doc_to_text": "Complete in one word or two: {{question}}"},
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
}

Json = dict[str, Any]


def task(name: str) -> Json:
    items = ITEMS["generate" if name == "chat" else name]

    def read(**_: object) -> datasets.DatasetDict:
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(items)})

    return {"task": name, "custom_dataset": read, "test_split": "test", **TASKS[name]}


def evaluate(model: LM, names: Sequence[str], *, is_chat: bool = False) -> Json:
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task(name) for name in names],
        apply_chat_template=is_chat,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return dict(found)


@contextmanager
def recorded(path: str, requests: list[Json]) -> Iterator[None]:
    """Notes what the harness sends there."""
    kinds = {"/v1/completions": LocalCompletionsAPI, "/v1/chat/completions": LocalChatCompletion}
    kind = kinds[path]
    create = kind._create_payload

    def note(self: LM, messages: Any, *args: Any, **fields: Any) -> Json:
        body = create(self, messages, *args, **fields)
        requests.append({"path": path, "body": body})
        return dict(body)

    kind._create_payload = note
    try:
        yield
    finally:
        kind._create_payload = create


def through_the_api(url: str, requests: list[Json]) -> Json:
    common = {"model": "demo", "num_concurrent": 4, "max_retries": 1}
    with recorded("/v1/completions", requests):
        plain = LocalCompletionsAPI(base_url=f"{url}/v1/completions", **common)
        found = evaluate(plain, ["choice", "generate", "text"])
    with recorded("/v1/chat/completions", requests):
        chat = LocalChatCompletion(
            base_url=f"{url}/v1/chat/completions", eos_string="<|im_end|>", **common
        )
        found_in_chat = evaluate(chat, ["chat"], is_chat=True)
    return _joined(found, found_in_chat)


def directly(model_path: Path) -> Json:
    model = HFLM(
        pretrained=str(model_path.parent),
        gguf_file=model_path.name,
        device="cpu",
        dtype="float32",
        max_length=2047,
    )
    found = evaluate(model, ["choice", "generate", "text"])
    return _joined(found, evaluate(model, ["chat"], is_chat=True))


def _joined(*parts: Json) -> Json:
    return {
        kind: {name: each for part in parts for name, each in part[kind].items()}
        for kind in ("results", "samples")
    }


def differences(ours: Json, theirs: Json) -> tuple[float, int]:
    """Largest difference of log-likelihoods, and how many texts or greedy flags differ."""
    largest, num_different = 0.0, 0
    for name in TASKS:
        pairs = zip(ours["samples"][name], theirs["samples"][name], strict=True)
        for mine, other in pairs:
            for one, two in zip(_answers(mine), _answers(other), strict=True):
                if isinstance(one, float):
                    largest = max(largest, abs(one - two))
                else:
                    num_different += one != two
    return largest, num_different


def _answers(sample: Json) -> list[Any]:
    flat: list[Any] = []
    for answers in sample["resps"]:
        for answer in answers:
            flat += answer if isinstance(answer, tuple | list) else [answer]
    return flat


def table(ours: Json, theirs: Json) -> str:
    lines = ["| task | metric | through the API | transformers |", "|---|---|---|---|"]
    for name in TASKS:
        for metric, value in ours["results"][name].items():
            if "," in metric and "stderr" not in metric:
                other = theirs["results"][name][metric]
                label = metric.partition(",")[0]
                lines.append(f"| {name} | {label} | {value:.6f} | {other:.6f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="write what the harness sends to this file")
    arguments = parser.parse_args()
    requests: list[Json] = []
    with tempfile.NamedTemporaryFile() as log:
        options = ["--model", "demo", "--devices", "cpu,cpu"]
        with running_daemon(["-m", "pipeserve"], options, log) as daemon:
            ours = through_the_api(asyncio.run(wait_ready(daemon, log)), requests)
    model_path = resolve_model("demo", cache_dir=default_cache_dir())
    theirs = directly(model_path)
    largest, num_different = differences(ours, theirs)
    print(table(ours, theirs))
    print(f"{len(requests)} requests; log-likelihoods differ by {largest:.6f} at most;")
    print(f"{num_different} generated texts or greedy flags differ")
    if arguments.record is not None:
        lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in requests)
        arguments.record.write_text(f"[\n{lines}\n]\n")
    return int(largest > MOST_DIFFERENCE or num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
