"""One array of a .npz, mapped from the file."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from mixflow_fast.data.npy_files import npz_array


def test_it_is_mapped_where_it_is_stored_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.savez(path, first=np.arange(5), x=x, columns=np.asfortranarray(x[0]), empty=x[:0])
    found = npz_array(path, "x")
    assert isinstance(found, np.memmap) and np.array_equal(found, x) and found.dtype == x.dtype
    assert np.array_equal(npz_array(path, "columns"), x[0])
    assert npz_array(path, "empty").shape == (0, 3, 4)
    np.savez_compressed(path, x=x)
    found = npz_array(path, "x")
    assert not isinstance(found, np.memmap) and np.array_equal(found, x)


def test_a_streamed_member_is_found_by_its_own_header(tmp_path: Path) -> None:
    """With ZIP64's extra field, which the directory at the end does not have at this size."""
    path = tmp_path / "a.npz"
    x = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.save(tmp_path / "x.npy", x)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo("x.npy"), "w", force_zip64=True) as member:
            member.write((tmp_path / "x.npy").read_bytes())
    assert isinstance(npz_array(path, "x"), np.memmap)
    assert np.array_equal(npz_array(path, "x"), x)


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(2), objects=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="no array 'y', but x, objects"):
        npz_array(path, "y")
    with pytest.raises(ValueError, match="allow_pickle"):
        npz_array(path, "objects")
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot read the arrays"):
        npz_array(path, "x")
