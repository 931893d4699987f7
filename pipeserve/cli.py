"""The command line: arguments to Config to command. Imports a command's module when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeserve import __version__
from pipeserve.config import Config, load_config
from pipeserve.errors import PipeserveError
from pipeserve.kernels.tuned_files import own_folder
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

BENCH_ENGINE_EPILOG = """\
The synthetic file is kept in CACHE_DIR/synthetic and used again. Options that are left out are
as for serve, but max_num_seqs and max_num_batched_tokens grow to the largest batch. Every run
follows one of a few output tokens that is not measured. Shapes: llama-8b, llama-70b, llama-1b,
smollm-135m, tiny. Recipes: q4_k_m, or one type for every matrix: q4_0, q8_0, q6_k, f16, ...

examples:
  pipeserve bench engine --shape llama-8b --batch 1,8,32 --prompt 512 --output 128
  pipeserve bench engine --shape llama-8b --batch 1,32,128 --profile
  pipeserve bench engine --shape llama-8b --devices cuda:0,cuda:1 --clients 512 --json
  pipeserve bench engine --model demo --devices cpu,cpu --batch 1,8"""

BENCH_SCHEDULE_EPILOG = """\
The costs are microseconds of the whole model, which --split cuts into stages: per step, per row
that samples, per prefill token, per KV position that a row reads and, if given, per prefill token
and position that it attends to. Those of an 8B Llama on an H200 are the default. Lengths are a
number (512), some of equal chance (64,2048) or a range (64-8192, log-uniform). A trace file has one
JSON object per line: arrival_s, prompt_tokens, output_tokens and, if wanted, key and priority.

examples:
  pipeserve bench schedule --clients 128
  pipeserve bench schedule --clients 256 --split 1,1,1,1 --prompt 64-8192 --timeline stages.svg
  pipeserve bench schedule --poisson 40 --requests 2000 --split 3,2
  pipeserve bench engine --model demo --devices cpu,cpu --clients 4 --record one.jsonl
  pipeserve bench engine --model demo --devices cpu,cpu --clients 12 --record other.jsonl
  pipeserve bench schedule --fit one.jsonl --replay other.jsonl"""

BENCH_KERNELS_EPILOG = """\
Kernels: products, decode, prefill, norms, rotary, swiglu, sampling. Models: llama-8b, llama-70b,
qwen3-30b-a3b. --tune takes minutes and writes CACHE_DIR/tuned/CARD.json, which goes before the
choices that come with pipeserve.

examples:
  pipeserve bench kernels
  pipeserve bench kernels --only products,decode --model-shape llama-8b --json
  pipeserve bench kernels --tune --model-shape llama-70b"""

PLAN_EPILOG = """\
Options are as for serve. Nothing is loaded but a few layers, whose times are measured once for
every kind of device and kept.

examples:
  pipeserve plan demo --devices cpu,cpu
  pipeserve plan ~/models/llama-3-70b-q4_k_m.gguf --devices cuda:0,cuda:1 --kv-cache-dtype int8
  pipeserve plan demo --devices cpu,cpu --layer-split 20,10 --json"""

BENCH_OPTIONS = (
    "shape",
    "recipe",
    "prompt",
    "output",
    "batch",
    "clients",
    "requests",
    "profile",
    "timeline",
    "record",
    "json",
    *("poisson", "bursts", "trace", "replay", "fit", "costs", "split", "policies", "seed"),
    *("kv_tokens", "only", "model_shape", "tune"),
)

HTTP_OPTIONS = frozenset(
    {
        *("served_model_name", "max_queued_requests", "max_body_bytes", "text_timeout_s"),
        *("processes", "host", "port", "drain_timeout_s", "log_level", "log_format"),
        *("max_queued_tokens", "request_timeout_s"),
        *("api_keys_file", "max_connections", "client_timeout_s", "idle_unload_s"),
        "otlp_endpoint",
        *("layout", "replicas", "stages"),
    }
)
"""Fields of Config that mean nothing to commands without the front half."""


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
    _add_options(serve, Config.model_fields)
    pull = commands.add_parser(
        "pull",
        help="fetch and verify a model without serving it",
        description="Fetch MODEL into the cache, verify it and print where it lies.",
    )
    pull.set_defaults(run=run_pull)
    pull.add_argument("model", metavar="MODEL", help="demo, gemma3-270m or hf:owner/repo/file.gguf")
    pull.add_argument("--cache-dir", dest="cache_dir", default=argparse.SUPPRESS, metavar="FOLDER")
    _add_plan(commands)
    bench = commands.add_parser("bench", help="measure this machine", description="Benchmarks.")
    benchmarks = bench.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    _add_bench_engine(benchmarks)
    _add_bench_schedule(benchmarks)
    _add_bench_kernels(benchmarks)
    _add_bench_grammars(benchmarks)
    return parser


def _add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """The fields of Config of these names, and --config."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with options")
    for name in names:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(name, Config.model_fields[name].annotation),
            help=_help(name),
        )


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
    _add_options(
        plan, [name for name in Config.model_fields if name not in {"model", *HTTP_OPTIONS}]
    )


