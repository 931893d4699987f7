"""What GPU stages need of the machine is asked for before a weight is read, with the mend."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeserve.errors import ConfigError
from pipeserve.toolchain import CACHE_VARIABLE, check_toolchain, keep_kernels_in


@pytest.fixture
def machine(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """The environment and the headers of a machine that has everything, gcc as its compiler."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcc").touch(mode=0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    environ = {"PATH": str(tmp_path / "bin")}
    keep_kernels_in(tmp_path / "cache", environ)
    return environ, tmp_path / "include"


def test_a_complete_machine_passes(machine: tuple[dict[str, str], Path]) -> None:
    environ, headers = machine
    check_toolchain(environ, headers)
    assert Path(environ[CACHE_VARIABLE]).is_dir()
    compiler = Path(environ["PATH"]) / "gcc"
    compiler.rename(compiler.with_name("clang"))
    check_toolchain(environ, headers)
    check_toolchain({**environ, "PATH": "", "CC": str(compiler.with_name("clang"))}, headers)


def test_kernels_stay_where_the_user_wants_them(tmp_path: Path) -> None:
    environ = {CACHE_VARIABLE: "/somewhere/else"}
    keep_kernels_in(tmp_path, environ)
    assert environ == {CACHE_VARIABLE: "/somewhere/else"}
    environ.clear()
    keep_kernels_in(Path("relative"), environ)
    assert environ == {CACHE_VARIABLE: f"{Path.cwd()}/relative/triton"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PATH": "/nowhere"}, r"neither gcc nor clang.*apt install gcc.*CC=/path"),
        ({"CC": "no-such-cc"}, r"CC=no-such-cc is not a program"),
        ({"CC": "gcc -m64"}, r"CC=gcc -m64 is not a program.*without arguments"),
        ({CACHE_VARIABLE: "/proc/none"}, r"kept in /proc/none: No such file.*set cache_dir"),
    ],
)
def test_what_is_missing_is_named(
    machine: tuple[dict[str, str], Path], changes: dict[str, str], message: str
) -> None:
    environ, headers = machine
    with pytest.raises(ConfigError, match=message):
        check_toolchain({**environ, **changes}, headers)


def test_missing_headers_are_named(machine: tuple[dict[str, str], Path]) -> None:
    environ, headers = machine
    (headers / "Python.h").unlink()
    with pytest.raises(ConfigError, match=r"Python\.h is not there.*python3-dev"):
        check_toolchain(environ, headers)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_named(machine: tuple[dict[str, str], Path]) -> None:
    environ, headers = machine
    folder = Path(environ[CACHE_VARIABLE])
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    with pytest.raises(ConfigError, match="not writable"):
        check_toolchain(environ, headers)
