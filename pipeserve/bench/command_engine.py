"""`bench engine` on the command line. Imports no torch before it runs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeserve.arguments import HTTP_OPTIONS, add_options, count, counts
from pipeserve.bench.arrivals import Lengths
from pipeserve.bench.chained import CHAINS, Chained
from pipeserve.bench.policies import OURS, POLICIES
from pipeserve.bench.workload import make_workload, missing_options
from pipeserve.config import Config, load_config
from pipeserve.log import configure_logging
from pipeserve.toolchain import keep_kernels_in

BENCH_ENGINE_EPILOG = """\
The synthetic file is kept in CACHE_DIR/synthetic and used again. Options that are left out are
as for serve, but max_num_seqs and max_num_batched_tokens grow to the largest batch. Every run
follows one of a few output tokens that is not measured. Shapes: llama-8b, llama-70b, llama-1b,
smollm-135m, tiny. Recipes: q4_k_m, or one type for every matrix: q4_0, q8_0, q6_k, f16, ...
Lengths are a number (512), some of equal chance (64,2048) or a range (64-8192, log-uniform).

examples:
  pipeserve bench engine --shape llama-8b --batch 1,8,32 --prompt 512 --output 128
  pipeserve bench engine --shape llama-8b --batch 1,32,128 --profile
  pipeserve bench engine --shape llama-8b --batch 80 --samplers dry:16
  pipeserve bench engine --shape llama-8b --devices cuda:0,cuda:1 --clients 512 --json
  pipeserve bench engine --shape llama-8b --prompt 64-8192 --clients 128 --policy plain
  pipeserve bench engine --model demo --devices cpu,cpu --batch 1,8"""


def add_engine(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    engine = benchmarks.add_parser(
        "engine",
        help="scheduler and stages, without HTTP",
        description="Measure decode, prefill and latencies without HTTP, tokenizer and templates.",
        epilog=BENCH_ENGINE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engine.set_defaults(run=run_engine)
    add_model(engine)
    add = engine.add_argument
    add("--prompt", default="512", metavar="LENGTHS", help="prompt tokens. Default: 512.")
    add("--output", default="128", metavar="LENGTHS", help="output tokens. Default: 128.")
    add("--shared", type=count, default=0, metavar="N", help="so many begin all prompts alike")
    add(
        "--samplers",
        metavar="NAME:N",
        help=f"so many of a batch are drawn by a chain of samplers: {', '.join(CHAINS)}",
    )
    load = engine.add_mutually_exclusive_group()
    load.add_argument(
        "--batch",
        type=counts,
        default=(1,),
        metavar="LIST",
        help="sequences submitted at once, in one run for each number. Default: 1.",
    )
    load.add_argument(
        "--clients", type=count, metavar="N", help="that many clients in a closed loop instead"
    )
    load.add_argument("--poisson", type=float, metavar="RATE", help="so many arrivals per second")
    add(
        "--requests",
        type=count,
        metavar="N",
        help="of all clients together. Default: 4 for each client, or 30 s of arrivals.",
    )
    add(
        "--policy",
        choices=tuple(POLICIES),
        default=OURS,
        metavar="NAME",
        help=f"who schedules: {', '.join(POLICIES)}. Default: {OURS}.",
    )
    add(
        "--profile",
        action="store_true",
        help="afterwards trace a steady decode of each batch: time per GPU kernel",
    )
    add(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="draw which stage worked on which micro-batch in the last run, as SVG",
    )
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="append every step, arrival and token of the runs to it, for bench schedule",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add_options(
        engine, [name for name in Config.model_fields if name not in {"model", *HTTP_OPTIONS}]
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """What to load: --shape and --recipe, or --model."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", metavar="NAME", help="a synthetic model in this shape")
    model.add_argument("--model", default=argparse.SUPPRESS, metavar="MODEL", help="as for serve")
    parser.add_argument(
        "--recipe", default="q4_k_m", metavar="NAME", help="its quantisation. Default: q4_k_m."
    )


def configure(
    parsed: argparse.Namespace, missing: Callable[[Config], Mapping[str, object]]
) -> Config:
    """The options for engine and stages, with a synthetic file as the model where a shape is
    given. missing: options that nobody set."""
    options = {name: value for name, value in vars(parsed).items() if name in Config.model_fields}
    config = load_config(overrides=options, config_file=parsed.config)
    configure_logging(level="warning", log_format="auto")
    keep_kernels_in(config.cache_dir)
    options |= missing(config)
    if parsed.shape is not None:
        from pipeserve.bench.shapes import find_shape
        from pipeserve.bench.synthetic import provide_model

        folder = config.cache_dir / "synthetic"
        shape = find_shape(parsed.shape)
        options["model"] = str(provide_model(parsed.shape, shape, parsed.recipe, folder=folder))
    return load_config(overrides=options, config_file=parsed.config)


def run_engine(parsed: argparse.Namespace) -> int:
    """The command `bench engine`."""
    workload = make_workload(
        prompt=Lengths.parse(parsed.prompt),
        output=Lengths.parse(parsed.output),
        batches=parsed.batch,
        num_clients=parsed.clients,
        num_requests=parsed.requests,
        rate_per_s=parsed.poisson,
        num_shared_tokens=parsed.shared,
        chained=None if parsed.samplers is None else Chained.parse(parsed.samplers),
    )
    if parsed.profile:
        traced = tuple(load.num_concurrent for load in workload.loads if load.num_concurrent)
        workload = dataclasses.replace(workload, traced=traced)
    config = configure(parsed, functools.partial(missing_options, workload))
    from pipeserve.bench import engine, report  # load torch

    result = engine.measure(
        config,
        workload,
        on_run=lambda run: print(report.progress_line(run), file=sys.stderr),
        record=parsed.record,
        policy=parsed.policy,
    )
    print(report.as_json(result) if parsed.json else report.as_table(result))
    if parsed.timeline is not None:
        parsed.timeline.write_text(report.as_svg(result))
    return 0