def _add_bench_engine(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    engine = benchmarks.add_parser(
        "engine",
        help="scheduler and stages, without HTTP",
        description="Measure decode, prefill and latencies without HTTP, tokenizer and templates.",
        epilog=BENCH_ENGINE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engine.set_defaults(run=run_bench_engine)
    model = engine.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", metavar="NAME", help="a synthetic model in this shape")
    model.add_argument("--model", default=argparse.SUPPRESS, metavar="MODEL", help="as for serve")
    add = engine.add_argument
    add("--recipe", default="q4_k_m", metavar="NAME", help="its quantisation. Default: q4_k_m.")
    add("--prompt", type=_count, default=512, metavar="N", help="prompt tokens. Default: 512.")
    add("--output", type=_count, default=128, metavar="N", help="output tokens. Default: 128.")
    load = engine.add_mutually_exclusive_group()
    load.add_argument(
        "--batch",
        type=_counts,
        default=(1,),
        metavar="LIST",
        help="sequences submitted at once, in one run for each number. Default: 1.",
    )
    load.add_argument(
        "--clients", type=_count, metavar="N", help="that many clients in a closed loop instead"
    )
    add(
        "--requests",
        type=_count,
        metavar="N",
        help="of all clients together. Default: 4 for each client.",
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
    _add_options(
        engine, [name for name in Config.model_fields if name not in {"model", *HTTP_OPTIONS}]
    )


def _add_bench_schedule(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    schedule = benchmarks.add_parser(
        "schedule",
        help="the scheduler on simulated stages, in virtual time",
        description="Send requests through the scheduler and stages of known costs; no model.",
        epilog=BENCH_SCHEDULE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    schedule.set_defaults(run=run_bench_schedule)
    add = schedule.add_argument
    load = schedule.add_mutually_exclusive_group(required=True)
    load.add_argument("--clients", type=_count, metavar="N", help="a closed loop of N clients")
    load.add_argument("--poisson", type=float, metavar="RATE", help="so many arrivals per second")
    load.add_argument("--bursts", metavar="N/S", help="N arrivals at once every S seconds")
    load.add_argument("--trace", type=Path, metavar="FILE", help="requests from a file")
    load.add_argument("--replay", type=Path, metavar="FILE", help="recorded runs, to compare with")
    add("--requests", type=_count, metavar="N", help="Default: 4 for each client, or 1000.")
    add("--prompt", default="512", metavar="LENGTHS", help="prompt tokens. Default: 512.")
    add("--output", default="128", metavar="LENGTHS", help="output tokens. Default: 128.")
    add("--seed", type=int, default=0, metavar="N", help="of lengths and arrivals. Default: 0.")
    costs = schedule.add_mutually_exclusive_group()
    costs.add_argument("--fit", type=Path, metavar="FILE", help="take costs from recorded runs")
    costs.add_argument("--costs", metavar="LIST", help="of the whole model. Default: 8B on an H200")
    add("--split", type=_counts, metavar="LIST", help="the stages' shares of it. Default: 1,1.")
    add("--policies", default="ours,plain", metavar="LIST", help="Default: ours,plain.")
    add("--max-num-seqs", type=_count, metavar="N", help="Default: 256, or as recorded.")
    add("--max-num-batched-tokens", type=_count, metavar="N", help="Default: 2048, or as recorded.")
    add("--kv-tokens", type=_count, metavar="N", help="Default: 262144, or as recorded.")
    add("--num-look-ahead", type=int, choices=(0, 1), help="Default: 1, or as recorded.")
    add(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="draw which stage worked on which micro-batch under the first policy, as SVG",
    )
    add("--json", action="store_true", help="print JSON instead of tables")


def _add_bench_kernels(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kernels = benchmarks.add_parser(
        "kernels",
        help="every GPU kernel against the card's limits",
        description="Time every GPU kernel in the sizes of real models, as shares of what the "
        "card's measured copy speed or matrix rate allow.",
        epilog=BENCH_KERNELS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels.set_defaults(run=run_bench_kernels)
    add = kernels.add_argument
    add("--only", type=_names, default=(), metavar="LIST", help="these kernels. Default: all.")
    add(
        "--model-shape",
        type=_names,
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
    _add_options(kernels, ["cache_dir"])


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _explain_unknown(argument: str) -> str:
    names = ("config", *Config.model_fields, *BENCH_OPTIONS)
    known = [f"--{name.replace('_', '-')}" for name in names]
    nearest = difflib.get_close_matches(argument.split("=")[0], known, n=1, cutoff=0.0)
    return f"unknown argument {argument!r}; the nearest known is {nearest[0]}"


def _help(name: str) -> str:
    field = Config.model_fields[name]
    text = field.description or ""
    default = field.get_default(call_default_factory=True)
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    text += f" Default: {'none' if default is None else shown}."
    return text.replace("%", "%%")


def _metavar(name: str, annotation: object) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(typing.get_args(annotation))
    words = {"model": "MODEL", "devices": "LIST", "layer_split": "LIST", "cache_dir": "FOLDER"}
    return words.get(name, name.rsplit("_", 1)[-1].upper())


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


def run_bench_engine(parsed: argparse.Namespace) -> int:
    """The command `bench engine`."""
    from pipeserve.bench.workload import make_workload, missing_options

    workload = make_workload(
        num_prompt_tokens=parsed.prompt,
        num_output_tokens=parsed.output,
        batches=parsed.batch,
        num_clients=parsed.clients,
        num_requests=parsed.requests,
    )
    if parsed.profile:
        traced = tuple(load.num_concurrent for load in workload.loads)
        workload = dataclasses.replace(workload, traced=traced)
    options = {name: value for name, value in vars(parsed).items() if name in Config.model_fields}
    config = load_config(overrides=options, config_file=parsed.config)
    options |= missing_options(workload, config)
    configure_logging(level="warning", log_format="auto")
    keep_kernels_in(config.cache_dir)
    from pipeserve.bench import engine, report  # load torch

    if parsed.shape is not None:
        from pipeserve.bench.shapes import find_shape
        from pipeserve.bench.synthetic import provide_model

        folder = config.cache_dir / "synthetic"
        shape = find_shape(parsed.shape)
        options["model"] = str(provide_model(parsed.shape, shape, parsed.recipe, folder=folder))
    config = load_config(overrides=options, config_file=parsed.config)
    result = engine.measure(
        config,
        workload,
        on_run=lambda run: print(report.progress_line(run), file=sys.stderr),
        record=parsed.record,
    )
    print(report.as_json(result) if parsed.json else report.as_table(result))
    if parsed.timeline is not None:
        parsed.timeline.write_text(report.as_svg(result))
    return 0


def run_bench_schedule(parsed: argparse.Namespace) -> int:
    """The command `bench schedule`."""
    from pipeserve.bench import schedule, schedule_report

    result = schedule.run(
        schedule.Options(
            **{
                field.name: getattr(parsed, field.name)
                for field in dataclasses.fields(schedule.Options)
            }
        )
    )
    print(schedule_report.as_json(result) if parsed.json else schedule_report.as_text(result))
    if parsed.timeline is not None:
        parsed.timeline.write_text(schedule_report.as_svg(result.simulated[0]))
    return 0


def _add_bench_grammars(benchmarks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    grammars = benchmarks.add_parser(
        "grammars",
        help="what holding answers to a form costs per token",
        description="Time from a token to the mask of the next one, for several forms of answers.",
    )
    grammars.set_defaults(run=run_bench_grammars)
    add = grammars.add_argument
    add("--vocab-size", type=int, metavar="N", help="only the first N tokens. Default: all.")
    add("--answers", type=int, default=20, metavar="N", help="of each form. Default: 20.")
    add("--json", action="store_true", help="print JSON")
    add("--model", default="demo", metavar="MODEL", help="whose vocabulary. Default: demo.")
    add("--config", type=Path, metavar="FILE", help="TOML file with options")


def run_bench_grammars(parsed: argparse.Namespace) -> int:
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


def run_bench_kernels(parsed: argparse.Namespace) -> int:
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
