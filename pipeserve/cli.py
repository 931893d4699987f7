"""The command line: arguments to Config to command. Imports a command's module when it runs."""

from __future__ import annotations

import argparse
import difflib
import functools
import sys
from collections.abc import Sequence

from pipeserve import __version__
from pipeserve.arguments import HTTP_OPTIONS, LAYOUT_OPTIONS, add_options
from pipeserve.bench.command import BENCH_OPTIONS, add_bench
from pipeserve.config import Config, load_config
from pipeserve.errors import PipeserveError
from pipeserve.log import configure_logging
from pipeserve.toolchain import keep_kernels_in

DESCRIPTION = """\
Serves GGUF language models to OpenAI clients, with the layers cut into pipeline stages so that
every GPU of the machine (or two CPU stages) works at the same time."""

SERVE_EPILOG = """\
Every option can also stand in a TOML file (--config; see config.example.toml) or in the
environment as PIPESERVE_<OPTION>. The command line goes before the environment, the environment
before the file. MODEL is one of

  demo                      SmolLM2-135M-Instruct, fetched at the first start (98 MB)
  gemma3-270m               Gemma 3 270M, the base model (253 MB; fetched, not yet served)
  hf:owner/repo/file.gguf   a file on the Hugging Face hub
  path/to/model.gguf        a file here; of a sharded set (-00001-of-0000N.gguf) the first

examples:
  pipeserve serve
  pipeserve serve --model ~/models/llama-3-70b-q4_k_m.gguf --devices cuda:0,cuda:1
  pipeserve serve --config /etc/pipeserve/config.toml --port 9000"""

PLAN_EPILOG = """\
Options are as for serve. Nothing is loaded but a few layers, whose times are measured once for
every kind of device and kept.

examples:
  pipeserve plan demo --devices cpu,cpu
  pipeserve plan ~/models/llama-3-70b-q4_k_m.gguf --devices cuda:0,cuda:1 --kv-cache-dtype int8
  pipeserve plan demo --devices cpu,cpu --layer-split 20,10 --json"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; ends the process with its exit status."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_explain_unknown(unknown[0]))
    try:
        sys.exit(parsed.run(parsed))
    except PipeserveError as error:
        print(f"pipeserve: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the options of `serve` are the fields of Config."""
    parser = argparse.ArgumentParser(prog="pipeserve", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"pipeserve {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model until a signal",
        description="Serve a model on http://HOST:PORT/v1 until SIGTERM or SIGINT.",
        epilog=SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(run=run_serve)
    add_options(serve, Config.model_fields)
    pull = commands.add_parser(
        "pull",
        help="fetch and verify a model without serving it",
        description="Fetch MODEL into the cache, verify it and print where it lies.",
    )
    pull.set_defaults(run=run_pull)
    pull.add_argument("model", metavar="MODEL", help="demo, gemma3-270m or hf:owner/repo/file.gguf")
    pull.add_argument("--cache-dir", dest="cache_dir", default=argparse.SUPPRESS, metavar="FOLDER")
    _add_plan(commands)
    add_bench(commands)
    return parser


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="show which stages a model would get, and what they would do",
        description="Print layers, weights and KV cache of every stage, and the expected speed.",
        epilog=PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.set_defaults(run=run_plan)
    plan.add_argument("model", metavar="MODEL", help="as for serve")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    left_out = {"model", *HTTP_OPTIONS} - LAYOUT_OPTIONS
    add_options(plan, [name for name in Config.model_fields if name not in left_out])


def _explain_unknown(argument: str) -> str:
    names = ("config", *Config.model_fields, *BENCH_OPTIONS)
    known = [f"--{name.replace('_', '-')}" for name in names]
    nearest = difflib.get_close_matches(argument.split("=")[0], known, n=1, cutoff=0.0)
    return f"unknown argument {argument!r}; the nearest known is {nearest[0]}"


def run_serve(parsed: argparse.Namespace) -> int:
    """The command `serve`."""
    options = {name: value for name, value in vars(parsed).items() if name in Config.model_fields}
    read_options = functools.partial(load_config, overrides=options, config_file=parsed.config)
    config = read_options()
    configure_logging(level=config.log_level, log_format=config.log_format)
    from pipeserve import daemon  # loads the server, which no other command needs

    return daemon.serve(config, read_options)


def run_pull(parsed: argparse.Namespace) -> int:
    """The command `pull`."""
    options = {name: value for name, value in vars(parsed).items() if name == "cache_dir"}
    config = load_config(overrides=options)
    from pipeserve.hub import resolve_model

    print(resolve_model(parsed.model, cache_dir=config.cache_dir))
    return 0


def run_plan(parsed: argparse.Namespace) -> int:
    """The command `plan`."""
    options = {name: value for name, value in vars(parsed).items() if name in Config.model_fields}
    config = load_config(overrides=options, config_file=parsed.config)
    configure_logging(level="warning", log_format="auto")
    keep_kernels_in(config.cache_dir)
    from pipeserve import planning  # loads torch

    plan = planning.make_plan(config)
    print(planning.as_json(plan) if parsed.json else planning.as_text(plan))
    return 0
