"""What Triton needs of the machine to compile kernels: a folder to keep them and a C compiler.

Knows neither Triton nor torch: `keep_kernels_in` comes before either is imported.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from pipeserve.errors import ConfigError

CACHE_VARIABLE = "TRITON_CACHE_DIR"


def keep_kernels_in(cache_dir: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have Triton keep compiled kernels in cache_dir/triton, unless the user named a folder."""
    environ.setdefault(CACHE_VARIABLE, str(cache_dir.expanduser().absolute() / "triton"))


def check_toolchain(
    environ: Mapping[str, str] = os.environ, python_headers: Path | None = None
) -> None:
    """Raise unless kernels can be compiled and kept; for daemons with a stage on a GPU.

    Triton compiles a small launcher in C against Python's headers at run time. It takes $CC, or
    gcc or clang from the path (triton/runtime/build.py of Triton 3.6).

    Raises:
        ConfigError: no compiler, no headers, or a cache folder that cannot be written.
    """
    _check_compiler(environ)
    headers = python_headers or _python_headers()
    if not (headers / "Python.h").is_file():
        raise ConfigError(
            f"GPU kernels are compiled against Python's headers, but {headers}/Python.h is not "
            "there; install them (Debian and Ubuntu: apt install python3-dev)"
        )
    _check_cache(environ)


def _check_compiler(environ: Mapping[str, str]) -> None:
    search_path = environ.get("PATH")
    named = environ.get("CC")
    if named is not None:
        if shutil.which(named, path=search_path) is None:
            raise ConfigError(
                f"GPU kernels need a C compiler, but CC={named} is not a program; "
                "name one by its path, without arguments, or unset CC"
            )
        return
    if not any(shutil.which(name, path=search_path) for name in ("gcc", "clang")):
        raise ConfigError(
            "GPU kernels need a C compiler, and neither gcc nor clang is on the PATH; install one "
            "(Debian and Ubuntu: apt install gcc) or set CC=/path/to/compiler"
        )


def _python_headers() -> Path:
    # Debian's own Python names a scheme below /usr/local, where it installs no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return Path(sysconfig.get_paths(scheme=scheme)["include"])


def _check_cache(environ: Mapping[str, str]) -> None:
    folder = environ.get(CACHE_VARIABLE)
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"compiled GPU kernels cannot be kept in {folder}: {error.strerror}; "
            f"set cache_dir, or {CACHE_VARIABLE}, to a folder that can be written"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"compiled GPU kernels cannot be kept in {folder}, which is not writable; "
            f"set cache_dir, or {CACHE_VARIABLE}, to a folder that is"
        )
