"""Loading: what cards are refused and why, what is said beforehand, and bytes that are counted."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from pipeserve.config import Config
from pipeserve.core.loading import LoadEvent, LoadNotice, StageProgress
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import REFERENCE, Weights, backend_for
from pipeserve.kernels.quant_layout import PlanarWeight
from pipeserve.models.linear import QuantLinear
from pipeserve.models.loader import LayerRange
from pipeserve.models.registry import check_model
from pipeserve.runtime import loading
from tests.models.test_quantised import write_mixed

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
WHOLE = (LayerRange(first=0, end=2, num_layers=2),)
HALVES = (
    LayerRange(first=0, end=1, num_layers=2),
    LayerRange(first=1, end=2, num_layers=2),
)


@pytest.fixture
def four_bits(tmp_path: Path) -> Path:
    return write_mixed(tmp_path / "m.gguf", GGMLQuantizationType.Q4_K, tied=True)


@pytest.fixture(autouse=True)
def with_triton() -> None:
    """Imported within tests only: it reads TRITON_INTERPRET when it is."""
    pytest.importorskip("triton", reason="Triton is a development dependency; it is not installed")


def pretend_card(
    patch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (9, 0), free: int = 2**34
) -> None:
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "Small Card")
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**34))


def test_a_card_without_8_bit_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_card(monkeypatch, capability=(8, 6))
    words = r'cuda:0 \(Small Card\) has 8\.6: set weights to "quantised" or "bf16"'
    with pytest.raises(ConfigError, match=words):
        loading.stage_backend(CARD, Config(weights="fp8"))
    assert loading.stage_backend(CARD, Config(weights="bf16")).dtype == torch.bfloat16
    assert loading.stage_backend(CPU, Config(weights="fp8")).dtype == torch.float32
    pretend_card(monkeypatch, capability=(8, 9))
    assert loading.stage_backend(CARD, Config(weights="fp8")).weight_form == "fp8"


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    four_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_card(monkeypatch, free=1000)
    events: list[LoadEvent] = []
    with GGUFFile.open(four_bits) as file:
        for weights, mend in (
            ("quantised", "list more devices"),
            ("bf16", 'weights = "quantised"'),
        ):
            with pytest.raises(ConfigError, match=r"take 0\.00 GiB, but 0\.00 of its 16\.00") as e:
                loading.load_decoders(
                    file,
                    check_model(file),
                    WHOLE,
                    devices=[CARD],
                    config=Config(weights=weights),  # type: ignore[arg-type]
                    on_progress=events.append,
                )
            assert mend in str(e.value)
    assert not events


def test_stages_of_one_card_must_fit_together(
    four_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(four_bits) as file:
        model = check_model(file)
        config = Config()
        shares = loading.plan_shares(file, model, HALVES, devices=[CARD, CARD], config=config)
        each = [share.device_bytes for share in shares]
        pretend_card(monkeypatch, free=max(each) + 1)
        with pytest.raises(ConfigError, match="the weights of cuda:0 take"):
            loading.load_decoders(
                file, model, HALVES, devices=[CARD, CARD], config=config,
                on_progress=lambda event: None,
            )  # fmt: skip
        names = [{info.name for info in share.tensors} for share in shares]
    # A tied embedding is on both ends.
    assert names[0] & names[1] == {"token_embd.weight"}
    assert {name for name in names[1] if name.startswith("blk.")} == {
        name.replace("blk.0.", "blk.1.") for name in names[0] if name.startswith("blk.")
    }


def test_a_type_without_a_kernel_is_told_once_with_its_cost(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "m.gguf", GGMLQuantizationType.IQ2_XS, tied=False)
    with GGUFFile.open(path) as file:
        model = check_model(file)
        shares = loading.plan_shares(file, model, HALVES, devices=[CPU, CPU], config=Config())
        in_file = sum(i.num_bytes for i in file.tensors.values() if i.type.name == "IQ2_XS")

    def texts(weights: Weights) -> list[str]:
        backend = backend_for(CARD, weights=weights)
        on_card = [dataclasses.replace(s, device=CARD, backend=backend) for s in shares]
        return loading.notices(on_card, Config(weights=weights))

    (text,) = texts("quantised")
    assert "type IQ2_XS have no kernel and are held as float16" in text
    assert f"instead of {in_file:,}, 6.9 times as many" in text
    assert texts("fp8") == []


def test_cpu_stages_say_that_they_take_no_other_precision(four_bits: Path) -> None:
    events: list[LoadEvent] = []
    with GGUFFile.open(four_bits) as file:
        loading.load_decoders(
            file,
            check_model(file),
            HALVES,
            devices=[CPU, CPU],
            config=Config(weights="fp8"),
            on_progress=events.append,
        )
    first, *rest = events
    assert isinstance(first, LoadNotice)
    assert first.text == 'weights is "fp8", but CPU stages always compute in float32'
    assert {event.stage for event in rest if isinstance(event, StageProgress)} == {0, 1}


def test_kernels_are_prepared_and_what_is_in_the_way_is_told_once(
    four_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix that stays quantised but the embedding, which is also the head here: that in
    float32."""
    prepared: list[str] = []
    in_float32: list[str] = []

    def prepare(weights: Sequence[PlanarWeight], wide: Sequence[PlanarWeight]) -> str:
        for names, some in ((prepared, weights), (in_float32, wide)):
            names.extend(f"{weight.num_rows}x{weight.num_columns}" for weight in some)
        return "no compiler"

    backend = dataclasses.replace(REFERENCE, weight_form="planar", prepare=prepare)
    monkeypatch.setattr(loading, "stage_backend", lambda device, config: backend)
    events: list[LoadEvent] = []
    with GGUFFile.open(four_bits) as file:
        model = check_model(file)
        decoders = loading.load_decoders(
            file, model, HALVES, devices=[CPU, CPU], config=Config(), on_progress=events.append
        )
    assert [event.text for event in events if isinstance(event, LoadNotice)] == ["no compiler"]
    down = decoders[0].layers[0].down
    assert isinstance(down, QuantLinear)
    assert prepared.count(f"{down.weight.num_rows}x{down.weight.num_columns}") == 2
    head = f"{model.vocab_size}x{model.hidden_size}"
    assert head not in prepared and in_float32 == [head]


