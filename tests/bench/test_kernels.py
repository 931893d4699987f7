"""The command `bench kernels`: sizes, tables, refusals and tuning; kernels themselves on a GPU."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pipeserve import cli
from pipeserve.bench import command
from pipeserve.bench.ceilings import Ceilings
from pipeserve.bench.kernel_shapes import NAMES, KernelShape, Matrix, kernel_shape
from pipeserve.errors import ConfigError

pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")

from pipeserve.bench import (
    kernel_attention,
    kernel_products,
    kernel_small,
    kernel_tuning,
    kernels,
)
from pipeserve.bench.kernel_times import KernelTime, Work, as_json, num_sets, table_lines
from pipeserve.kernels.quant_layout import LAYOUTS
from pipeserve.kernels.quant_mma_tiling import shared_bytes
from pipeserve.kernels.quant_products import QuantProducts
from pipeserve.kernels.quant_tuned import TunedTable, tuned_table
from pipeserve.kernels.quant_ways import Dequantise, Gemm, Gemv

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CEILINGS = Ceilings(device="cuda:0", name="Card", copy_bytes_per_s=1e12, matmul_flops_per_s=100e12)


def test_matrices_of_models() -> None:
    """8B at Q4_K_M has 32 layers of which half hold v and down in Q6_K; a step reads each once."""
    matrices = kernel_shape("llama-8b").matrices
    sizes = {(m.name, m.num_rows, m.num_columns, m.type_name): m.per_step for m in matrices}
    assert sizes[("gate_up", 28_672, 4096, "Q4_K")] == 32
    assert sizes[("qkv", 6144, 4096, "Q4_K")] + sizes[("qk", 5120, 4096, "Q4_K")] == 32
    assert sizes[("head", 128_256, 4096, "Q6_K")] == 1
    weights = sum(m.num_rows * m.num_columns * (m.per_step or 0) for m in matrices)
    assert 7.4e9 < weights < 7.6e9, "8.0e9 less the embedding"
    weights = sum(
        m.num_rows * m.num_columns * (m.per_step or 48 * 128)
        for m in kernel_shape("qwen3-30b-a3b").matrices
        if (m.name, m.type_name) != ("expert_down", "Q6_K")
    )
    assert 30e9 < weights < 30.6e9, "30.5e9 less the embedding and norms"


def test_limits_are_of_what_takes_longer() -> None:
    assert Work(num_bytes=2e6, flops=1e6).limit_us(CEILINGS) == pytest.approx(2.0)
    assert Work(num_bytes=1, flops=3e9).limit_us(CEILINGS) == pytest.approx(30.0)
    assert num_sets(10**9) == 1 and num_sets(10**8) == 4 and num_sets(1) == 128


def test_the_table_and_the_json_hold_what_was_measured() -> None:
    times = [
        KernelTime(
            group=group, model="m", kernel="k", size="8 rows", us=50.0, limit_us=20.0, note="n"
        )
        for group in ("norms", "norms", "rotary")
    ]
    text = "\n".join(table_lines(times))
    assert text.count("norms, m") == 1 and text.count("rotary, m") == 1
    assert text.count("40%  n") == 3
    content = json.loads(as_json(CEILINGS, times))
    assert content["ceilings"]["name"] == "Card"
    assert content["times"][0]["share"] == pytest.approx(0.4)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "kernels", *arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--only", "norms,matrices"), "no kernels called matrices; known: products, decode"),
        (("--model-shape", "gpt-2"), "shape gpt-2 are not known; known: llama-8b"),
    ],
)
def test_unknown_names_are_refused(
    arguments: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "keep_kernels_in", lambda folder: None)
    assert run(*arguments, "--cache-dir", str(tmp_path)) == 1
    assert complaint in capsys.readouterr().err


def test_arguments_reach_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def note(**options: object) -> int:
        seen.update(options)
        return 0

    monkeypatch.setattr(kernels, "run", note)
    monkeypatch.setattr(command, "keep_kernels_in", lambda folder: None)
    assert run("--only", "norms, rotary", "--tune", "--cache-dir", str(tmp_path)) == 0
    assert seen == {
        "only": ("norms", "rotary"),
        "model_shapes": (),
        "tuned_folder": tmp_path / "tuned",
        "wants_json": False,
        "wants_tuning": True,
    }


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        kernels.run(
            only=(), model_shapes=NAMES, tuned_folder=tmp_path, wants_json=False, wants_tuning=False
        )


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("num_tokens", kernel_tuning.BATCH_ROWS)
def test_candidates_fit_the_card(type_name: str, num_tokens: int) -> None:
    layout = LAYOUTS[type_name]
    tilings = list(kernel_tuning.mma_tilings(layout, 4096, 4096, num_tokens, 132))
    assert len(tilings) == len(set(tilings)) >= 2
    for tiling in tilings:
        assert shared_bytes(layout, tiling.variant) * tiling.variant.blocks_at_once < 228 * 1024
        assert tiling.variant.block_t >= min(num_tokens, 128)
    ways = list(kernel_tuning.gemm_ways(layout, num_tokens, 101_376))
    assert len(ways) >= 3


TINY = KernelShape(
    name="tiny",
    hidden_size=256,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    ffn_size=256,
    vocab_size=512,
    matrices=(Matrix(name="output", num_rows=8, num_columns=256, type_name="Q4_K", per_step=1),),
)


def test_every_group_makes_calls_that_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One call of each kernel, in place of a timed graph."""

    def run_first(calls: Sequence[Callable[[], object]]) -> float:
        calls[0]()
        return 2.0

    for module in (kernel_attention, kernel_products, kernel_small):
        monkeypatch.setattr(module, "time_us", run_first)
        monkeypatch.setattr(module, "num_sets", lambda num_bytes, **limits: 1)
    monkeypatch.setattr(kernel_attention, "DECODE_SIZES", ((2, 32),))
    monkeypatch.setattr(kernel_attention, "PREFILL_SIZES", ((2, 16),))
    monkeypatch.setattr(kernel_small, "TOKENS", (2,))
    monkeypatch.setattr(kernel_products, "ROWS", (1, 8, 300))
    monkeypatch.setattr(kernel_products, "STEP_ROWS", (1, 8))
    times = [
        time for group in kernels.OTHER_GROUPS.values() for time in group(TINY, CEILINGS, DEVICE)
    ]
    assert {time.group for time in times} == set(kernels.OTHER_GROUPS)
    assert len({(time.group, time.kernel) for time in times}) == len(times) >= 15
    products = QuantProducts(TunedTable())
    times += kernel_products.time_products(TINY, CEILINGS, products, DEVICE)
    assert all(time.us == 2.0 and 0 < time.limit_us for time in times)
    (step,) = (time for time in times if (time.kernel, time.size) == ("all of a step", "8 rows"))
    (own,) = (time for time in times if (time.note, time.size) == ("gemm", "8 rows"))
    assert step.limit_us == own.limit_us, "one matrix, once per step"


