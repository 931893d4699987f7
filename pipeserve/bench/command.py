"""`pipeserve bench` on the command line. Imports no benchmark, and no torch, before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeserve.arguments import add_options, names
from pipeserve.bench.command_engine import add_engine
from pipeserve.bench.command_policies import add_policies, add_prediction
from pipeserve.bench.command_schedule import add_schedule
from pipeserve.config import load_config
from pipeserve.kernels.tuned_files import own_folder
from pipeserve.log import configure_logging
from pipeserve.toolchain import keep_kernels_in

BENCH_KERNELS_EPILOG = """\
Kernels: products, decode, prefill, norms, rotary, swiglu, sampling. Models: llama-8b, llama-70b,
qwen3-30b-a3b. --tune takes minutes and writes CACHE_DIR/tuned/CARD.json, which goes before the
choices that come with pipeserve.

examples:
  pipeserve bench kernels
  pipeserve bench kernels --only products,decode --model-shape llama-8b --json
  pipeserve bench kernels --tune --model-shape llama-70b"""

BENCH_OPTIONS = (
    *("shape", "recipe", "prompt", "output", "shared", "batch", "clients", "poisson", "requests"),
    *("policy", "profile", "timeline", "record", "json", "policies", "loads", "shorter"),
    *("seconds", "rounds", "bursts", "trace", "replay", "fit", "costs", "split", "seed"),
    *("kv_tokens", "only", "model_shape", "tune"),
)
"""Beside those of Config, for a hint where one is unknown."""


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command `bench` with all its benchmarks."""
    bench = commands.add_parser("bench", help="measure this machine", description="Benchmarks.")
    benchmarks = bench.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    add_engine(benchmarks)
    add_policies(benchmarks)
    add_schedule(benchmarks)
    add_prediction(benchmarks)
    add_kernels(benchmarks)
    add_grammars(benchmarks)


def add_kernels(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kernels = benchmarks.add_parser(
        "kernels",
        help="every GPU kernel against the card's limits",
        description="Time every GPU kernel in the sizes of real models, as shares of what the "
        "card's measured copy speed or matrix rate allow.",
        epilog=BENCH_KERNELS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels.set_defaults(run=run_kernels)
    add = kernels.add_argument
    add("--only", type=names, default=(), metavar="LIST", help="these kernels. Default: all.")
    add(
        "--model-shape",
        type=names,
        default=(),
        metavar="LIST",
        help="the sizes of these models. Default: all.",
    )
    add(
        "--tune",
        action="store_true",
        help="try every way to multiply instead, and keep the fastest for this card",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    add_options(kernels, ["cache_dir"])


def run_kernels(parsed: argparse.Namespace) -> int:
    """The command `bench kernels`."""
    options = {name: value for name, value in vars(parsed).items() if name == "cache_dir"}
    config = load_config(overrides=options, config_file=parsed.config)
    configure_logging(level="warning", log_format="auto")
    keep_kernels_in(config.cache_dir)
    from pipeserve.bench import kernels  # loads torch

    return kernels.run(
        only=parsed.only,
        model_shapes=parsed.model_shape,
        tuned_folder=own_folder(config.cache_dir),
        wants_json=parsed.json,
        wants_tuning=parsed.tune,
    )


def add_grammars(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    grammars = benchmarks.add_parser(
        "grammars",
        help="what holding answers to a form costs per token",
        description="Time from a token to the mask of the next one, for several forms of answers.",
    )
    grammars.set_defaults(run=run_grammars)
    add = grammars.add_argument
    add("--vocab-size", type=int, metavar="N", help="only the first N tokens. Default: all.")
    add("--answers", type=int, default=20, metavar="N", help="of each form. Default: 20.")
    add("--json", action="store_true", help="print JSON")
    add("--model", default="demo", metavar="MODEL", help="whose vocabulary. Default: demo.")
    add("--config", type=Path, metavar="FILE", help="TOML file with options")


def run_grammars(parsed: argparse.Namespace) -> int:
    """The command `bench grammars`."""
    config = load_config(overrides={"model": parsed.model}, config_file=parsed.config)
    configure_logging(level="warning", log_format="auto")
    from pipeserve.bench import grammars
    from pipeserve.hub import resolve_model

    return grammars.run(
        resolve_model(config.model, cache_dir=config.cache_dir),
        vocab_size=parsed.vocab_size,
        num_answers=parsed.answers,
        wants_json=parsed.json,
    )
