"""GGUFFile: what a valid file holds, what each broken one is called, and shards."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeserve.errors import GGUFFormatError, MissingTensorError
from pipeserve.gguf.quants import dequantise
from pipeserve.gguf.reader import GGUFFile
from tests.gguf.small_files import array, entry, raw_gguf, tensor, text, write_small_gguf

Kind = gguf.GGUFValueType
HUGE = 2**62


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_small_gguf(path)
    return path


def test_metadata_of_every_type(small_path: Path) -> None:
    with GGUFFile.open(small_path) as file:
        assert file.metadata_int("small.uint8") == 200
        assert file.metadata_int("small.int8") == -100
        assert file.metadata_int("small.uint64") == 2**63
        assert file.metadata_float("small.float32") == 0.5
        assert file.metadata_float("small.float64") == 0.25
        assert file.metadata_float("small.uint8") == 200.0
        assert file.metadata_bool("small.bool") is True
        assert file.metadata_str("small.text") == "grüße 🙂"
        assert file.metadata_array("small.numbers").tolist() == [1, 2, 3]
        assert file.metadata_array("small.bools").tolist() == [True, False]
        assert file.metadata_strings("small.texts") == ["a", "", "ß"]
        assert file.metadata["small.nested"] == [["a", "b"], ["c"]]
        assert file.file_size == small_path.stat().st_size


def test_default_is_used_only_where_the_key_is_absent(small_path: Path) -> None:
    with GGUFFile.open(small_path) as file:
        assert file.metadata_int("absent", 7) == 7
        assert file.metadata_bool("absent", False) is False
        with pytest.raises(GGUFFormatError, match="lacks the metadata key absent"):
            file.metadata_int("absent")
        with pytest.raises(GGUFFormatError, match=r"small\.text is of type str, not int"):
            file.metadata_int("small.text", 7)
        with pytest.raises(GGUFFormatError, match="of type bool, not int"):
            file.metadata_int("small.bool")
        with pytest.raises(GGUFFormatError, match="not an array of texts"):
            file.metadata_strings("small.nested")


def test_tensors_have_torch_shapes_and_their_values(small_path: Path, tmp_path: Path) -> None:
    values = write_small_gguf(tmp_path / "again.gguf")
    with GGUFFile.open(small_path) as file:
        assert list(file.tensors) == list(values)
        for name, expected in values.items():
            info = file.tensors[name]
            assert info.shape == expected.shape
            assert file.raw(name).nbytes == info.num_bytes
            np.testing.assert_array_equal(dequantise(info, file.raw(name)), expected)
        with pytest.raises(MissingTensorError, match="absent"):
            file.raw("absent")


def test_raw_is_a_read_only_view_that_outlives_close(small_path: Path) -> None:
    with GGUFFile.open(small_path) as file:
        raw = file.raw("weights.f32")
    assert raw.shape == (4, 64 * 4)
    assert not raw.flags.writeable
    assert not raw.flags.owndata
    assert raw.sum() > 0


def test_agrees_with_the_gguf_packages_reader(demo_model_path: Path) -> None:
    reader = gguf.GGUFReader(demo_model_path)
    with GGUFFile.open(demo_model_path) as file:
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert ours.shape == tuple(reversed(theirs.shape.tolist()))
            assert ours.type == theirs.tensor_type
            assert (ours.offset, ours.num_bytes) == (theirs.data_offset, theirs.n_bytes)
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                value = file.metadata[key]
                ours = value.tolist() if isinstance(value, np.ndarray) else value
                assert ours == field.contents(), key


LIST_OF_LISTS = array(Kind.ARRAY, 1, b"") * 5 + array(Kind.UINT8, 1, b"x")
BROKEN = {
    "empty": (b"", "is empty"),
    "three bytes": (b"GGU", "ends inside the magic number"),
    "wrong magic": (raw_gguf(magic=b"GGML"), "not a GGUF file"),
    "a web page": (b"<!DOCTYPE html>" * 99, "not a GGUF file"),
    "version 1": (raw_gguf(version=1), "has GGUF version 1; versions 2 and 3"),
    "version 4": (raw_gguf(version=4), "has GGUF version 4"),
    "big-endian": (raw_gguf(version=3 << 24), "big-endian"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "ends inside the number of tensors"),
    "absurd tensor count": (raw_gguf(num_tensors=HUGE), "tensors"),
    "absurd metadata count": (raw_gguf(num_metadata=HUGE), "metadata entries"),
    "one tensor too many": (
        raw_gguf(tensors=(tensor("a"),), num_tensors=2, data=bytes(128)),
        "ends inside|dimensions",
    ),
    "key longer than the file": (
        raw_gguf(metadata=(struct.pack("<Q", HUGE) + bytes(64),)),
        "ends inside the key of metadata entry 0",
    ),
    "key is not UTF-8": (
        raw_gguf(metadata=(struct.pack("<Q", 1) + b"\xff" + bytes(64),)),
        "key of metadata entry 0 is not UTF-8",
    ),
    "value is not UTF-8": (
        raw_gguf(metadata=(entry("k", Kind.STRING, struct.pack("<Q", 1) + b"\xff"),)),
        "k is not UTF-8",
    ),
    "unknown value type": (raw_gguf(metadata=(entry("k", 13, b""),)), "k has the unknown type 13"),
    "key twice": (raw_gguf(metadata=(entry("k", Kind.UINT8, b"1"),) * 2), "key k occurs twice"),
    "absurd array": (
        raw_gguf(metadata=(entry("k", Kind.ARRAY, array(Kind.UINT64, HUGE, b"")),)),
        "ends inside k",
    ),
    "absurd array of texts": (
        raw_gguf(metadata=(entry("k", Kind.ARRAY, array(Kind.STRING, HUGE, b"")),)),
        "ends inside k",
    ),
    "absurd array of arrays": (
        raw_gguf(metadata=(entry("k", Kind.ARRAY, array(Kind.ARRAY, HUGE, b"")),)),
        "ends inside k",
    ),
    "text in an array longer than the file": (
        raw_gguf(
            metadata=(
                entry("k", Kind.ARRAY, array(Kind.STRING, 2, text("a") + struct.pack("<Q", HUGE))),
            )
        ),
        "ends inside entry 1 of k",
    ),
    "text in an array is not UTF-8": (
        raw_gguf(
            metadata=(
                entry("k", Kind.ARRAY, array(Kind.STRING, 1, struct.pack("<Q", 1) + b"\xff")),
            )
        ),
        "entry 0 of k is not UTF-8",
    ),
    "unknown element type": (
        raw_gguf(metadata=(entry("k", Kind.ARRAY, array(99, 1, b"")),)),
        "unknown element type 99",
    ),
    "arrays too deep": (
        raw_gguf(metadata=(entry("k", Kind.ARRAY, LIST_OF_LISTS),)),
        "nested more than 4 deep",
    ),
    "no dimensions": (raw_gguf(tensors=(tensor("a", dimensions=()),)), "a has 0 dimensions"),
    "five dimensions": (raw_gguf(tensors=(tensor("a", dimensions=(1,) * 5),)), "5 dimensions"),
    "empty dimension": (raw_gguf(tensors=(tensor("a", dimensions=(0, 3)),)), "empty dimension"),
    "unknown tensor type": (raw_gguf(tensors=(tensor("a", tensor_type=139),)), "a has type 139"),
    "rows that are not whole blocks": (
        raw_gguf(tensors=(tensor("a", dimensions=(33,), tensor_type=8),)),
        "rows of 33 values, which is no multiple of Q8_0's block of 32",
    ),
    "absurd shape": (
        raw_gguf(tensors=(tensor("a", dimensions=(2**63, 2**63)),)),
        "ends inside tensor a",
    ),
    "absurd offset": (
        raw_gguf(tensors=(tensor("a", offset=2**64 - 32),)),
        "ends inside tensor a",
    ),
    "data cut off": (raw_gguf(tensors=(tensor("a"),), data=bytes(127)), "ends inside tensor a"),
    "offset off the grid": (raw_gguf(tensors=(tensor("a", offset=8),)), "not aligned to 32"),
    "overlap": (
        raw_gguf(tensors=(tensor("a", dimensions=(64,)), tensor("b", offset=128))),
        "tensors a and b overlap",
    ),
    "tensor twice": (
        raw_gguf(tensors=(tensor("a"), tensor("a", offset=128))),
        "tensor a occurs twice",
    ),
    "alignment 0": (
        raw_gguf(metadata=(entry("general.alignment", Kind.UINT32, bytes(4)),)),
        "alignment is 0, not a power of two",
    ),
    "alignment is a text": (
        raw_gguf(metadata=(entry("general.alignment", Kind.STRING, text("32")),)),
        "alignment is '32'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_named_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    content, problem = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFFormatError, match=problem) as caught:
        GGUFFile.open(path)
    assert str(caught.value).startswith(str(path))


def test_hand_made_file_is_valid(tmp_path: Path) -> None:
    """So that the cases above fail for their own reason."""
    path = tmp_path / "fine.gguf"
    path.write_bytes(
        raw_gguf(
            metadata=(entry("k", Kind.STRING, text("v")),),
            tensors=(tensor("a"), tensor("b", offset=128)),
        )
    )
    with GGUFFile.open(path) as file:
        assert file.metadata == {"k": "v"}
        assert list(file.tensors) == ["a", "b"]


def test_header_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeserve.gguf.header.MAX_HEADER_BYTES", 1000)
    path = tmp_path / "huge.gguf"
    path.write_bytes(raw_gguf(metadata=(entry("k", Kind.STRING, text("v" * 2000)),)))
    with pytest.raises(GGUFFormatError, match="header larger than"):
        GGUFFile.open(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(GGUFFormatError, match="cannot be read: No such file"):
        GGUFFile.open(tmp_path / "absent.gguf")
    with pytest.raises(GGUFFormatError, match="cannot be read: Is a directory"):
        GGUFFile.open(tmp_path)


def test_every_truncation_of_a_small_file_is_noticed(small_path: Path, tmp_path: Path) -> None:
    content = small_path.read_bytes()
    with GGUFFile.open(small_path) as file:
        last = max(info.offset + info.num_bytes for info in file.tensors.values())
    path = tmp_path / "cut.gguf"
    for length in range(0, last, 7):
        path.write_bytes(content[:length])
        with pytest.raises(GGUFFormatError):
            GGUFFile.open(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_file_opens_or_is_refused(
    data: st.DataObject, small_path: Path, tmp_path: Path
) -> None:
    content = bytearray(small_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = GGUFFile.open(path)
    except GGUFFormatError:
        return
    for name, info in file.tensors.items():
        assert dequantise(info, file.raw(name)).shape == info.shape


def write_shards(folder: Path, count: int) -> list[Path]:
    paths = []
    for index in range(count):
        path = folder / f"model-{index + 1:05}-of-{count:05}.gguf"
        path.write_bytes(
            raw_gguf(
                metadata=(
                    entry("general.name", Kind.STRING, text(f"shard {index}")),
                    entry("split.no", Kind.UINT16, struct.pack("<H", index)),
                    entry("split.count", Kind.UINT16, struct.pack("<H", count)),
                ),
                tensors=(tensor(f"t{index}"),),
                data=struct.pack("<f", index) * 32,
            )
        )
        paths.append(path)
    return paths


def test_shards_are_one_file(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 3)
    with GGUFFile.open(paths[0]) as file:
        assert file.metadata_str("general.name") == "shard 0"
        assert file.file_size == sum(path.stat().st_size for path in paths)
        for index, path in enumerate(paths):
            info = file.tensors[f"t{index}"]
            assert info.shard == path
            assert dequantise(info, file.raw(info.name)).tolist() == [index] * 32


def test_shard_that_is_missing_or_out_of_place(tmp_path: Path) -> None:
    first, second, third = write_shards(tmp_path, 3)
    with pytest.raises(GGUFFormatError, match="shard 2 of 3; give the first shard"):
        GGUFFile.open(second)
    kept = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(GGUFFormatError, match=r"00003-of-00003.*shard 1 \(from 0\) of 3"):
        GGUFFile.open(first)
    third.write_bytes(kept)
    second.unlink()
    with pytest.raises(GGUFFormatError, match=r"00002-of-00003.*No such file"):
        GGUFFile.open(first)
    alone = first.rename(tmp_path / "alone.gguf")
    with pytest.raises(GGUFFormatError, match=r"shard 0 .* of 3, but its name makes it"):
        GGUFFile.open(alone)


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, 2)
    second.write_bytes(second.read_bytes().replace(b"t1", b"t0"))
    with pytest.raises(GGUFFormatError, match=r"tensor t0 is in .* too"):
        GGUFFile.open(first)
