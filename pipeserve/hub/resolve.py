"""resolve_model: what the user calls a model -> the path of its GGUF file on this machine.

Decides which of the four forms a name has; fetching and checking are the store's.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pipeserve.errors import HubError
from pipeserve.hub.huggingface import HubFile, gguf_names
from pipeserve.hub.pinned import PINNED_MODELS, PinnedModel
from pipeserve.hub.shards import shard_names
from pipeserve.hub.store import WantedFile, is_verified, obtain

_HUB_PREFIX = "hf:"
_HUB_FORM = "hf:owner/repo/file.gguf"


def resolve_model(
    model: str,
    *,
    cache_dir: Path,
    show_progress: bool = True,
    pinned: Mapping[str, PinnedModel] = PINNED_MODELS,
) -> Path:
    """Return the local GGUF file that `model` names, fetched into cache_dir where need be.

    Args:
        model: a pinned name (demo, gemma3-270m), hf:owner/repo/file.gguf, or a path. Of a
            sharded set the first file; the others are then there too, in the same folder.
        cache_dir: pinned files lie in its models/, hub files in its hub/owner/repo/. A checked
            file is used without asking anybody; delete it to fetch it anew.
        show_progress: show bars on a terminal.
        pinned: the models known by name.

    Raises:
        HubError: the name means nothing, or the file cannot be had; says what to do.
    """
    cache_dir = cache_dir.expanduser()
    if model in pinned:
        return _resolve_pinned(pinned[model], cache_dir, show_progress=show_progress)
    if model.startswith(_HUB_PREFIX):
        return _resolve_hub(model, cache_dir, show_progress=show_progress)
    path = Path(model).expanduser()
    # os.path's tests answer False where Path's raise: on names too long or folders kept shut.
    if model and (path.suffix == ".gguf" or os.path.exists(path)):
        return _resolve_path(path)
    raise HubError(_unknown(model, pinned))


def _resolve_pinned(model: PinnedModel, cache_dir: Path, *, show_progress: bool) -> Path:
    wanted = WantedFile(
        path=cache_dir / "models" / model.file_name,
        num_bytes=model.num_bytes,
        sha256=model.sha256,
    )
    return obtain(wanted, model.sources, show_progress=show_progress)


def _resolve_hub(model: str, cache_dir: Path, *, show_progress: bool) -> Path:
    first = _parse_hub(model)
    folder = cache_dir / "hub" / first.repo_id / PurePosixPath(first.file_name).parent
    paths = []
    for name in shard_names(PurePosixPath(first.file_name).name):
        path = folder / name
        paths.append(path)
        if is_verified(path):
            continue
        file_name = str(PurePosixPath(first.file_name).with_name(name))
        file = dataclasses.replace(first, file_name=file_name)
        facts = file.describe()
        wanted = WantedFile(path=path, num_bytes=facts.num_bytes, sha256=facts.sha256)
        file = dataclasses.replace(file, revision=facts.commit or file.revision)
        obtain(wanted, (file,), show_progress=show_progress)
    return paths[0]


def _parse_hub(model: str) -> HubFile:
    """hf:owner/repo/[folder/]file.gguf -> HubFile; every part must be usable as a file name."""
    parts = model.removeprefix(_HUB_PREFIX).split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise HubError(f"{model!r} is not of the form {_HUB_FORM}")
    if len(parts) >= 3 and parts[-1].endswith(".gguf"):
        return HubFile(repo_id="/".join(parts[:2]), file_name="/".join(parts[2:]))
    problem = f"{model!r} names no GGUF file; write {_HUB_FORM}"
    names = gguf_names("/".join(parts[:2])) if len(parts) >= 2 else []
    if names:
        problem += f". That repository holds: {', '.join(names)}"
    raise HubError(problem)


def _resolve_path(path: Path) -> Path:
    if os.path.isdir(path):
        names = sorted(file.name for file in path.glob("*.gguf"))
        held = f"it holds {', '.join(names)}" if names else "it holds no .gguf file"
        raise HubError(f"{path} is a folder; name a file ({held})")
    if not os.path.exists(path):
        raise HubError(f"{path}: no such file, or this user may not see it{_hub_hint(path)}")
    shards = shard_names(path.name)
    missing = [name for name in shards if not os.path.isfile(path.parent / name)]
    if missing:
        raise HubError(
            f"{path} is the first of {len(shards)} shards, but {path.parent} lacks "
            f"{', '.join(missing)}; put all shards into one folder"
        )
    return path


def _hub_hint(path: Path) -> str:
    looks_remote = not path.is_absolute() and len(path.parts) >= 3 and path.parts[0][0] not in ".~"
    return f"; a file on the Hugging Face hub is written hf:{path}" if looks_remote else ""


def _unknown(model: str, pinned: Mapping[str, PinnedModel]) -> str:
    nearest = difflib.get_close_matches(model, pinned, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return (
        f"{model!r} is not a model: give {', '.join(pinned)}, {_HUB_FORM} or the path of a GGUF "
        f"file.{hint}"
    )
