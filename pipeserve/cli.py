"""The command line: arguments to Config to command. Imports a command's module when it runs."""

from __future__ import annotations

import argparse
import difflib
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from pipeserve import __version__
from pipeserve.config import Config, load_config
from pipeserve.errors import PipeserveError
from pipeserve.log import configure_logging

DESCRIPTION = """\
Serves GGUF language models to OpenAI clients, with the layers cut into pipeline stages so that
every GPU of the machine (or two CPU stages) works at the same time."""

SERVE_EPILOG = """\
Every option can also stand in a TOML file (--config; see config.example.toml) or in the
environment as PIPESERVE_<OPTION>. The command line goes before the environment, the environment
before the file. MODEL is one of

  demo                      SmolLM2-135M-Instruct, fetched at the first start (98 MB)
  gemma3-270m               Gemma 3 270M, the base model (253 MB)
  hf:owner/repo/file.gguf   a file on the Hugging Face hub
  path/to/model.gguf        a file here; of a sharded set (-00001-of-0000N.gguf) the first

examples:
  pipeserve serve
  pipeserve serve --model ~/models/llama-3-70b-q4_k_m.gguf --devices cuda:0,cuda:1
  pipeserve serve --config /etc/pipeserve/config.toml --port 9000"""


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
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file with options")
    for name, field in Config.model_fields.items():
        serve.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(name, field.annotation),
            help=_help(name),
        )
    pull = commands.add_parser(
        "pull",
        help="fetch and verify a model without serving it",
        description="Fetch MODEL into the cache, verify it and print where it lies.",
    )
    pull.set_defaults(run=run_pull)
    pull.add_argument("model", metavar="MODEL", help="demo, gemma3-270m or hf:owner/repo/file.gguf")
    pull.add_argument("--cache-dir", dest="cache_dir", default=argparse.SUPPRESS, metavar="FOLDER")
    return parser


def _explain_unknown(argument: str) -> str:
    known = [f"--{name.replace('_', '-')}" for name in ("config", *Config.model_fields)]
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
    config = load_config(overrides=options, config_file=parsed.config)
    configure_logging(level=config.log_level, log_format=config.log_format)
    from pipeserve import daemon  # loads torch, which no other command needs

    return daemon.serve(config)


def run_pull(parsed: argparse.Namespace) -> int:
    """The command `pull`."""
    options = {name: value for name, value in vars(parsed).items() if name == "cache_dir"}
    config = load_config(overrides=options)
    from pipeserve.hub import resolve_model

    print(resolve_model(parsed.model, cache_dir=config.cache_dir))
    return 0
