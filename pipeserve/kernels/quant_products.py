"""QuantProducts: multiplies by planar matrices on a GPU, each in the way that is fastest there.

Used by stage threads; capturable in a CUDA graph once each shape has run outside of one.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels import quant_imma
from pipeserve.kernels.interleaved_rows import INTERLEAVED_COLUMNS
from pipeserve.kernels.quant_dequant import dequantise
from pipeserve.kernels.quant_gemm import gemm
from pipeserve.kernels.quant_gemv import gemv
from pipeserve.kernels.quant_imma import (
    ImmaVariant,
    choose_imma_tiling,
    has_imma,
    imma,
    takes_imma,
)
from pipeserve.kernels.quant_layout import PlanarWeight
from pipeserve.kernels.quant_mma import (
    MmaOutput,
    Turn,
    compile_ahead,
    has_mma,
    is_hopper,
    is_made_for,
    mma,
    mma_swiglu,
    takes_mma,
    takes_swiglu,
    why_not_loaded,
)
from pipeserve.kernels.quant_mma_tiling import MmaVariant
from pipeserve.kernels.quant_reference import (
    LinearInput,
    PreparedRows,
    QuantisedRows,
    values_of,
)
from pipeserve.kernels.quant_split import card_limits
from pipeserve.kernels.quant_tuned import TunedTable
from pipeserve.kernels.quant_ways import (
    GEMM_ROWS,
    MMA_ROWS,
    BatchWay,
    Dequantise,
    FewRowsWay,
    Gemm,
    Gemv,
    Imma,
    Mma,
    rule_way,
)

GEMV_ROWS = 4
"""Up to this many, integer dot products are faster than 16-bit products on tensor cores: measured
on an H100 (loadtest/README.md)."""

_LEAST_BYTE_ROWS = 3
_BYTE_ROWS = 16
_HOPPER_BYTE_ROWS = 8
"""From the first up to these, where no table says otherwise, bytes go to tensor cores: on an H200
1.2 times as fast as Hopper's own kernel at 8 rows, and slower at 16, where it is 1.3 times as fast
as Triton's for other cards."""

DENSE_ROWS = 128
"""From more rows on, a matrix that is kept dequantised as well is multiplied as such: at 128 rows
the products of an 8B model take as long in both ways, by the times of loadtest/README.md."""
RULE_ROWS = (8, 16, 32, 64, 128, 256, 512)
"""Between which the rule makes no difference."""


def multiply(
    way: BatchWay, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None = None,
    *, out_TN: Tensor | None = None, turn: Turn = "alone",
) -> Tensor:  # fmt: skip
    """x W^T + b [T, N] in x's type, in out_TN if given, in x's type or float32, whose rows may lie
    anywhere. turn: of mma alone."""
    x_TK = values_of(x)
    match way:
        case Mma(tiling=tiling):
            return mma(
                x_TK, weight, bias_N, interleaved_TK=_interleaved(x), out_TN=out_TN, tiling=tiling,
                turn=turn,
            )  # fmt: skip
        case Gemm(tiling=gemm_tiling):
            return gemm(x_TK, weight, bias_N, out_TN=out_TN, tiling=gemm_tiling)
        case Dequantise():
            weight_NK = weight.dense_NK
            if weight_NK is None:
                weight_NK = dequantise(weight, x_TK.dtype)
    if out_TN is None:
        return functional.linear(x_TK, weight_NK, bias_N)
    if out_TN.dtype != x_TK.dtype:
        torch.mm(x_TK, weight_NK.t(), out_dtype=out_TN.dtype, out=out_TN)
        return out_TN if bias_N is None else out_TN.add_(bias_N)
    if bias_N is None:
        return torch.mm(x_TK, weight_NK.t(), out=out_TN)
    return torch.addmm(bias_N, x_TK, weight_NK.t(), out=out_TN)


