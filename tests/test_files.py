"""Files that are whole or not there."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from mixflow_fast.files import (
    ChecksummedFile,
    check_folder_writable,
    check_writable,
    existing_folder,
    existing_path,
    remove_partial,
    replacing,
    sha256,
    user_path,
    write_json,
)


def test_write_json(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    value = {"é": [1, 2.5, None, {"x": "y"}]}
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    for bad in ({"x": math.nan}, {"x": object()}):
        with pytest.raises(ValueError, match="b.json"):
            write_json(path, bad)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Under a name of its own, which no later write would replace; a living writer keeps its."""
    code = "import os; print(os.getpid())"
    dead = int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
    left, folder = tmp_path / f".step_4.safetensors.{dead}.tmp", tmp_path / f".exported.{dead}.tmp"
    folder.mkdir()
    kept = [tmp_path / f".metrics.jsonl.{os.getpid()}.tmp", tmp_path / ".lock", tmp_path / "x.tmp"]
    for path in (left, folder / "weights", *kept):
        path.write_text("half")
    remove_partial(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    remove_partial(tmp_path / "missing")


def test_a_path_that_a_user_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found with `~` expanded, or named as it was given, with the part of it that is there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert existing_path("~/data") == tmp_path / "data"
    assert existing_path("data") == Path("data")
    with pytest.raises(ValueError, match=f"^data.path ~/data/x/y does not .* is {tmp_path}/data$"):
        existing_path("~/data/x/y", "data.path")
    with pytest.raises(ValueError, match=f"^path dota does not .* is {tmp_path}; .* mean 'data'"):
        existing_path("dota")
    (tmp_path / "link").symlink_to("/nowhere")
    with pytest.raises(ValueError, match="path link is a link to /nowhere, which does not exist"):
        existing_path("link")
    with pytest.raises(ValueError, match="~nobody-of-this-name/x does not exist"):
        existing_path("~nobody-of-this-name/x")
    with pytest.raises(ValueError, match="s3://bucket/x is an address on a network"):
        existing_path("s3://bucket/x")


def test_the_home_folder_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert user_path("~/runs/a") == Path("/home/someone/runs/a")
    assert user_path(Path("~")) == Path("/home/someone")
    for other in ("a/~", "~no-such-user/a", "/a", "."):
        assert user_path(other) == Path(other)


def test_what_is_in_the_way_is_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir(mode=0o500)
    assert existing_folder(folder, "a run") == folder
    for path, message in ((file, "file is not a folder: give a run"), (file / "x", "not exist")):
        with pytest.raises(ValueError, match=message):
            existing_folder(path, "a run")
    check_writable(file, force=True)
    check_writable(tmp_path / "new" / "x", force=False)
    cases = [(file, False, "file exists: choose another"), (folder, True, "folder is a folder")]
    cases.append((file / "x" / "y", True, "because .*file is not a folder"))
    if os.geteuid():
        cases.append((folder / "x", False, "because .*folder may not be written"))
    for path, force, message in cases:
        with pytest.raises(ValueError, match=message):
            check_writable(path, force)
    check_folder_writable(tmp_path / "new" / "run")
    cases = [(file, "file is not a folder: choose another out=$")]
    cases.append((file / "run", "run cannot be made, because .*file is not a folder"))
    if os.geteuid():
        cases.append((folder, "folder may not be written"))
        cases.append((folder / "run", "because .*folder may not be written"))
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            check_folder_writable(path)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left on device: '.*/samples.npz'") as caught,
        replacing(tmp_path / "samples.npz") as partial,
        partial.open("wb") as file,
        open("/dev/full", "wb", buffering=0) as full,
    ):
        file.write(b"x")
        full.write(b"x")
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_a_checksum_is_taken_while_a_file_is_written(tmp_path: Path) -> None:
    parts = [b"", b"abc", os.urandom((2 << 20) + 17), memoryview(bytearray(range(256)))]
    with (tmp_path / "a").open("wb") as raw:
        file = ChecksummedFile(raw)
        assert [file.write(part) for part in parts] == [0, 3, (2 << 20) + 17, 256]
        file.flush()
        content = (tmp_path / "a").read_bytes()
    assert content == b"".join(bytes(part) for part in parts)
    assert (file.bytes, file.crc32) == (len(content), zlib.crc32(content))
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