@pytest.fixture
def small_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates on made-up times: each is slower than the one before it."""
    clock = itertools.count(10)
    monkeypatch.setattr(kernel_tuning, "time_us", lambda calls: float(next(clock)))
    monkeypatch.setattr(kernel_tuning, "FEW_ROWS", (1,))
    monkeypatch.setattr(kernel_tuning, "BATCH_ROWS", (8, 64))
    monkeypatch.setattr(kernel_tuning, "_LAUNCH_SHAPES", ((1, 32),))
    monkeypatch.setattr(kernel_tuning, "gemm_ways", lambda *arguments: iter(()))
    monkeypatch.setattr(kernel_tuning, "copies_beyond_cache", lambda weight: [weight])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Small Card")


@pytest.mark.usefixtures("small_tuning")
def test_tuning_writes_a_table_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    path = kernel_tuning.tune([TINY], DEVICE, tmp_path, report=lines.append)
    assert path == tmp_path / "small-card.json" and list(tmp_path.iterdir()) == [path]
    table = tuned_table("Small Card", tmp_path)
    key = ("Q4_K", 8, 256)
    assert table.batch_way(key, 8) == table.batch_way(key, 64) == Gemm()
    assert table.few_rows_way(key, 1) == Gemv(), "its own choice was the fastest"
    assert "100% of the tuned speed on average, 100% at least" in lines[-1]
    second = KernelShape(
        **{field: getattr(TINY, field) for field in KernelShape.__slots__ if field != "matrices"},
        matrices=(Matrix(name="v", num_rows=4, num_columns=256, type_name="Q4_K", per_step=1),),
    )
    monkeypatch.setattr(kernel_tuning, "FEW_ROWS", ())
    kernel_tuning.tune([second], DEVICE, tmp_path, report=lines.append)
    assert set(tuned_table("Small Card", tmp_path).products) == {key, ("Q4_K", 4, 256)}


@pytest.mark.usefixtures("small_tuning")
def test_wrong_ways_are_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule's way gives nonsense; the matrix written out is what is left."""
    multiply = kernel_tuning.multiply
    monkeypatch.setattr(
        kernel_tuning,
        "multiply",
        lambda way, *arguments: multiply(way, *arguments) * (1 + isinstance(way, Gemm)),
    )
    monkeypatch.setattr(kernel_tuning, "FEW_ROWS", ())
    monkeypatch.setattr(kernel_tuning, "BATCH_ROWS", (64,))
    lines: list[str] = []
    kernel_tuning.tune([TINY], DEVICE, tmp_path, report=lines.append)
    table = tuned_table("Small Card", tmp_path)
    assert table.batch_way(("Q4_K", 8, 256), 64) == Dequantise()
    assert "1 WRONG" in lines[-2]


def test_tuning_keeps_the_rule_unless_another_gains() -> None:
    def best(rule_us: float) -> object:
        return kernel_tuning.Trial(
            key=("Q4_K", 8, 256),
            num_tokens=8,
            rule=Gemm(),
            times_us={Gemm(): rule_us, Dequantise(): 10.0},
            num_wrong=0,
        ).best

    assert best(10.2) == Gemm() and best(10.4) == Dequantise()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "tuned").write_text("")
    with pytest.raises(ConfigError, match=r"tuned: File exists; set cache_dir"):
        kernel_tuning.tune([TINY], DEVICE, tmp_path / "tuned", report=print)


@pytest.mark.gpu
def test_small_kernels_and_tiny_products_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "kernel_shape", lambda name: TINY)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device: CEILINGS)
    only = ("products", "norms", "rotary", "swiglu")
    status = kernels.run(
        only=only, model_shapes=("tiny",), tuned_folder=tmp_path, wants_json=True,
        wants_tuning=False,
    )  # fmt: skip
    assert status == 0
    times = json.loads(capsys.readouterr().out)["times"]
    assert {time["group"] for time in times} == set(only)
    assert all(time["us"] > 0 for time in times)


@pytest.mark.gpu
def test_tuning_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_tuning, "FEW_ROWS", (1,))
    monkeypatch.setattr(kernel_tuning, "BATCH_ROWS", (64,))
    lines: list[str] = []
    device = torch.device("cuda", torch.cuda.current_device())
    kernel_tuning.tune([TINY], device, tmp_path, report=lines.append)
    assert not any("WRONG" in line for line in lines)
    table = tuned_table(torch.cuda.get_device_name(device), tmp_path)
    assert table.batch_way(("Q4_K", 8, 256), 64) is not None