class QuantProducts:
    """Of one card."""

    def __init__(self, table: TunedTable) -> None:
        self._table = table

    def most_byte_rows(self, device: torch.device) -> int:
        """Up to so many rows some matrix may be multiplied by bytes."""
        return max(GEMV_ROWS, self._table.most_byte_rows, _rule_byte_rows(device))

    def takes_interleaved(self, num_tokens: int, num_columns: int, device: torch.device) -> bool:
        """Whether matrices of so many columns are likely multiplied by interleaved rows."""
        is_batch = GEMV_ROWS < num_tokens <= MMA_ROWS
        return is_batch and num_columns % INTERLEAVED_COLUMNS == 0 and has_mma(device)

    def takes_bytes(self, weight: PlanarWeight, num_tokens: int) -> bool:
        """Whether few_rows multiplies by this matrix, rather than batch."""
        return num_tokens <= GEMV_ROWS or isinstance(self.few_rows_way(weight, num_tokens), Imma)

    def few_rows_way(self, weight: PlanarWeight, num_tokens: int) -> FewRowsWay:
        """What the table says or, where it has no such matrix, the rule; as far as the card can."""
        if _key(weight) in self._table.products:
            way = self._table.few_rows_way(_key(weight), num_tokens)
        else:
            way = _few_rows_rule(weight, num_tokens)
        if way is None or (isinstance(way, Imma) and not _can(way, weight, torch.float16)):
            return Gemv()
        return way

    def few_rows(
        self, x: QuantisedRows, weight: PlanarWeight, bias_N: Tensor | None,
        *, out_dtype: torch.dtype = torch.float16, out_TN: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As gemv, for rows that takes_bytes."""
        way = self.few_rows_way(weight, x.codes_TK.shape[0])
        if isinstance(way, Imma):
            if _can(way, weight, out_dtype if out_TN is None else out_TN.dtype):
                return imma(
                    x, weight, bias_N, out_dtype=out_dtype, out_TN=out_TN, tiling=way.tiling
                )  # fmt: skip
            way = Gemv()
        return gemv(
            x, weight, bias_N, out_dtype=out_dtype, out_TN=out_TN, block_n=way.block_n,
            pieces=way.pieces, num_parts=way.num_parts,
        )  # fmt: skip

    def batch(
        self, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None,
        *, out_TN: Tensor | None = None, turn: Turn = "alone",
    ) -> Tensor:  # fmt: skip
        """As multiply, for any number of rows in f16 or bf16."""
        way = self._way(values_of(x), weight, out_TN)
        return multiply(way, x, weight, bias_N, out_TN=out_TN, turn=turn)

    def turns(
        self, x: LinearInput, weights: Sequence[PlanarWeight], outs_TN: Sequence[Tensor]
    ) -> Sequence[Turn]:
        """In which batch multiplies x by these one behind the other."""
        is_pair = len(weights) == 2 and _interleaved(x) is not None
        if is_pair and all(
            isinstance(self._way(values_of(x), weight, out_TN), Mma)
            for weight, out_TN in zip(weights, outs_TN, strict=True)
        ):
            return ["first", "second"]
        return ["alone"] * len(weights)

    def gated_batch(
        self, x: LinearInput, weight: PlanarWeight, bias_N: Tensor | None
    ) -> PreparedRows | None:
        """SwiGLU of what batch gives, of the kernel that multiplies; None where that has none."""
        x_TK = values_of(x)
        way = self.batch_way(weight, x_TK.shape[0])
        if not isinstance(way, Mma) or not takes_swiglu(weight, way.tiling):
            return None
        kernel = (weight.type_name, way.tiling.variant, x_TK.device, "swiglu")
        if not takes_mma(x_TK, weight) or why_not_loaded(*kernel) is not None:
            return None
        out_TF, interleaved_TF = mma_swiglu(
            x_TK, weight, bias_N, interleaved_TK=_interleaved(x), tiling=way.tiling
        )
        return PreparedRows(values_TK=out_TF, interleaved_TK=interleaved_TF)

    def _way(self, x_TK: Tensor, weight: PlanarWeight, out_TN: Tensor | None) -> BatchWay:
        num_tokens = x_TK.shape[0]
        way = self.batch_way(weight, num_tokens)
        if not isinstance(way, Mma):
            return way
        out_dtype = torch.float16 if out_TN is None else out_TN.dtype
        kernel = (weight.type_name, way.tiling.variant, x_TK.device, out_dtype)
        is_possible = takes_mma(x_TK, weight, out_TN) and why_not_loaded(*kernel) is None
        return way if is_possible else _without_mma(num_tokens)

    def batch_way(self, weight: PlanarWeight, num_tokens: int) -> BatchWay:
        """What the table says or, where it has no such matrix, the rule."""
        if weight.dense_NK is not None and num_tokens > DENSE_ROWS:
            return Dequantise()
        way = self._table.batch_way(_key(weight), num_tokens)
        if way is not None:
            return way
        device = weight.low.device
        return rule_way(
            *_key(weight), num_tokens, has_mma=is_hopper(device) and is_made_for(weight),
            num_multiprocessors=card_limits(device).num_multiprocessors,
        )  # fmt: skip

    def prepare(
        self, weights: Sequence[PlanarWeight], wide: Sequence[PlanarWeight] = ()
    ) -> str | None:
        """Compile and load what NVRTC has to compile for these, on all cores: some 25 kernels for
        an 8B model at the first start, 0.3 s of a core each; none from then on.

        wide: others, whose products are float32. What is in the way, for the user, where that
        fails; Triton's kernel then takes its place.
        """
        wanted = dict.fromkeys(
            (weight.type_name, variant, weight.low.device, torch.float32 if is_wide else output)
            for is_wide, some in ((False, weights), (True, wide))
            for weight in some
            if is_hopper(weight.low.device)
            for variant, output in self._batch_kernels(weight)
        )
        compile_ahead([(type_name, variant, output) for type_name, variant, _, output in wanted])
        self._prepare_bytes(weights, torch.float16)
        self._prepare_bytes(wide, torch.float32)
        for type_name, variant, device, output in wanted:
            reason = why_not_loaded(type_name, variant, device, output)
            if reason is not None:
                return (
                    f"{device}: the CUDA C++ kernel for batches cannot be used ({reason}); "
                    "Triton's takes its place, with which the products of an 8B model take 1.4 "
                    "times as long at 16 rows and 1.9 times at 256"
                )
        return None

    def _prepare_bytes(self, weights: Sequence[PlanarWeight], out_dtype: torch.dtype) -> None:
        """As prepare, of the kernels on bytes; where that fails, the others take their place."""
        wanted = dict.fromkeys(
            (weight.type_name, variant, weight.low.device)
            for weight in weights
            if has_imma(weight.low.device)
            for variant in self._byte_variants(weight)
        )
        for device in dict.fromkeys(device for _, _, device in wanted):
            kernels = [(name, variant) for name, variant, other in wanted if other == device]
            quant_imma.compile_ahead(kernels, torch.cuda.get_device_capability(device), out_dtype)
            for name, variant in kernels:
                quant_imma.why_not_loaded(name, variant, device, out_dtype)

    def _byte_variants(self, weight: PlanarWeight) -> Iterator[ImmaVariant]:
        measured = self._table.products.get(_key(weight))
        if measured is not None:
            ways = list(measured.few_rows.values())
        else:
            ways = [_few_rows_rule(weight, most) for most in (_HOPPER_BYTE_ROWS, _BYTE_ROWS)]
        yield from (way.tiling.variant for way in ways if isinstance(way, Imma))

    def _batch_kernels(self, weight: PlanarWeight) -> Iterator[tuple[MmaVariant, MmaOutput]]:
        measured = self._table.products.get(_key(weight))
        measured_rows = () if measured is None else measured.batch
        for num_tokens in dict.fromkeys((*measured_rows, *RULE_ROWS)):
            way = self.batch_way(weight, num_tokens)
            if isinstance(way, Mma):
                is_gated = takes_swiglu(weight, way.tiling)
                yield way.tiling.variant, "swiglu" if is_gated else torch.float16


def _interleaved(x: LinearInput) -> Tensor | None:
    return x.interleaved_TK if isinstance(x, PreparedRows) else None


def _key(weight: PlanarWeight) -> tuple[str, int, int]:
    return weight.type_name, weight.num_rows, weight.num_columns


def _rule_byte_rows(device: torch.device) -> int:
    if not has_imma(device):
        return GEMV_ROWS
    return _HOPPER_BYTE_ROWS if is_hopper(device) else _BYTE_ROWS


def _few_rows_rule(weight: PlanarWeight, num_tokens: int) -> FewRowsWay:
    device = weight.low.device
    is_between = _LEAST_BYTE_ROWS <= num_tokens <= _rule_byte_rows(device)
    if not is_between or not takes_imma(weight):
        return Gemv()
    return Imma(
        tiling=choose_imma_tiling(
            weight.layout, weight.num_rows, weight.num_columns, num_tokens, card_limits(device)
        )
    )


def _can(way: Imma, weight: PlanarWeight, out_dtype: torch.dtype) -> bool:
    kernel = (weight.type_name, way.tiling.variant, weight.low.device, out_dtype)
    return takes_imma(weight) and quant_imma.why_not_loaded(*kernel) is None


def _without_mma(num_tokens: int) -> BatchWay:
    return Gemm() if num_tokens <= GEMM_ROWS else Dequantise()
