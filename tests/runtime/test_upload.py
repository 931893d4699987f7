"""Uploads: every byte where the file has it, whatever the buffers, and errors that arrive."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from pipeserve.errors import GGUFFormatError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import REFERENCE, backend_for
from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from pipeserve.models.loader import WeightReader, make_matrix
from pipeserve.runtime.upload import Uploader
from tests.models.test_quantised import write_mixed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upload")
    return write_mixed(folder / "m.gguf", GGMLQuantizationType.Q4_K, tied=False)


def matrices(file: GGUFFile) -> list[str]:
    return [name for name, info in file.tensors.items() if len(info.shape) == 2]


@pytest.mark.parametrize("read_ahead_bytes", [0, 100_000, 10**9])
@pytest.mark.parametrize("buffer_bytes", [1000, 2**20])
def test_bytes_are_the_files(path: Path, buffer_bytes: int, read_ahead_bytes: int) -> None:
    """Taken in another order than announced, with one never announced and one never taken."""
    with GGUFFile.open(path) as file:
        *announced, unannounced = matrices(file)
        wanted = [unannounced, *announced[1::2], *announced[2::2]]
        with Uploader(
            file, announced, CPU, buffer_bytes=buffer_bytes, read_ahead_bytes=read_ahead_bytes
        ) as uploader:
            for name in wanted:
                np.testing.assert_array_equal(uploader.take(name).numpy(), file.raw(name))


def test_no_more_is_read_ahead_than_agreed(path: Path) -> None:
    with GGUFFile.open(path) as file:
        names = matrices(file)
        limit = 2 * max(file.tensors[name].num_bytes for name in names)
        read: set[str] = set()
        read_into = file.read_into

        def recording(name: str, first_byte: int, buffer: memoryview) -> None:
            read.add(name)
            read_into(name, first_byte, buffer)

        file.read_into = recording  # type: ignore[method-assign]
        with Uploader(file, names, CPU, read_ahead_bytes=limit) as uploader:
            uploader.take(names[0])
        ahead = sum(file.tensors[name].num_bytes for name in read - {names[0]})
        assert 0 < ahead < 2 * limit
        assert read < set(names)


def test_a_file_that_became_shorter_is_an_error(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cut.gguf"
    copy.write_bytes(path.read_bytes())
    with GGUFFile.open(copy) as file:
        last = max(matrices(file), key=lambda name: file.tensors[name].offset)
        info = file.tensors[last]
        with copy.open("r+b") as out:
            out.truncate(info.offset + info.num_bytes // 2)
        with Uploader(file, [last], CPU) as uploader:
            with pytest.raises(GGUFFormatError, match=rf"ends inside the tensor {last}, at byte"):
                uploader.take(last)


def test_a_reader_takes_blocks_from_where_it_is_told(path: Path) -> None:
    backend = dataclasses.replace(REFERENCE, weight_form="planar")
    name = "blk.0.ffn_gate.weight"
    with GGUFFile.open(path) as file, Uploader(file, [], CPU, buffer_bytes=5000) as uploader:
        for upload in (uploader.take, None):
            reader = WeightReader(
                file, device=CPU, backend=backend, on_read=lambda name: None, upload=upload
            )
            np.testing.assert_array_equal(reader.rows(name).values, file.raw(name))


@pytest.mark.gpu
@pytest.mark.parametrize("type_name", [*LAYOUTS, "F16", "BF16", "F32"])
def test_a_card_gets_the_bytes_that_the_simple_way_gives(type_name: str, tmp_path: Path) -> None:
    """Buffers of a few rows, each used many times, while repacking runs between the takes."""
    path = write_mixed(tmp_path / "m.gguf", GGMLQuantizationType[type_name], tied=False)
    cuda = torch.device("cuda", 0)
    backend = backend_for(cuda)
    with GGUFFile.open(path) as file:
        names = [name for name in matrices(file) if file.tensors[name].type.name == type_name]
        with Uploader(file, names, cuda, buffer_bytes=7000, read_ahead_bytes=300_000) as uploader:
            fast = WeightReader(
                file, device=cuda, backend=backend, on_read=lambda name: None, upload=uploader.take
            )
            simple = WeightReader(file, device=cuda, backend=backend, on_read=lambda name: None)
            for name in names * 3:
                ours, theirs = (
                    make_matrix([reader.rows(name)], backend, "planar") for reader in (fast, simple)
                )
                assert_same(ours, theirs)


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(ours, torch.Tensor):
        assert isinstance(theirs, torch.Tensor)
        assert ours.dtype == theirs.dtype == torch.float16
        assert torch.equal(ours, theirs)
        return
    assert isinstance(ours, PlanarWeight) and isinstance(theirs, PlanarWeight)
    for part in ("low", "high", "scales", "mins", "supers"):
        got, wanted = getattr(ours, part), getattr(theirs, part)
        assert (got is None) == (wanted is None)
        assert got is None or torch.equal(got, wanted), part
