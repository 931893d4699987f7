"""Weights that stay quantised: the same logits as from the dequantised ones, on CPU and GPU."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from pipeserve.errors import ModelError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import (
    REFERENCE,
    Activations,
    Backend,
    WeightForm,
    Weights,
    backend_for,
)
from pipeserve.kernels.fp8_reference import Fp8Weight
from pipeserve.kernels.quant_layout import LAYOUTS
from pipeserve.kernels.quant_reference import values_of
from pipeserve.models.layers import (
    AttentionMetadata,
    DecodeMetadata,
    Decoder,
    LayerCache,
    PrefillMetadata,
)
from pipeserve.models.linear import (
    Fp8Linear,
    HalvesGatedLinear,
    PairedGatedLinear,
    QuantLinear,
    QuantLogits,
    planar_weights,
)
from pipeserve.models.loader import (
    LayerRange,
    Rows,
    WeightReader,
    device_bytes,
    fuse_gated,
    make_matrix,
)
from pipeserve.models.registry import check_model, find_family
from tests.models import tiny

CPU = torch.device("cpu")
NUM_TOKENS = 20
PAGE = 16


def write_mixed(path: Path, kind: GGMLQuantizationType, *, tied: bool, num_layers: int = 2) -> Path:
    """Every matrix in one type but attn_v, as in files of mixed types."""
    config = tiny.llama_config(
        num_hidden_layers=num_layers,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=tied,
        initializer_range=0.05,
    )
    rng = np.random.default_rng(1)
    writer = GGUFWriter(path, "llama")
    tiny.write_metadata(writer, config)
    for name, values in tiny.gguf_tensors(tiny.random_llama(config)).items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            used = GGMLQuantizationType.Q8_0 if "attn_v" in name else kind
            writer.add_tensor(name, tiny.random_blocks(values.shape, used, rng), raw_dtype=used)
    return tiny.finish(writer, path)


def load(path: Path, device: torch.device, backend: Backend, *, keeps_quantised: bool) -> Decoder:
    """With matrices planar or dense, whatever the backend would have."""
    form: WeightForm = "planar" if keeps_quantised else "dense"
    return load_as_is(path, device, dataclasses.replace(backend, weight_form=form))


def load_as_is(path: Path, device: torch.device, backend: Backend) -> Decoder:
    """All layers, with matrices in the form that the backend wants."""
    with GGUFFile.open(path) as file:
        config = check_model(file)
        weights = WeightReader(file, device=device, backend=backend, on_read=lambda name: None)
        layers = LayerRange(first=0, end=config.num_layers, num_layers=config.num_layers)
        return find_family(file).load(config, layers, weights)


def run(decoder: Decoder, device: torch.device, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """Logits of the tokens 0, 1, 2, ..., as run_ids."""
    return run_ids(decoder, device, [i % decoder.config.vocab_size for i in range(num_tokens)])


def run_ids(decoder: Decoder, device: torch.device, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits of a prefill of all tokens but one, then of a decode step: [T, V] float32."""
    config, num_tokens = decoder.config, len(token_ids)
    num_blocks = -(-num_tokens // PAGE)
    shape = (num_blocks, PAGE, config.num_kv_heads, config.head_dim)

    def zeros() -> torch.Tensor:
        return torch.zeros(shape, dtype=decoder.backend.dtype, device=device)

    caches = [LayerCache(k_BPKH=zeros(), v_BPKH=zeros()) for _ in decoder.layers]
    ids = torch.tensor(token_ids, device=device)
    table = torch.arange(num_blocks, device=device).unsqueeze(0)
    first = num_tokens - 1
    positions = torch.arange(first, device=device)
    prefill = AttentionMetadata(
        positions_T=positions,
        slots_T=positions,
        decode=None,
        prefill=PrefillMetadata(
            block_table_SB=table,
            starts_S=torch.zeros(1, dtype=torch.int64, device=device),
            first_positions_S=torch.zeros(1, dtype=torch.int64, device=device),
            num_tokens_S=torch.full((1,), first, device=device),
        ),
    )
    last = torch.full((1,), first, device=device)
    decode = AttentionMetadata(
        positions_T=last,
        slots_T=last,
        decode=DecodeMetadata(block_table_SB=table, lengths_S=last + 1),
        prefill=None,
    )
    with torch.inference_mode():
        parts = [
            decoder.logits(decoder.forward(decoder.embed(part), caches, metadata))
            for part, metadata in ((ids[:-1], prefill), (ids[-1:], decode))
        ]
    return torch.cat(parts).cpu()


def mean_kl(ours_TV: torch.Tensor, reference_TV: torch.Tensor) -> float:
    """Mean divergence per token of our distribution from the reference's, in nats."""
    ours, reference = ours_TV.double().log_softmax(-1), reference_TV.double().log_softmax(-1)
    return float((reference.exp() * (reference - ours)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("type_name", LAYOUTS)
def test_planar_weights_give_the_logits_of_the_dequantised_ones(
    type_name: str, tied: bool, tmp_path: Path
) -> None:
    path = write_mixed(tmp_path / "m.gguf", GGMLQuantizationType[type_name], tied=tied)
    planar, plain = (
        run(load(path, CPU, backend_for(CPU), keeps_quantised=keeps), CPU)
        for keeps in (True, False)
    )
    assert plain.std() > 0.1
    torch.testing.assert_close(planar, plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("type_names", "num_features", "form", "is_paired"),
    [
        (("Q4_K", "Q4_K"), 512, "planar", True),
        (("Q4_0", "Q4_0"), 256, "both", True),
        (("Q4_K", "Q6_K"), 512, "planar", False),
        (("Q4_K", "Q4_K"), 320, "planar", False),
        (("Q4_K", "Q4_K"), 512, "dense", False),
    ],
)
@pytest.mark.parametrize("biases", [(None, None), (None, 1.0), (0.5, 1.0)], ids=str)
def test_gate_and_up_are_pairs_where_they_can_be(
    type_names: tuple[str, str],
    num_features: int,
    form: WeightForm,
    is_paired: bool,
    biases: tuple[float | None, float | None],
) -> None:
    """And the same numbers come out of them."""
    rng = np.random.default_rng(0)
    parts = [
        Rows(
            values=torch.from_numpy(
                tiny.random_blocks((num_features, 256), GGMLQuantizationType[name], rng)
            ),
            type_name=name,
        )
        for name in type_names
    ]
    bias_F = torch.randn(num_features)
    wanted_biases = [None if bias is None else bias * bias_F for bias in biases]
    gated = fuse_gated(parts, wanted_biases, REFERENCE, form)
    assert isinstance(gated, PairedGatedLinear if is_paired else HalvesGatedLinear)
    weights = planar_weights(gated)
    assert [weight.is_paired for weight in weights] == [is_paired] * len(weights)
    assert len(weights) == (0 if form == "dense" else len(set(type_names)))
    x = torch.randn(3, 256)
    gate, up = (
        torch.nn.functional.linear(x, make_matrix([part], REFERENCE, "dense"), bias)  # type: ignore[arg-type]
        for part, bias in zip(parts, wanted_biases, strict=True)
    )
    wanted = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(values_of(gated(x, form="values")), wanted, atol=1e-3, rtol=1e-4)
    if form == "both":
        dense = weights[0].dense_NK
        assert dense is not None and torch.equal(dense, REFERENCE.dequantise(weights[0]))


def token_ids(num_tokens: int, vocab_size: int, *, num_runs: int) -> list[list[int]]:
    """Of each run those that follow the one before's."""
    return [
        [(run_index * num_tokens + i) % vocab_size for i in range(num_tokens)]
        for run_index in range(num_runs)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("type_name", "num_tokens"),
    [
        *itertools.product([*LAYOUTS, "F16", "F32"], [6, 40]),
        ("Q4_K", 2),
        ("Q4_K", 250),
        ("Q4_K", 400),
    ],
)
def test_gpu_kernels_stay_close_to_float32(type_name: str, num_tokens: int, tmp_path: Path) -> None:
    """Every matmul regime. The bound is that of int8 activations, which few rows use: a mean KL
    of 5e-3 per token. Of six tokens, the median of nine runs: the attention of some random models
    is so sharp that in one of five a rounding more or less decides (float32 with rounded inputs
    gives 5e-4 to 4e-2 for Q5_K)."""
    path = write_mixed(tmp_path / "m.gguf", GGMLQuantizationType[type_name], tied=False)
    cuda = torch.device("cuda", 0)
    ours = load(path, cuda, backend_for(cuda), keeps_quantised=True)
    plain = load(path, CPU, backend_for(CPU), keeps_quantised=False)
    divergences = [
        mean_kl(run_ids(ours, cuda, ids), run_ids(plain, CPU, ids))
        for ids in token_ids(
            num_tokens, plain.config.vocab_size, num_runs=9 if num_tokens < 9 else 1
        )
    ]
    assert statistics.median(divergences) < 5e-3


def test_both_forms_hold_the_same_values(tmp_path: Path) -> None:
    path = write_mixed(tmp_path / "m.gguf", GGMLQuantizationType.Q4_K, tied=True)
    both = dataclasses.replace(REFERENCE, weight_form="both")
    decoder = load_as_is(path, CPU, both)
    down = decoder.layers[0].down
    assert isinstance(down, QuantLinear) and down.weight.dense_NK is not None
    torch.testing.assert_close(down.weight.dense_NK, REFERENCE.dequantise(down.weight))
    head = decoder.head.output if decoder.head is not None else None
    assert isinstance(head, QuantLogits) and head.weight.dense_NK is None
    with GGUFFile.open(path) as gguf_file:
        info = gguf_file.tensors["blk.0.ffn_down.weight"]
        assert device_bytes(info, both, 2) == down.weight.num_bytes
    plain = run(load(path, CPU, REFERENCE, keeps_quantised=False), CPU)
    torch.testing.assert_close(run(decoder, CPU), plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("type_name", ["Q4_K", "F16", "IQ2_XS"])
def test_e4m3_where_it_costs_least_and_plain_elsewhere(type_name: str, tmp_path: Path) -> None:
    path = write_mixed(
        tmp_path / "m.gguf", GGMLQuantizationType[type_name], tied=False, num_layers=6
    )
    decoder = load_as_is(path, CPU, dataclasses.replace(REFERENCE, weight_form="fp8"))
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer.gate_up, HalvesGatedLinear)
        linears = (layer.output, layer.gate_up.gate_up, layer.down)
        assert {isinstance(linear, Fp8Linear) for linear in linears} == {index in (3, 4)}
        assert not isinstance(layer.qkv, Fp8Linear)
    assert decoder.head is not None and not isinstance(decoder.head.output, Fp8Linear)
    plain = run(load(path, CPU, REFERENCE, keeps_quantised=False), CPU)
    error = (run(decoder, CPU) - plain).norm() / plain.norm()
    assert 0.003 < error < 0.15  # rounded, and to three bits of mantissa


def test_matrices_that_scaled_products_do_not_take_stay_dense(tmp_path: Path) -> None:
    """80 rows and columns are multiples of 16, 72 are not."""
    backend = dataclasses.replace(REFERENCE, weight_form="fp8")
    rows = {size: Rows(values=torch.randn(size, 80), type_name=None) for size in (80, 72)}
    assert isinstance(make_matrix([rows[80]], backend, "fp8"), Fp8Weight)
    assert isinstance(make_matrix([rows[72]], backend, "fp8"), torch.Tensor)
    both = make_matrix([rows[72], rows[72]], backend, "fp8")
    assert isinstance(both, Fp8Weight)
    assert torch.equal(both.codes_NK[:72].view(torch.uint8), both.codes_NK[72:].view(torch.uint8))


@pytest.mark.parametrize("type_name", ["BF16", "F32"])
def test_values_beyond_float16_are_an_error_that_says_what_to_do(
    type_name: str, tmp_path: Path
) -> None:
    model = tiny.random_llama(tiny.llama_config())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = -1e5
    kind = GGMLQuantizationType[type_name]
    tensors = {
        name: gguf.quants.quantize(values, kind) if values.ndim == 2 else values
        for name, values in tiny.gguf_tensors(model).items()
    }
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    tiny.write_metadata(writer, model.config)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind if values.ndim == 2 else None)
    path = tiny.finish(writer, tmp_path / "m.gguf")
    half = dataclasses.replace(REFERENCE, weight_form="planar", dtype=torch.float16)
    words = r"blk\.1\.ffn_down\.weight holds -(99840|100000), .* set weights = \"bf16\""
    with pytest.raises(ModelError, match=words):
        load_as_is(path, CPU, half)
    load_as_is(path, CPU, dataclasses.replace(half, weight_form="fp8", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K", "F16", "BF16", "IQ2_XS"])
@pytest.mark.parametrize(
    ("weights", "activations", "allowed_kl"),
    [("quantised", "f16", 1e-3), ("quantised", "int8", 5e-3), ("bf16", "auto", 5e-3)],
)
def test_every_precision_stays_close_to_float32(
    type_name: str, weights: Weights, activations: Activations, allowed_kl: float, tmp_path: Path
) -> None:
    path = write_mixed(tmp_path / "m.gguf", GGMLQuantizationType[type_name], tied=False)
    cuda = torch.device("cuda", 0)
    backend = backend_for(cuda, weights=weights, activations=activations)
    ours = load_as_is(path, cuda, backend)
    plain = load(path, CPU, REFERENCE, keeps_quantised=False)
    for num_tokens in (2, 9, 300):
        got = run(ours, cuda, num_tokens)
        assert got.dtype == torch.float32
        assert mean_kl(got, run(plain, CPU, num_tokens)) < allowed_kl


def test_the_gguf_package_knows_every_layout() -> None:
    assert {GGMLQuantizationType[name] for name in LAYOUTS} <= set(gguf.quants._type_traits)
