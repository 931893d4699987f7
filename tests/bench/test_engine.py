"""`pipeserve bench engine` on two CPU stages, as a function and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeserve.bench.arrivals import Lengths
from pipeserve.bench.command_engine import BENCH_ENGINE_EPILOG
from pipeserve.bench.engine import Result, measure
from pipeserve.bench.shapes import SHAPES
from pipeserve.bench.synthetic import provide_model, weight_bytes
from pipeserve.bench.tracing import NotTraced
from pipeserve.bench.workload import Batch, Workload, make_workload, missing_options
from pipeserve.cli import main
from pipeserve.config import load_config
from pipeserve.errors import ConfigError

TINY = SHAPES["tiny"]
ONE = Lengths.parse("1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


def measured(
    folder: Path,
    *,
    recipe: str = "q4_k_m",
    prompt: int = 20,
    output: int = 2,
    batches: tuple[int, ...] = (1,),
    num_clients: int | None = None,
    **options: Any,
) -> Result:
    path = provide_model("tiny", TINY, recipe, folder=folder)
    overrides = {"model": str(path), "devices": "cpu,cpu", **options}
    workload = make_workload(
        prompt=Lengths.parse(str(prompt)),
        output=Lengths.parse(str(output)),
        batches=batches,
        num_clients=num_clients,
        num_requests=None,
    )
    return measure(
        load_config(overrides=overrides, environ={}), workload, on_run=lambda figures: None
    )


@pytest.mark.parametrize("recipe", ["q4_k_m", "q3_k", "mxfp4", "bf16"])
def test_a_synthetic_model_generates_on_two_cpu_stages(folder: Path, recipe: str) -> None:
    result = measured(folder, recipe=recipe)
    (run,) = result.runs
    assert result.devices == ("cpu", "cpu")
    assert result.ceilings == ()
    assert run.decode_tokens_per_s is not None
    assert run.decode_tokens_per_s > 0


def test_batches_run_whole_and_one_after_another(folder: Path) -> None:
    result = measured(folder, batches=(1, 3), output=6)
    assert [run.num_sequences for run in result.runs] == [1, 3]
    for run in result.runs:
        generated = run.num_sequences * 6
        assert run.total_tokens_per_s * run.duration_s == pytest.approx(
            20 * run.num_sequences + generated
        )
        assert run.itl_p50_ms is not None
        assert run.itl_p99_ms is not None
        assert 0 < run.ttft_p50_ms <= run.ttft_p99_ms < run.duration_s * 1000
        assert 0 < run.itl_p50_ms <= run.itl_p99_ms
        assert len(run.stage_busy) == 2
        assert all(0 < busy <= 1 for busy in run.stage_busy)
    # The head is tied, so a step reads every tensor; keys and values are float32 on a CPU.
    assert result.costs.weight_bytes == weight_bytes(TINY, "q4_k_m")
    assert result.costs.kv_token_bytes == 8 * 2 * 2 * 64 * 4


def test_costs_follow_the_type_of_the_kv_cache(folder: Path) -> None:
    result = measured(folder, kv_cache_dtype="int8")
    assert result.costs.kv_token_bytes == 8 * 2 * 2 * (64 + 2)


def test_clients_keep_the_engine_busy(folder: Path) -> None:
    (run,) = measured(folder, num_clients=2, output=4).runs
    assert (run.num_concurrent, run.num_sequences) == (2, 8)
    assert run.decode_tokens_per_s is not None
    assert run.full_batch_tokens_per_s is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 2047}, r"prompt and output are 2049 tokens together.*at most 2048"),
        ({"batches": (5,), "max_num_seqs": 4}, r"batch is 5 and max_num_seqs 4"),
        ({"batches": (4,), "kv_cache_bytes": 4 * 16 * 1024 * 4}, r"need 8 KV blocks of 16"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(folder, **options)


def test_rows_grow_with_the_load_unless_they_are_set() -> None:
    def grown(num_clients: int | None, **overrides: int) -> dict[str, int]:
        workload = make_workload(
            prompt=ONE,
            output=ONE,
            batches=(8, 300),
            num_clients=num_clients,
            num_requests=None,
        )
        return missing_options(workload, load_config(overrides=overrides, environ={}))

    assert grown(None) == {"max_num_seqs": 300}
    assert grown(7) == {"max_num_seqs": 64}
    assert grown(None, max_num_seqs=9) == {}


@pytest.mark.parametrize(
    ("num_clients", "num_requests", "message"),
    [(None, 5, "give clients or poisson too"), (4, 7, "requests is 7 and clients 4")],
)
def test_requests_that_make_no_steady_state_are_refused(
    num_clients: int | None, num_requests: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_workload(
            prompt=ONE,
            output=ONE,
            batches=(1,),
            num_clients=num_clients,
            num_requests=num_requests,
        )


COMMAND = ["bench", "engine", "--shape", "tiny", "--devices", "cpu", "--prompt", "8"]


def test_the_command_prints_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--output", "3", "--batch", "1,2", "--json", "--cache-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, *options])
    assert ended.value.code == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["devices"] == ["cpu"]
    assert printed["workload"]["output"]["choices"] == [3]
    assert [run["num_concurrent"] for run in printed["runs"]] == [1, 2]
    assert all(run["decode_tokens_per_s"] > 0 for run in printed["runs"])
    assert all(run["copy_share"] is None for run in printed["runs"]), "there is no card"
    assert [path.name for path in (tmp_path / "synthetic").iterdir()] == ["tiny-q4_k_m.gguf"]


def test_sequences_with_and_without_a_chain_are_told_apart(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", "4", "--batch", "3", "--samplers", "dry:1", "--cache-dir", str(tmp_path)]
    for form in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main([*COMMAND, *options, *form])
        assert ended.value.code == 0
        out = capfd.readouterr().out
        if form:
            (run,) = json.loads(out)["runs"]
            assert 0 < run["itl_p50_ms"] <= run["itl_p99_ms"]
            assert 0 < run["chained_itl_p50_ms"] <= run["chained_itl_p99_ms"]
            assert run["full_batch_tokens_per_s"] is None
        else:
            assert "1 sequences by dry" in out.splitlines()[0]
            assert any(line.startswith("3: ITL ") for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samplers", "dry"], "samplers is 'dry'; give one of dry, xtc"),
        (["--samplers", "dry:2"], "samplers is for 2 sequences of each batch"),
        (["--samplers", "dry:1", "--clients", "2"], "give no clients"),
        (["--samplers", "dry:1", "--record", "runs"], "leave record or samplers out"),
    ],
)
def test_samplers_that_make_no_sense_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, *options, "--cache-dir", str(tmp_path)])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_without_a_card_the_profile_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", "2", "--batch", "1,2", "--profile", "--cache-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, *options])
    assert ended.value.code == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].startswith("loaded in ")
    reason = "at once, not traced: no stage is on a CUDA card"
    assert [line for line in lines if reason in line] == [f"1 {reason}", f"2 {reason}"]


@pytest.mark.gpu
def test_a_steady_decode_on_a_gpu_is_traced(folder: Path) -> None:
    path = provide_model("tiny", TINY, "q4_k_m", folder=folder)
    config = load_config(overrides={"model": str(path), "devices": "cuda:0"}, environ={})
    workload = Workload(
        prompt=Lengths.parse("20"),
        output=Lengths.parse("4"),
        loads=(Batch(num_sequences=2),),
        traced=(2,),
    )
    result = measure(config, workload, on_run=lambda figures: None)
    (profile,) = result.profiles
    if isinstance(profile, NotTraced):
        pytest.skip(profile.reason)
    assert profile.device == "cuda:0"
    assert 0.0 <= profile.wait_share <= profile.idle_share < 1.0
    assert sum(kernel.share for kernel in profile.kernels) == pytest.approx(1.0)
    per_layer = [kernel for kernel in profile.kernels if "decode" in kernel.name]
    assert per_layer, [kernel.name for kernel in profile.kernels]
    # Attention runs once per layer and step; the window's ends may cut a step.
    assert any(abs(kernel.count_per_step - TINY.num_layers) < 1 for kernel in per_layer)


def test_the_command_prints_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, "--output", "1", "--cache-dir", str(tmp_path)])
    assert ended.value.code == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("tiny-q4_k_m.gguf, 0.00 GB, on cpu: 8 prompt + 1 output tokens")
    header = next(index for index, line in enumerate(lines) if line.split()[:1] == ["seqs"])
    assert lines[header + 1].split()[:3] == ["1", "-", "-"], "one token has no decode phase"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "engine"], "one of the arguments --shape --model is required"),
        ([*COMMAND, "--batch", "1,0"], "'0' is not a number above 0"),
        ([*COMMAND, "--batch", "2", "--clients", "2"], "not allowed with argument --batch"),
        ([*COMMAND, "--port", "1"], "unknown argument '--port'"),
        ([*COMMAND, "--promt=4"], "the nearest known is --prompt"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_names_every_shape() -> None:
    assert f"Shapes: {', '.join(SHAPES)}." in " ".join(BENCH_ENGINE_EPILOG.split())


def test_torch_is_loaded_only_when_the_command_runs() -> None:
    script = (
        "import sys\n"
        "from pipeserve.cli import build_parser\n"
        f"build_parser().parse_args({COMMAND!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
