"""Config: every option of the daemon, written once. Immutable after load.

Precedence: command line, then environment (PIPESERVE_...), then the TOML file, then the default.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pipeserve.errors import ConfigError

ENV_PREFIX = "PIPESERVE_"

NOT_OPTIONS = frozenset({"PIPESERVE_REQUIRE_CUDA"})
"""Environment variables with the prefix that mean something else: this one is for the tests."""


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/pipeserve, or ~/.cache/pipeserve."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pipeserve"


class Config(BaseSettings):
    """Options of the daemon. The docstring under each field is its comment in
    config.example.toml, its help text on the command line and its line in the README."""

    # ruff: noqa: E501 - a docstring under a field is one sentence on one line

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix=ENV_PREFIX,
    )

    model: str = "demo"
    """What to serve: a path to a GGUF file (of a sharded one the first), demo, gemma3-270m, or hf:owner/repo/file.gguf."""
    served_model_name: str | None = None
    """The name that clients use; left out, it is taken from the model."""
    cache_dir: Path = Field(default_factory=default_cache_dir)
    """Where downloaded models, compiled GPU kernels and measured times are kept."""
    devices: Annotated[tuple[str, ...], NoDecode] = ("auto",)
    """One device per pipeline stage, such as ["cuda:0", "cuda:1"] or ["cpu", "cpu"], which are put in the fastest order unless layer_split is given; auto takes every GPU, or two CPU stages where there is none."""
    layout: Literal["auto", "pipeline", "replicas"] = "auto"
    """How devices work together: pipeline cuts the layers over all of them, replicas gives each (or as many as stages says) a whole model; where every device is a GPU of its own, auto takes what promises more output tokens per second by measured times, else a pipeline."""
    replicas: Annotated[int, Field(ge=1)] | None = None
    """Whole models that serve requests side by side, each on its share of devices in their order; left out, what layout and stages say."""
    stages: Annotated[int, Field(ge=1)] | None = None
    """Pipeline stages of each replica; left out, what layout and replicas say. Replicas times stages is the number of devices."""
    layer_split: Annotated[tuple[int, ...] | None, NoDecode] = None
    """Layers per stage, in the order of devices; left out, layers are timed on every kind of device and cut so that the slowest stage is as fast as possible within the memory."""
    weights: Literal["quantised", "both", "bf16", "fp8"] = "quantised"
    """How GPUs hold matrices: quantised keeps the file's types and sizes; both holds them dequantised as well, 2 more bytes per weight, and multiplies large batches by those; bf16 takes 2 bytes per weight, fp8 one (e4m3 with a scale per row, activations likewise per token or per 128 columns of it) except where that costs most: embedding, output head, first three layers, last layer, query, key and value rows stay bf16. All three multiply large batches faster. CPU stages always compute in float32."""
    activations: Literal["auto", "f16", "int8"] = "auto"
    """What GPUs multiply quantised weights by: f16, or int8 with a scale per 32, whatever the batch; auto takes int8 for few rows and f16 for more, whichever is faster."""
    threads_per_stage: Annotated[int, Field(ge=1)] = 1
    """Compute threads of a CPU stage."""
    context_length: Annotated[int, Field(ge=16)] | None = None
    """Most tokens in one sequence, prompt and output together; left out, what the model was trained for."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens per block of the KV cache."""
    kv_cache_bytes: Annotated[ByteSize, Field(ge=1)] | None = None
    """KV cache of each stage, such as "4GiB"; left out, 1 GiB on a CPU stage and on a GPU what weights, steps and graphs leave of it, but for 2 %."""
    memory_limit_bytes: Annotated[tuple[Annotated[ByteSize, Field(ge=1)], ...] | None, NoDecode] = (
        None
    )
    """Most memory that a stage may take for weights, steps and KV cache, such as "20GiB": one value for each of devices, or one for all; left out, all that is free on a GPU."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """Type of cached keys and values: auto is that of the activations; int8, with a scale per token and head, holds about twice the tokens of float16."""
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most sequences that run at once in a replica; left out, 256 for each GPU where all stages are on GPUs, else 64."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in one micro-batch, longer prompts are computed in chunks; left out, 2048 where all stages are on GPUs (4096 on cards of 64 GiB and more), else 256."""
    num_look_ahead: Annotated[int, Field(ge=0, le=1)] = 1
    """Decode steps that are queued before the previous step's tokens are known."""
    processes: Literal["auto", "one", "two"] = "auto"
    """Processes of the daemon: two give scheduler and stages one of their own, beside that for HTTP and text, which starts it again when it dies; auto is two where a stage is on a GPU or idle_unload_s is set."""
    hand_off: Literal["auto", "peer", "staged"] = "auto"
    """How stages on different GPUs hand over: peer copies from card to card, staged goes through the host's memory; auto tries whether peer copies arrive intact and stages where they do not."""
    max_queued_requests: Annotated[int, Field(ge=0)] = 256
    """Sequences that may wait for a place before further requests get status 429."""
    max_queued_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens that may wait for their first answer token before further requests get status 429; left out, any number."""
    request_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """How long one answer may take, waiting included; a request's own timeout can only shorten it. Left out, for ever."""
    prefix_cache: bool = True
    """Whether a prompt reads the KV blocks of others that begin with the same tokens."""
    mix_prefill: Literal["auto", "on", "off"] = "auto"
    """Whether prompt chunks are computed in the same micro-batch as decode rows; auto is on."""
    max_wait_s: Annotated[float, Field(gt=0)] = 30.0
    """Once in so many seconds the request that has waited longest goes first, whatever its priority and key."""
    max_body_bytes: Annotated[ByteSize, Field(ge=1024)] = ByteSize(8 * 1024**2)
    """Largest request body."""
    api_keys_file: Path | None = None
    """File with the API keys that clients may use, one `label key` a line, read again on SIGHUP; left out, everybody is let in."""
    max_connections: Annotated[int, Field(ge=1)] = 8192
    """Most HTTP connections at once; further ones are closed."""
    client_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """How long a client may take to send a request's head, to send its body, and to read what fills the buffers of its connection."""
    strict_fields: bool = False
    """Refuse requests with fields that are not known; left off, such fields are ignored."""
    text_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long parsing, templating and tokenising one request may take."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one and logs it."""
    stage_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A stage that makes no progress for this long is taken for stuck: the engine process is started again, or with one process the daemon ends."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    """How long running requests may take to finish after SIGTERM."""
    idle_unload_s: Annotated[float, Field(gt=0)] | None = None
    """After this long without a request the model leaves the devices, and the next request loads it again; left out, it stays."""
    otlp_endpoint: str | None = None
    """Where OpenTelemetry traces of requests are sent by HTTP, such as http://localhost:4318/v1/traces; needs the optional dependencies `tracing`. Left out, none are made."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """Shape of log lines; auto writes console lines to a terminal and JSON otherwise."""

    @field_validator("devices", "layer_split", "memory_limit_bytes", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        """On the command line and in the environment a list is written a,b,c; one value may stand
        for a list of it."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return (value,) if isinstance(value, int) else value

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        if not devices:
            raise ValueError("name at least one device, or auto")
        for device in devices:
            kind, _, index = device.partition(":")
            is_device = (kind == "cuda" and index.isdecimal()) or device == "cpu"
            if not is_device and devices != ("auto",):
                raise ValueError(f"{device!r} is none of cpu, cuda:N and (alone) auto")
        return devices

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.weights in ("bf16", "fp8") and self.activations != "auto":
            raise ValueError(
                f"activations is {self.activations!r} and weights {self.weights!r}, which knows no "
                "other activations than its own; leave activations out, or set weights = "
                "'quantised'"
            )
        if self.idle_unload_s is not None and self.processes == "one":
            raise ValueError(
                "idle_unload_s is set and processes is 'one', but only a process of its own gives "
                "all memory back when it ends; leave processes out, or set 'two'"
            )
        if self.devices != ("auto",):
            num_replicas = self.count_replicas(len(self.devices)) or 1
            self._check_split(len(self.devices) // num_replicas, num_replicas)
        return self

    def _check_split(self, num_stages: int, num_replicas: int) -> None:
        if self.layer_split is None or len(self.layer_split) == num_stages:
            return
        parts = f"layer_split has {len(self.layer_split)} parts"
        if num_replicas == 1:
            raise ValueError(
                f"{parts} but devices has {num_stages}; give one number of layers per device"
            )
        raise ValueError(
            f"{parts} but each of {num_replicas} replicas has {num_stages} stages; give one number "
            "of layers per stage, which holds for every replica"
        )

    def count_replicas(self, num_devices: int) -> int | None:
        """How many replicas the options ask for on so many devices; None: layout = "auto" may
        choose.

        Raises:
            ValueError: layout, replicas and stages contradict each other or the devices.
        """
        replicas, stages = self.replicas, self.stages
        if replicas is not None and stages is not None and replicas * stages != num_devices:
            raise ValueError(
                f"replicas = {replicas} times stages = {stages} is {replicas * stages}, but there "
                f"are {num_devices} devices; leave one of the two out, or change devices"
            )
        for name, value in (("replicas", replicas), ("stages", stages)):
            if value is not None and num_devices % value:
                raise ValueError(
                    f"{name} is {value}, which does not divide the {num_devices} devices evenly; "
                    f"change {name} or devices"
                )
        wanted = replicas or (num_devices // stages if stages else None)
        if self.layout == "pipeline" and wanted not in (None, 1):
            raise ValueError(
                "layout is 'pipeline', which has one replica with a stage on every device, but "
                f"replicas and stages ask for {wanted} replicas; leave layout out or set 'replicas'"
            )
        if wanted is None and self.layout != "auto":
            return 1 if self.layout == "pipeline" else num_devices
        return 1 if num_devices == 1 else wanted


def load_config(
    *,
    overrides: Mapping[str, Any],
    config_file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Put the sources together: overrides over environment over file over defaults.

    Raises:
        ConfigError: a file that cannot be read, an unknown key or a value out of range; the text
            names key, value and mend.
    """
    file_values = _read_toml(config_file) if config_file else {}
    _check_names(file_values, f"in {config_file}")
    variables = [name for name in environ if name.startswith(ENV_PREFIX)]
    env_keys = {n.removeprefix(ENV_PREFIX).lower(): n for n in variables if n not in NOT_OPTIONS}
    _check_names(env_keys, "in the environment (after PIPESERVE_)")
    env_values = {key: environ[name] for key, name in env_keys.items()}
    try:
        return Config(**{**file_values, **env_values, **overrides})
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _check_names(keys: Mapping[str, object], where: str) -> None:
    for key in keys:
        if key not in Config.model_fields:
            nearest = difflib.get_close_matches(key, Config.model_fields, n=1, cutoff=0.0)
            raise ConfigError(f"unknown option {key!r} {where}; the nearest known is {nearest[0]}")


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in problem["loc"])
        lines.append(f"{place} = {problem['input']!r}: {message}" if place else message)
    return "; ".join(lines)