def test_an_unusable_table_of_tuned_choices_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config(cache_dir=tmp_path)
    assert loading.stage_backend(CARD, config).weight_form == "planar"
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "small-card.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tuned/small-card\.json: .* delete the file"):
        loading.stage_backend(CARD, config)


def test_progress_counts_each_tensor_once() -> None:
    assert StageProgress(stage=0, num_stages=1, num_read=1, num_bytes=3).percent == 33
    assert StageProgress(stage=0, num_stages=1, num_read=0, num_bytes=0).percent == 0


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["quantised", "bf16", "fp8"])
def test_what_a_card_holds_is_what_was_counted(weights: str, tmp_path: Path) -> None:
    """And what was freed again is free for the KV cache."""
    path = write_mixed(tmp_path / "m.gguf", GGMLQuantizationType.Q4_K, tied=False)
    config = Config(weights=weights)  # type: ignore[arg-type]
    with GGUFFile.open(path) as file:
        model = check_model(file)
        gc.collect()  # of other tests
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(CARD)
        decoders = loading.load_decoders(
            file, model, WHOLE, devices=[CARD], config=config, on_progress=lambda event: None
        )
        shares = loading.plan_shares(file, model, WHOLE, devices=[CARD], config=config)
    held = torch.cuda.memory_allocated(CARD) - before
    num_tensors = sum(len(share.tensors) for share in shares)
    # The allocator rounds each of a matrix's up to four parts up to 512 bytes.
    assert shares[0].device_bytes <= held <= shares[0].device_bytes + num_tensors * 4 * 512
    assert decoders[0].head is not None
