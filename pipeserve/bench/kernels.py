"""The command `bench kernels`: every kernel, in sizes of real models, against the card's limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from pipeserve.bench import kernel_attention, kernel_small
from pipeserve.bench.ceilings import Ceilings, measure_ceilings
from pipeserve.bench.kernel_products import time_products
from pipeserve.bench.kernel_shapes import NAMES, KernelShape, kernel_shape
from pipeserve.bench.kernel_times import KernelTime, as_json, table_lines
from pipeserve.bench.kernel_tuning import tune
from pipeserve.errors import ConfigError
from pipeserve.kernels.quant_products import QuantProducts
from pipeserve.kernels.quant_tuned import tuned_table
from pipeserve.kernels.tuned_files import TunedTableError

Group = Callable[[KernelShape, Ceilings, torch.device], Iterator[KernelTime]]

OTHER_GROUPS: Mapping[str, Group] = MappingProxyType(
    {
        "decode": kernel_attention.time_decode,
        "prefill": kernel_attention.time_prefill,
        "norms": kernel_small.time_norms,
        "rotary": kernel_small.time_rotary,
        "swiglu": kernel_small.time_swiglu,
        "sampling": kernel_small.time_sampling,
    }
)
GROUPS = ("products", *OTHER_GROUPS)

LEGEND = """
us     per call, the median of replays of a CUDA graph whose inputs have left the cache
limit  us at the card's measured copy speed (bytes read and written) or bf16 matrix rate, whichever
       takes longer
share  of the limit that is reached"""


def run(
    *,
    only: Sequence[str],
    model_shapes: Sequence[str],
    tuned_folder: Path,
    wants_json: bool,
    wants_tuning: bool,
) -> int:
    """Print the table, or tune the products and write their table to tuned_folder.

    only: of GROUPS, and model_shapes: of kernel_shapes.NAMES; empty: all.

    Raises:
        ConfigError: an unknown name, no GPU, or a table in tuned_folder that cannot be read.
    """
    shapes = [kernel_shape(name) for name in model_shapes or NAMES]
    groups = check_groups(only)
    if not torch.cuda.is_available():
        raise ConfigError("bench kernels measures a GPU, and torch sees no CUDA device here")
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    say = partial(print, flush=True, file=sys.stderr if wants_json else sys.stdout)
    with torch.inference_mode():
        if wants_tuning:
            say(f"written to {tune(shapes, device, tuned_folder, report=say)}")
            return 0
        ceilings = measure_ceilings(device)
        say(
            f"{ceilings.name}: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 matmul "
            f"{ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
        )
        times: list[KernelTime] = []
        for line in table_lines(
            _kept(_measured(shapes, groups, ceilings, device, tuned_folder), times)
        ):
            say(line)
    say(LEGEND)
    if wants_json:
        print(as_json(ceilings, times))
    return 0


def check_groups(only: Sequence[str]) -> Sequence[str]:
    """Those, or all. Raises ConfigError for an unknown one."""
    for name in only:
        if name not in GROUPS:
            raise ConfigError(f"there are no kernels called {name}; known: {', '.join(GROUPS)}")
    return only or GROUPS


def _measured(
    shapes: Sequence[KernelShape], groups: Sequence[str], ceilings: Ceilings, device: torch.device,
    tuned_folder: Path,
) -> Iterator[KernelTime]:  # fmt: skip
    for group in groups:
        for shape in _shapes_of(group, shapes):
            if group == "products":
                products = _products(ceilings.name, tuned_folder)
                yield from time_products(shape, ceilings, products, device)
            else:
                yield from OTHER_GROUPS[group](shape, ceilings, device)
            torch.cuda.empty_cache()


def _shapes_of(group: str, shapes: Sequence[KernelShape]) -> Sequence[KernelShape]:
    """Sampling depends on the vocabulary alone."""
    if group != "sampling":
        return shapes
    return list({shape.vocab_size: shape for shape in reversed(shapes)}.values())[::-1]


def _products(card: str, tuned_folder: Path) -> QuantProducts:
    try:
        return QuantProducts(tuned_table(card, tuned_folder))
    except TunedTableError as problem:
        raise ConfigError(str(problem)) from None


def _kept(times: Iterator[KernelTime], kept: list[KernelTime]) -> Iterator[KernelTime]:
    for time in times:
        kept.append(time)
        yield time
