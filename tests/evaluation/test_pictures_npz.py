"""The streamed .npz against numpy's own, and files past 4 GiB."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mixflow_fast.evaluation.pictures_npz import NpzWriter, check_npz, map_npz

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def write(path: Path, array: np.ndarray, size: int) -> None:
    data = array.tobytes()
    with NpzWriter(path, array.shape) as writer:
        for start in range(0, len(data), size):
            writer.add(data[start : start + size])


def test_the_member_is_that_of_numpy(tmp_path: Path) -> None:
    np.savez(tmp_path / "numpy.npz", PICTURES)
    for size in (1, 50, 10_000):
        write(tmp_path / "ours.npz", PICTURES, size)
        with (
            zipfile.ZipFile(tmp_path / "ours.npz") as ours,
            zipfile.ZipFile(tmp_path / "numpy.npz") as theirs,
        ):
            assert ours.namelist() == theirs.namelist() == ["arr_0.npy"]
            assert ours.read("arr_0.npy") == theirs.read("arr_0.npy")
            mine, other = ours.getinfo("arr_0.npy"), theirs.getinfo("arr_0.npy")
            assert (mine.CRC, mine.file_size) == (other.CRC, other.file_size)
            assert mine.compress_type == zipfile.ZIP_STORED
    first = (tmp_path / "ours.npz").read_bytes()
    write(tmp_path / "again.npz", PICTURES, 50)
    assert (tmp_path / "again.npz").read_bytes() == first
    with np.load(tmp_path / "ours.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], PICTURES)
    check_npz(tmp_path / "ours.npz", PICTURES.shape)


def test_it_is_mapped_and_not_read(tmp_path: Path) -> None:
    write(tmp_path / "x.npz", PICTURES, 50)
    np.savez(tmp_path / "numpy.npz", PICTURES, labels=np.arange(7))
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(PICTURES))
    for name in ("x.npz", "numpy.npz", "fortran.npz"):
        found = map_npz(tmp_path / name)
        assert isinstance(found, np.memmap) and not found.flags.writeable
        assert np.array_equal(found, PICTURES)
    assert map_npz(tmp_path / "numpy.npz", "labels").tolist() == list(range(7))
    np.savez_compressed(tmp_path / "small.npz", PICTURES)
    assert np.array_equal(map_npz(tmp_path / "small.npz"), PICTURES)


def test_adms_reader_streams_it(tmp_path: Path) -> None:
    """What its evaluator does: the member as a stream, its header by numpy, then rows."""
    write(tmp_path / "x.npz", PICTURES, 50)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("arr_0.npy") as stream:
        assert np.lib.format.read_magic(stream) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        assert (shape, fortran, dtype) == (PICTURES.shape, False, np.uint8)
        rows = np.frombuffer(stream.read(), dtype).reshape(shape)
    assert np.array_equal(rows, PICTURES)


def test_damage_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match="x.npz: 20 bytes of pictures are lacking"):
        with NpzWriter(path, PICTURES.shape) as writer:
            writer.add(PICTURES.tobytes()[20:])
    write(path, PICTURES, 50)
    with pytest.raises(ValueError, match=r"does not hold what was written .*\(7, 5, 4, 3\)"):
        check_npz(path, (8, 5, 4, 3))
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"does not hold what was written into it .arr_0.npy"):
        check_npz(path, PICTURES.shape)
    np.savez(path, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickled objects"):
        map_npz(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot read arr_0 of .*x.npz"):
        map_npz(path)
    with pytest.raises(ValueError, match="cannot read arr_0"):
        map_npz(tmp_path / "none.npz")


@pytest.mark.long
def test_a_file_past_4_gib(tmp_path: Path) -> None:
    """ZIP64: its sizes do not fit in 32 bits; the last picture is found."""
    shape = (1400, 1024, 1024, 3)
    row = np.zeros(shape[1:], np.uint8).tobytes()
    last = np.random.default_rng(1).integers(0, 256, shape[1:], dtype=np.uint8)
    path = tmp_path / "large.npz"
    with NpzWriter(path, shape) as writer:
        for _ in range(shape[0] - 1):
            writer.add(row)
        writer.add(last.tobytes())
    assert path.stat().st_size > 1 << 32
    check_npz(path, shape)
    found = map_npz(path)
    assert found.shape == shape and np.array_equal(found[-1], last) and not found[-2].any()
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        header = io.BytesIO(stream.read(128))
        np.lib.format.read_magic(header)
        assert np.lib.format.read_array_header_1_0(header)[0] == shape
    with path.open("rb") as file:
        file.seek(18)
        assert struct.unpack("<II", file.read(8)) == (0xFFFFFFFF, 0xFFFFFFFF)
    path.unlink()
