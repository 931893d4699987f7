"""ApiKeys: who may ask, and by which label a key goes in logs and metrics.

Runs on the event loop; only `read` touches a file. Keeps hashes, never the keys themselves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pipeserve.errors import ConfigError, UnauthorizedError

ANYBODY = "anybody"
"""The label of every request where no keys are set."""

MIN_KEY_CHARACTERS = 16
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ApiKeys:
    """The keys that are taken; without any, everybody is let in. Immutable."""

    def __init__(self, labels: Mapping[bytes, str]) -> None:
        """labels: by SHA-256 of the key."""
        self._labels = MappingProxyType(dict(labels))

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """One key a line, `label key` or only `key`; # begins a comment. None: no keys.

        Raises:
            ConfigError: the file cannot be read, holds no key, or a line is malformed. The text
                never holds a key.
        """
        if path is None:
            return cls({})
        try:
            lines = path.expanduser().read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"api_keys_file {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"api_keys_file {path} is not UTF-8 text") from None
        labels: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if words:
                digest, label = _parse(words, f"api_keys_file {path}, line {number}")
                labels[digest] = label
        if not labels:
            raise ConfigError(
                f"api_keys_file {path} holds no key, so nobody could ask; add one, or leave "
                "api_keys_file out to let everybody in"
            )
        return cls(labels)

    def label_of(self, authorization: str | None) -> str:
        """The label of the key in an Authorization header.

        Raises:
            UnauthorizedError: keys are set, and this is none of them.
        """
        if not self._labels:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError("send an API key: Authorization: Bearer KEY")
        # What a lookup by hash takes tells nothing of how much of a key is right.
        label = self._labels.get(_digest(key.strip()))
        if label is None:
            raise UnauthorizedError("this API key is not known here; ask the operator for one")
        return label


def _parse(words: list[str], where: str) -> tuple[bytes, str]:
    if len(words) > 2:
        raise ConfigError(f"{where}: write `label key` or only `key`")
    key = words[-1]
    if len(key) < MIN_KEY_CHARACTERS:
        raise ConfigError(
            f"{where}: the key has {len(key)} characters; take at least {MIN_KEY_CHARACTERS}, "
            "such as `openssl rand -hex 24` gives"
        )
    digest = _digest(key)
    label = words[0] if len(words) == 2 else f"key-{digest.hex()[:8]}"
    if not _LABEL.fullmatch(label):
        raise ConfigError(f"{where}: a label has 1 to 64 letters, digits, dots, dashes")
    return digest, label


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
