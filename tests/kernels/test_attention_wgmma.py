"""Hopper's prefill attention: all of it on the CPU, threads as fibres, and on such a card."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_cases import AttentionCase, PagedCache, paged_cache

pytest.importorskip("triton", reason="Triton is a development dependency on the CPU")

import triton

from pipeserve.kernels import reference
from pipeserve.kernels.attention_prefill import paged_attention_prefill
from pipeserve.kernels.attention_wgmma import (
    ARCH,
    MAX_SHARED_BYTES,
    Boxes,
    Heads,
    heads_of,
    position_boxes,
    prefill_wgmma,
    query_boxes,
    shared_bytes,
    source_on,
    takes_wgmma,
    wgmma_source,
)
from pipeserve.kernels.nvrtc import compile_with_log, nvrtc_library
from pipeserve.kernels.quant_mma import has_mma

SCALE = 0.15
LOG2_E = 1.4426950408889634
MAP_BYTES = 64
"""Of a tensor map of attention_wgmma_host.cpp."""
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is computed: chunks (first position, tokens), heads and types."""

    chunks: tuple[tuple[int, int], ...]
    case: Mapping[str, object] = field(default_factory=dict)

    def inputs(self, device: torch.device) -> Inputs:
        case = AttentionCase(
            **{"num_heads": 8, "head_dim": 128, "kv": torch.float16, **self.case}  # type: ignore[arg-type]
        )
        ends = [first + num_tokens for first, num_tokens in self.chunks]
        cache = paged_cache(case, num_seqs=len(ends), length=max(ends), device=device)
        hide(cache, ends)
        firsts, counts = zip(*self.chunks, strict=True)
        num_tokens_S = torch.tensor(counts, dtype=case.index, device=device)
        q_TNH = torch.randn(sum(counts) + 2, case.num_heads, case.head_dim)
        return Inputs(
            q_TNH=q_TNH.to(device, case.kv),
            cache=cache,
            starts_S=num_tokens_S.cumsum(0, dtype=case.index) - num_tokens_S,
            first_positions_S=torch.tensor(firsts, dtype=case.index, device=device),
            num_tokens_S=num_tokens_S,
            tolerance=case.tolerance["atol"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Queries end in two rows of no chunk."""

    q_TNH: Tensor
    cache: PagedCache
    starts_S: Tensor
    first_positions_S: Tensor
    num_tokens_S: Tensor
    tolerance: float

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table_SB = self.cache.block_table_SB
        return table_SB, self.starts_S, self.first_positions_S, self.num_tokens_S

    def check(self, out_TNH: Tensor) -> None:
        """out_TNH was full of 7 before."""
        caches = (self.cache.k_BPKH.nan_to_num(), self.cache.v_BPKH.nan_to_num())
        table_SB, _, firsts_S, num_tokens_S = self.indices
        expected = reference.paged_attention_prefill(
            self.q_TNH, *caches, table_SB, firsts_S, num_tokens_S, SCALE
        )
        torch.testing.assert_close(
            out_TNH[:-2], expected[:-2], atol=self.tolerance, rtol=self.tolerance
        )
        assert bool((out_TNH[-2:] == 7.0).all()), "rows of no chunk stay unwritten"


def hide(cache: PagedCache, ends: list[int]) -> None:
    """No number where no token is: whoever multiplies it, even by 0, shows it."""
    page = cache.k_BPKH.shape[1]
    for seq, end in enumerate(ends):
        for position in range(end, cache.block_table_SB.shape[1] * page):
            block = int(cache.block_table_SB[seq, position // page])
            if block < len(cache.k_BPKH):
                cache.k_BPKH[block, position % page] = float("nan")
                cache.v_BPKH[block, position % page] = float("nan")


MIXED = ((30, 9), (3, 0), (0, 40), (130, 70), (127, 1), (126, 5), (0, 33))
MANY = ((0, 70),) * 3 + ((9, 0),) * 30 + tuple((9 * i, 5) for i in range(20))
CASES = [
    Prompts(chunks=MIXED),
    Prompts(chunks=MIXED, case={"index": torch.int64, "block_size": 32}),
    Prompts(chunks=MIXED, case={"num_kv_heads": 8}),
    Prompts(chunks=((17, 130), (500, 33)), case={"block_size": 256}),
    Prompts(chunks=MANY, case={"kv": torch.bfloat16}),
    Prompts(chunks=MIXED, case={"num_heads": 7, "num_kv_heads": 1, "head_dim": 64}),
    Prompts(chunks=MIXED, case={"num_heads": 6, "head_dim": 96}),
    Prompts(chunks=((0, 300),), case={"num_heads": 2}),
]


def build_host(heads: Heads, folder: Path) -> ctypes.CDLL:
    threads, engines = (
        Path(__file__).with_name(f"attention_wgmma_host{part}.cpp").read_text()
        for part in ("", "_engines")
    )
    before, after = engines.split("// KERNEL")
    (folder / "host.cpp").write_text(source_on(heads, threads + before) + after)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", "host.so", "host.cpp"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return ctypes.CDLL(str(folder / "host.so"))


def host_map(boxes: Boxes) -> bytes:
    four = [
        [*values, 0, 0][:4] if len(values) < 4 else values
        for values in (boxes.sizes, (1, *boxes.strides), boxes.box)
    ]
    numbers = [number for values in four for number in values]
    packed = struct.pack("<Qi12i", boxes.tensor.data_ptr(), len(boxes.sizes), *numbers)
    return packed.ljust(MAP_BYTES, b"\0")


def run_on_host(host: ctypes.CDLL, inputs: Inputs, *, num_blocks: int, is_late: bool) -> Tensor:
    heads = heads_of(inputs.q_TNH, inputs.cache.k_BPKH)
    out_TNH = torch.full_like(inputs.q_TNH, 7.0)
    maps = host_map(query_boxes(inputs.q_TNH, heads.group))
    for cache in (inputs.cache.k_BPKH, inputs.cache.v_BPKH):
        maps += host_map(position_boxes(cache))
    buffer = ctypes.create_string_buffer(len(maps) + MAP_BYTES)
    at = ctypes.addressof(buffer) - ctypes.addressof(buffer) % -MAP_BYTES
    ctypes.memmove(at, maps, len(maps))
    table_SB = inputs.cache.block_table_SB
    integers = (
        len(inputs.num_tokens_S), inputs.cache.k_BPKH.shape[2], len(inputs.cache.k_BPKH),
        table_SB.stride(0), int(table_SB.dtype == torch.int64), *out_TNH.stride()[:2],
    )  # fmt: skip
    host.run(
        ctypes.c_void_p(at),
        (ctypes.c_void_p * 4)(*(index.data_ptr() for index in inputs.indices)),
        ctypes.c_void_p(out_TNH.data_ptr()),
        ctypes.c_float(SCALE * LOG2_E),
        (ctypes.c_int * 7)(*integers),
        num_blocks,
        shared_bytes(heads),
        is_late,
    )
    return out_TNH


@needs_compiler
@pytest.mark.parametrize("prompts", CASES, ids=range(len(CASES)))
def test_agrees_with_twin_on_the_cpu(prompts: Prompts, tmp_path: Path) -> None:
    """With copies and products done at once, and as late as they may be."""
    torch.manual_seed(0)
    inputs = prompts.inputs(torch.device("cpu"))
    heads = heads_of(inputs.q_TNH, inputs.cache.k_BPKH)
    host = build_host(heads, tmp_path)
    for num_blocks, is_late in ((3, False), (4, True)):
        out_TNH = run_on_host(host, inputs, num_blocks=num_blocks, is_late=is_late)
        inputs.check(out_TNH)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_blocks_fit_their_shared_memory(head_dim: int) -> None:
    heads = Heads(group=4, head_dim=head_dim, page=16, dtype=torch.float16)
    assert shared_bytes(heads) <= MAX_SHARED_BYTES


def test_source_holds_the_types() -> None:
    heads = Heads(group=4, head_dim=64, page=16, dtype=torch.bfloat16)
    source = wgmma_source(heads)
    assert "m64n128k16.f32.bf16.bf16" in source and "m64n64k16.f32.bf16.bf16" in source
    assert not any(f"// {part}" in source for part in ("PTX", "WGMMA", "TILES", "COPIES"))


@pytest.mark.skipif(nvrtc_library() is None or not DISASSEMBLER.exists(), reason="needs NVRTC")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_overlap_and_nothing_spills(head_dim: int, tmp_path: Path) -> None:
    """The compiler takes products one at a time where it cannot see that their registers are
    free."""
    heads = Heads(group=4, head_dim=head_dim, page=16, dtype=torch.float16)
    cubin, log = compile_with_log(wgmma_source(heads), ARCH)
    assert "serialized" not in log
    (tmp_path / "cubin").write_bytes(cubin)
    command = [DISASSEMBLER, "-res-usage", tmp_path / "cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "STACK:0" in usage and "LOCAL:0" in usage


def test_other_devices_do_not_take_it() -> None:
    inputs = CASES[0].inputs(torch.device("cpu"))
    caches = (inputs.cache.k_BPKH, inputs.cache.v_BPKH)
    assert not takes_wgmma(inputs.q_TNH, *caches, *inputs.indices, torch.empty_like(inputs.q_TNH))


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if not has_mma(device):
        pytest.skip("no Hopper card with NVRTC")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", CASES, ids=range(len(CASES)))
def test_agrees_with_twin_on_the_card(prompts: Prompts, hopper: torch.device) -> None:
    torch.manual_seed(0)
    inputs = prompts.inputs(hopper)
    caches = (inputs.cache.k_BPKH, inputs.cache.v_BPKH)
    out_TNH = torch.full_like(inputs.q_TNH, 7.0)
    assert takes_wgmma(inputs.q_TNH, *caches, *inputs.indices, out_TNH)
    prefill_wgmma(inputs.q_TNH, *caches, *inputs.indices, out_TNH, scale_log2=SCALE * LOG2_E)
    inputs.check(out_TNH)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [0, 1000])
def test_long_prompts_on_the_card(first: int, hopper: torch.device) -> None:
    """More tiles than multiprocessors; the same bits each time."""
    torch.manual_seed(0)
    inputs = Prompts(chunks=((first, 2000), (0, 512), (first, 7)), case={"num_heads": 32}).inputs(
        hopper
    )
    table_SB, starts_S, firsts_S, num_tokens_S = inputs.indices
    caches = (inputs.cache.k_BPKH, inputs.cache.v_BPKH, table_SB)

    def attend(out_TNH: Tensor | None = None) -> Tensor:
        return paged_attention_prefill(
            inputs.q_TNH, *caches, firsts_S, num_tokens_S, SCALE, starts_S=starts_S, out_TNH=out_TNH
        )

    out_TNH = attend(torch.full_like(inputs.q_TNH, 7.0))
    inputs.check(out_TNH)
    assert torch.equal(attend()[:-2], out_TNH[:-2])
