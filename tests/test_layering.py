"""The import rule of the house: who may import whom, and the two walls (torch, asyncio).

Reads every import statement of pipeserve, wherever it stands: in functions and behind
TYPE_CHECKING too. A planted violation of each kind shows that the reader sees it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeserve

ROOT = Path(pipeserve.__file__).parent

BELOW_DAEMON = {
    "errors", "kernels", "config", "log", "notify", "core", "gguf", "hub", "text", "engine",
    "models", "runtime", "server", "bench", "toolchain", "progress", "planning", "signals",
    "arguments",
}  # fmt: skip

HALVES = {
    "engine_half", "engine_process", "engine_host", "restarts", "served_model", "layout",
    "replicated_engine", "ports", "reload", "watchdog",
}  # fmt: skip

MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "kernels": set(),
    "config": {"errors"},
    "core": {"errors"},
    "gguf": {"errors"},
    "hub": {"errors"},
    "arguments": {"config"},
    "log": {"config", "errors"},
    "notify": set(),
    "progress": {"core"},
    "text": {"gguf", "core", "errors"},
    "engine": {"core", "config", "errors"},
    "models": {"kernels", "gguf", "core", "errors"},
    "runtime": {"models", "kernels", "gguf", "core", "config", "errors"},
    "server": {"engine", "text", "core", "config", "errors"},
    "bench": BELOW_DAEMON,
    "planning": {"runtime", "models", "gguf", "hub", "config", "core", "layout", "toolchain"},
    "toolchain": {"errors"},
    "restarts": set(),
    "signals": set(),
    "ports": {"errors"},
    "reload": {"config", "errors", "log", "notify", "server"},
    "watchdog": {"engine", "errors", "notify", "server"},
    "served_model": {"config", "gguf", "hub", "text", "server"},
    "layout": {"config", "core", "errors"},
    "engine_half": {
        *("engine", "runtime", "text", "gguf", "core", "config", "toolchain", "layout"),
    },
    "engine_child": {"engine_half", "engine", "log", "errors", "toolchain"},
    "engine_process": {"engine", "core", "errors"},
    "engine_host": {"engine_half", "engine_process", "engine", "core", "config", "toolchain"},
    "replicated_engine": {"engine_host", "engine", "restarts", "core", "errors"},
    "daemon": BELOW_DAEMON | HALVES,
    "cli": BELOW_DAEMON | {"daemon"},
    "__main__": {"cli"},
}
"""Room (top-level module or package) -> the other rooms that it may import."""

TORCH = frozenset({"torch", "triton"})
EVENT_LOOP = frozenset({"asyncio", "aiohttp"})
WALLS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("server", "engine", "config", "errors", "cli", "log", "notify", "hub"), TORCH),
    **dict.fromkeys(("daemon", "served_model", "engine_host", "replicated_engine"), TORCH),
    **dict.fromkeys(("ports", "signals", "reload", "watchdog", "arguments"), TORCH),
    **dict.fromkeys(
        ("engine_process", "engine_child", "toolchain", "restarts", "layout"), TORCH | EVENT_LOOP
    ),
    **dict.fromkeys(("runtime", "models", "kernels", "engine_half", "planning"), EVENT_LOOP),
    **dict.fromkeys(("core", "text", "gguf"), TORCH | EVENT_LOOP),
}
"""Room -> libraries that it must not import. gguf, hub and log stay clear of torch because
text and the command line import them."""


def room_of(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").parts[0]


def package_of(path: Path, root: Path) -> list[str]:
    """The dotted package that relative imports in this file start from."""
    return ["pipeserve", *path.relative_to(root).parent.parts]


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that the module imports, wherever."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                origin = ".".join([*base, *([module] if module else [])])
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def violations(root: Path) -> list[str]:
    """Every import under root that the table or a wall forbids, as FILE:LINE text."""
    found = []
    for path in sorted(root.rglob("*.py")):
        room = room_of(path, root)
        where = path.relative_to(root)
        if room not in MAY_IMPORT:
            found.append(f"{where}: {room} has no line in the import rule")
            continue
        tree = ast.parse(path.read_text())
        for line, name in imported_names(tree, package_of(path, root)):
            first, *rest = name.split(".")
            if first in WALLS.get(room, ()):
                found.append(f"{where}:{line}: {room} must not import {first}")
            if first != "pipeserve" or not rest:
                continue
            target = rest[0]
            is_room = target in MAY_IMPORT or (root / target).is_dir()
            if is_room and target != room and target not in MAY_IMPORT[room]:
                found.append(f"{where}:{line}: {room} must not import {target}")
    return found


def test_nobody_imports_upwards_or_through_a_wall() -> None:
    assert violations(ROOT) == []


def test_the_reader_sees_the_real_tree() -> None:
    assert {room_of(path, ROOT) for path in ROOT.rglob("*.py")} >= {"core", "engine", "hub"}
    tree = ast.parse((ROOT / "core" / "sampling.py").read_text())
    names = {name for _, name in imported_names(tree, ["pipeserve", "core"])}
    assert "pipeserve.errors.InvalidParameterError" in names


@pytest.mark.parametrize(
    ("file", "statement", "complaint"),
    [
        ("engine/a.py", "import torch", "engine must not import torch"),
        ("engine/a.py", "import torch.nn as nn", "engine must not import torch"),
        ("server/a.py", "from triton.language import exp", "server must not import triton"),
        ("runtime/a.py", "import asyncio.queues", "runtime must not import asyncio"),
        ("models/a.py", "from aiohttp import web", "models must not import aiohttp"),
        ("text/a.py", "def f():\n    import torch", "text must not import torch"),
        (
            "core/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import asyncio",
            "core must not import asyncio",
        ),
        ("cli.py", "import importlib\nimportlib.import_module('torch')", "cli must not import"),
        ("config.py", "__import__('torch.nn')", "config must not import torch"),
        ("engine/a.py", "from pipeserve.text import x", "engine must not import text"),
        ("engine/a.py", "import pipeserve.runtime.stage", "engine must not import runtime"),
        ("engine/a.py", "from pipeserve import server", "engine must not import server"),
        ("engine/a.py", "from ..server import app", "engine must not import server"),
        ("engine/a.py", "from .. import server", "engine must not import server"),
        ("engine/deep/a.py", "from ...hub import x", "engine must not import hub"),
        ("errors.py", "from pipeserve.core import batch", "errors must not import core"),
        ("kernels/a.py", "from pipeserve.errors import X", "kernels must not import errors"),
        ("bench/a.py", "import pipeserve.daemon", "bench must not import daemon"),
        ("daemon.py", "from pipeserve import cli", "daemon must not import cli"),
        ("daemon.py", "def f():\n    import torch", "daemon must not import torch"),
        ("engine_half.py", "import asyncio", "engine_half must not import asyncio"),
        ("engine_process.py", "import pipeserve.runtime", "engine_process must not import runtime"),
        ("attic/a.py", "", "attic has no line in the import rule"),
    ],
)
def test_a_planted_violation_is_found(
    file: str, statement: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(statement)
    found = violations(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("engine/a.py", "import pipeserve\nfrom pipeserve import __version__"),
        ("engine/a.py", "import asyncio\nfrom . import b\nfrom .b import torch"),
        ("engine/a.py", "from pipeserve.core.batch import MicroBatch\nfrom ..errors import X"),
        ("runtime/a.py", "import torch\nimport pipeserve.models.llama"),
        ("cli.py", "def serve():\n    from pipeserve import daemon"),
    ],
)
def test_allowed_imports_pass(file: str, statement: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(statement)
    assert violations(tmp_path) == []


def test_the_front_half_loads_without_torch() -> None:
    """What the table cannot see: a library in between that brings torch in."""
    rooms = sorted(room for room, walled in WALLS.items() if "torch" in walled)
    script = (
        "import importlib, pkgutil, sys, pipeserve\n"
        "rooms = set(sys.argv[1:])\n"
        "found = pkgutil.walk_packages(pipeserve.__path__, 'pipeserve.')\n"
        "names = [m.name for m in found if m.name.split('.')[1] in rooms]\n"
        "for name in names: importlib.import_module(name)\n"
        "assert len(names) > len(rooms), names\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *rooms], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
