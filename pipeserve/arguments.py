"""Arguments: fields of Config and lists of numbers as options of a command line. No torch."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterable
from pathlib import Path

from pipeserve.config import Config

LAYOUT_OPTIONS = frozenset(("layout", "replicas", "stages"))
"""Fields of Config that say how many pipelines there are."""

HTTP_OPTIONS = LAYOUT_OPTIONS | frozenset(
    {
        *("served_model_name", "max_queued_requests", "max_body_bytes", "text_timeout_s"),
        *("processes", "host", "port", "drain_timeout_s", "log_level", "log_format"),
        *("max_queued_tokens", "request_timeout_s"),
        *("api_keys_file", "max_connections", "client_timeout_s", "idle_unload_s"),
        "otlp_endpoint",
    }
)
"""Fields of Config that mean nothing to commands without the front half."""


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Give a command --config and these fields of Config."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with options")
    for name in names:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(name, Config.model_fields[name].annotation),
            help=_help(name),
        )


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


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    return tuple(count(part.strip()) for part in text.split(","))
