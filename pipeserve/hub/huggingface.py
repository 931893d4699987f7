"""Files on the Hugging Face hub or a mirror of it, through huggingface-hub's own HTTP functions.

Not hf_hub_download: since version 1 it throws away the partial file when a download ends early,
and it checks a file's size but not its hash. HF_ENDPOINT and HF_TOKEN are honoured.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # no __all__
from tqdm import tqdm

from pipeserve.errors import HubError

_MAX_NAMES = 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFileFacts:
    """What the hub says about a file before it is fetched."""

    num_bytes: int
    sha256: str | None
    """None for small files that lie in git itself: their ETag is git's own hash."""
    commit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """One file of one model repository; a source for the store."""

    repo_id: str
    """owner/repo"""
    file_name: str
    """Path inside the repository."""
    revision: str = "main"

    @property
    def label(self) -> str:
        return f"the hub (hf:{self.repo_id}/{self.file_name})"

    def describe(self) -> HubFileFacts:
        """Ask the hub for the file's size, hash and commit.

        Raises:
            HubError: the file, the access or the network is missing.
        """
        with self._named_errors():
            facts = get_hf_file_metadata(self._url(), endpoint=_endpoint())
        if facts.size is None:
            raise HubError(f"{_endpoint()} does not say how large {self.file_name} is")
        etag = facts.etag or ""
        return HubFileFacts(
            num_bytes=facts.size,
            sha256=etag if _SHA256.fullmatch(etag) else None,
            commit=facts.commit_hash,
        )

    def fetch(self, part: Path, *, num_bytes: int, show_progress: bool) -> None:
        """Append to `part` what is missing of the file's num_bytes.

        A connection that breaks is taken up again a few times; `part` stays for a later call.

        Raises:
            HubError: as describe; or another number of bytes arrived than was announced.
        """
        if num_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise HubError(
                f"{self.file_name} has {num_bytes} bytes and the hub serves files of more than "
                f"{constants.MAX_HTTP_DOWNLOAD_SIZE} through Xet only; run `hf download "
                f"{self.repo_id} {self.file_name} --local-dir DIR` and give the path as the model"
            )
        with self._named_errors(), part.open("ab") as file:
            http_get(
                self._url(),
                file,
                resume_size=part.stat().st_size,
                headers=build_hf_headers(),
                expected_size=num_bytes,
                displayed_filename=Path(self.file_name).name,
                tqdm_class=_TerminalBar if show_progress else _SilentBar,
            )

    def _url(self) -> str:
        return hf_hub_url(
            self.repo_id, self.file_name, revision=self.revision, endpoint=_endpoint()
        )

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn huggingface-hub's and httpx2's errors into one that says what to do."""
        try:
            yield
        except (EntryNotFoundError, RevisionNotFoundError) as error:
            raise HubError(
                f"{self.repo_id} holds no {self.file_name}{_suggestion(self)}"
            ) from error
        except HfHubHTTPError as error:
            raise HubError(_http_problem(self, error)) from error
        except OfflineModeIsEnabled as error:
            raise HubError("HF_HUB_OFFLINE is set; unset it to fetch models") from error
        except HFValidationError as error:
            raise HubError(f"{self.repo_id} cannot be a repository's name: {error}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise HubError(
                f"no answer from {_endpoint()} ({type(error).__name__}: {error}); check the "
                "network, proxy and HF_ENDPOINT, then retry: what was fetched is kept"
            ) from error
        except OSError as error:
            if error.errno is not None:  # the disk's, and the store's to name
                raise
            # http_get's own complaint about the size; its advice is not for our users.
            raise HubError(
                f"{self.file_name} arrived with a wrong size, not the one that {_endpoint()} "
                "announced; retry, and tell the repository's owner if it stays so"
            ) from error


def gguf_names(repo_id: str) -> list[str]:
    """Names of a repository's GGUF files, empty where the hub does not tell."""
    try:
        names = HfApi(endpoint=_endpoint()).list_repo_files(repo_id)
    except (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled, HFValidationError):
        return []
    return [name for name in names if name.endswith(".gguf")]


def _endpoint() -> str:
    # Read at each call: huggingface-hub's own constant is what the variable was at import.
    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _suggestion(file: HubFile) -> str:
    names = gguf_names(file.repo_id)
    nearest = difflib.get_close_matches(file.file_name, names, n=3, cutoff=0.0)
    others = [name for name in names if name not in nearest]
    listed = [*nearest, *others][:_MAX_NAMES]
    return f"; its GGUF files are: {', '.join(listed)}" if listed else "; check the file's name"


def _http_problem(file: HubFile, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    page = f"{_endpoint()}/{file.repo_id}"
    if isinstance(error, GatedRepoError):
        return (
            f"{file.repo_id} is gated (status {status}): accept its licence at {page}, then set "
            "HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no model repository {file.repo_id} at {_endpoint()} (status {status}), or "
            "it is private: check the name, and set HF_TOKEN if it is private"
        )
    if status in (401, 403):
        return (
            f"{page} refuses access (status {status}): accept the licence there if it asks for "
            "that, and set HF_TOKEN to a valid token that may read it"
        )
    return f"{page} answers with status {status}; retry later: what was fetched is kept"


class _TerminalBar(tqdm):  # type: ignore[misc]
    """A bar that shows on a terminal only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, disable=None)


class _SilentBar(tqdm):  # type: ignore[misc]
    """A bar that never shows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, disable=True)
