"""One verified file in the cache: fetched into FILE.part, checked, then renamed into place.

Whoever finds FILE may use it; FILE.verified remembers a checked hash, FILE.lock keeps two
processes from fetching at once. It must not know where the bytes come from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from pipeserve.errors import HubError

_CHUNK_BYTES = 1 << 20

log = logging.getLogger(__name__)


class Source(Protocol):
    """Somewhere that a file can be had from."""

    @property
    def label(self) -> str:
        """What to call it in an error."""

    def fetch(self, part: Path, *, num_bytes: int, show_progress: bool) -> None:
        """Write the file to `part`, or complete what an earlier attempt left there.

        Raises:
            HubError: it cannot be had from here.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedFile:
    """Where a file belongs and how to tell that it is the right one."""

    path: Path
    num_bytes: int
    sha256: str | None
    """Hexadecimal; None where nobody published it, so that only the size can be checked."""

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stamp:
    """A file as it was when its hash was checked."""

    num_bytes: int
    mtime_ns: int
    sha256: str | None


def is_verified(path: Path, *, sha256: str | None = None) -> bool:
    """Whether path has not changed since it was checked (against sha256, where that is given).

    Reads no more than the stamp: a changed byte under the same size and time goes unseen.
    """
    try:
        stamp = _Stamp(**json.loads(path.with_name(path.name + ".verified").read_text()))
        facts = path.stat()
    except (OSError, ValueError, TypeError):
        return False
    same_file = (facts.st_size, facts.st_mtime_ns) == (stamp.num_bytes, stamp.mtime_ns)
    return same_file and sha256 in (None, stamp.sha256)


def obtain(wanted: WantedFile, sources: Sequence[Source], *, show_progress: bool) -> Path:
    """Return wanted.path holding the right bytes; try the sources in order where it does not.

    Raises:
        HubError: no source had the right file, or the disk has no room or refuses writes.
    """
    if is_verified(wanted.path, sha256=wanted.sha256):
        return wanted.path
    try:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(wanted.beside(".lock")):
            if not is_verified(wanted.path, sha256=wanted.sha256):
                _mend(wanted, sources, show_progress=show_progress)
    except OSError as error:
        raise HubError(
            f"{error.filename or wanted.path}: {error.strerror or error}; "
            "make room there or choose another cache_dir"
        ) from error
    return wanted.path


def _mend(wanted: WantedFile, sources: Sequence[Source], *, show_progress: bool) -> None:
    """Check what lies at wanted.path; replace it where it is missing or wrong."""
    if wanted.path.is_file():
        problem = _mismatch(wanted.path, wanted, show_progress=show_progress)
        if problem is None:
            _write_stamp(wanted)
            return
        log.warning("%s is damaged (%s); fetching it again", wanted.path, problem)
    part = wanted.beside(".part")
    failures = []
    for source in sources:
        try:
            _fetch(wanted, source, part, show_progress=show_progress)
        except HubError as error:
            failures.append(f"\n  from {source.label}: {error}")
            continue
        os.replace(part, wanted.path)
        _write_stamp(wanted)
        return
    raise HubError(
        f"{wanted.path.name} could not be fetched{''.join(failures)}\n"
        f"Fetched by hand, it belongs at {wanted.path} ({wanted.num_bytes} bytes, "
        f"sha256 {wanted.sha256 or 'unknown'})."
    )


def _fetch(wanted: WantedFile, source: Source, part: Path, *, show_progress: bool) -> None:
    """Fill `part` from one source and verify it; a bad leftover costs one more try from zero."""
    num_left_bytes = part.stat().st_size if part.exists() else 0
    if num_left_bytes > wanted.num_bytes or wanted.sha256 is None:
        # Without a hash nothing could tell that the leftover belongs to the same version.
        part.unlink(missing_ok=True)
        num_left_bytes = 0
    free_bytes = shutil.disk_usage(part.parent).free
    if free_bytes < wanted.num_bytes - num_left_bytes:
        raise HubError(
            f"{part.parent} has {free_bytes} bytes free, {wanted.num_bytes - num_left_bytes} are "
            "needed; make room there or choose another cache_dir"
        )
    log.info("fetching %s (%d bytes) from %s", wanted.path, wanted.num_bytes, source.label)
    source.fetch(part, num_bytes=wanted.num_bytes, show_progress=show_progress)
    problem = _mismatch(part, wanted, show_progress=show_progress)
    if problem is None:
        return
    part.unlink()
    if not num_left_bytes:
        raise HubError(f"what arrived is not the right file: {problem}")
    log.warning("%s was completed from an unusable leftover; starting over", wanted.path)
    _fetch(wanted, source, part, show_progress=show_progress)


def _mismatch(path: Path, wanted: WantedFile, *, show_progress: bool) -> str | None:
    """What is wrong with the file at path, or None."""
    num_bytes = path.stat().st_size
    if num_bytes != wanted.num_bytes:
        return f"it has {num_bytes} bytes, not {wanted.num_bytes}"
    if wanted.sha256 is None:
        return None
    sha256 = _sha256_of(path, show_progress=show_progress)
    return None if sha256 == wanted.sha256 else f"its sha256 is {sha256}, not {wanted.sha256}"


def _sha256_of(path: Path, *, show_progress: bool) -> str:
    digest = hashlib.sha256()
    with (
        path.open("rb") as file,
        progress_bar("verifying", path.stat().st_size, show_progress=show_progress) as bar,
    ):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def progress_bar(what: str, num_bytes: int, *, show_progress: bool) -> tqdm:
    """A bar on stderr, shown on a terminal only."""
    return tqdm(
        desc=what,
        total=num_bytes,
        unit="B",
        unit_scale=True,
        disable=None if show_progress else True,
    )


def _write_stamp(wanted: WantedFile) -> None:
    facts = wanted.path.stat()
    stamp = _Stamp(num_bytes=facts.st_size, mtime_ns=facts.st_mtime_ns, sha256=wanted.sha256)
    wanted.beside(".verified").write_text(json.dumps(asdict(stamp)))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on path; the kernel lets go of it when the process ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is fetching %s; waiting for it", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
