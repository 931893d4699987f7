"""Keeps measured times in cache_dir/timings, one JSON file for everything that decides them.

A file that cannot be read is measured again, a folder that cannot be written holds nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

import pipeserve
from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.tuned_files import file_stem, find_table, own_folder
from pipeserve.models.config import ModelConfig
from pipeserve.runtime.cost_model import DeviceTimes
from pipeserve.runtime.layer_times import layer_kinds, timing_sizes
from pipeserve.runtime.loading import stage_backend

_FORMAT = 1
"""Raise it when times come to mean something else."""
_TIMES = TypeAdapter(DeviceTimes)
_MEASURED_CODE = ("kernels", "models", "runtime/layer_times.py", "runtime/step_computation.py")
_CODE_SUFFIXES = frozenset({".py", ".cu"})
_OPTIONS = ("weights", "activations", "kv_cache_dtype", "threads_per_stage", "block_size")

Key = Mapping[str, Any]


def timing_key(
    gguf_file: GGUFFile,
    model: ModelConfig,
    device: torch.device,
    *,
    config: Config,
    facts: PipelineFacts,
) -> Key:
    """All that the times depend on: device, software, model shape and tensor types, options,
    steps."""
    kinds = layer_kinds(gguf_file, model.num_layers, stage_backend(device, config))
    named = {"output.weight", "token_embd.weight"} & gguf_file.tensors.keys()
    return {
        "format": _FORMAT,
        "device": device_name(device),
        "tuned": _tuned_digest(device, config),
        "software": f"{pipeserve.__version__} {_code_digest()} {torch.__version__}",
        "model": str(dataclasses.replace(model, num_layers=0)),
        "kinds": sorted(set(kinds)),
        "head": [gguf_file.tensors[name].type.name for name in sorted(named)],
        "options": {name: getattr(config, name) for name in _OPTIONS},
        "context_length": facts.context_length,
        "sizes": dataclasses.asdict(timing_sizes(facts, device)),
    }


def device_name(device: torch.device) -> str:
    """The same for devices of equal speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {_cpu_name()}, {os.cpu_count()} cores"


def cached_times(folder: Path, key: Key, measure: Callable[[], DeviceTimes]) -> DeviceTimes:
    """What the folder holds under this key, else what is measured now, which is then kept."""
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / f"{file_stem(key['device'])}-{digest}.json"
    times = _read(path, json.loads(text))
    if times is None:
        times = measure()
        _write(path, {"key": key, "times": _TIMES.dump_python(times, mode="json")})
    return times


def _read(path: Path, key: Key) -> DeviceTimes | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return _TIMES.validate_python(stored["times"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        pass
    return None


def _write(path: Path, stored: object) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()


@cache
def _code_digest() -> str:
    """Of the code whose speed is measured, which may change under one version."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for name in _MEASURED_CODE:
        place = root / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in _CODE_SUFFIXES:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _tuned_digest(device: torch.device, config: Config) -> str | None:
    """Of the measured kernel choices for the card, which may be the user's own."""
    path = find_table(device_name(device), own_folder(config.cache_dir))
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def _cpu_name() -> str:
    """As the kernel knows it; else the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1] if found else platform.machine()
