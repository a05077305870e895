"""A set's manifest: what is damaged is found, by size at once and by content when it is hashed."""

import hashlib
import json
import re

import pytest

from mixflow_fast.data import set_files
from mixflow_fast.data.set_files import (
    check_sizes,
    file_record,
    listed_files,
    read_manifest,
    set_format,
    sha256_of,
    total_bytes,
    verify,
    write_manifest,
)

FORMAT = "mixflow-images/1"


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000.tar").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "index.npy").write_bytes(b"index")
    shard = {**file_record(tmp_path, "shards/00000.tar"), "rows": 3}
    manifest = {"format": FORMAT, "shards": [shard], "files": [file_record(tmp_path, "index.npy")]}
    write_manifest(tmp_path, manifest)
    return tmp_path


def test_a_whole_set_is_read_and_verified(whole):
    manifest = read_manifest(whole, FORMAT)
    assert set_format(whole) == FORMAT and total_bytes(manifest) == 5120 + 5
    assert [record["file"] for record in listed_files(manifest)] == [
        "shards/00000.tar",
        "index.npy",
    ]
    digest = hashlib.sha256((whole / "shards/00000.tar").read_bytes()).hexdigest()
    assert sha256_of(whole / "shards/00000.tar") == digest == manifest["shards"][0]["sha256"]
    check_sizes(whole, manifest)
    read: list[int] = []
    assert verify(whole, progress=read.append) == [] and sum(read) == 5125


def test_a_flipped_bit_is_found_by_verify_alone(whole):
    content = bytearray((whole / "shards/00000.tar").read_bytes())
    content[4000] ^= 1
    (whole / "shards/00000.tar").write_bytes(content)
    check_sizes(whole, read_manifest(whole, FORMAT))
    (line,) = verify(whole)
    assert line.startswith("shards/00000.tar has the SHA-256 ") and "has changed" in line


def test_a_truncated_and_a_missing_file_are_found_at_the_start(whole):
    (whole / "shards/00000.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"damaged: shards/00000.tar has 5 bytes, expected 5,120"):
        check_sizes(whole, read_manifest(whole, FORMAT))
    (whole / "index.npy").unlink()
    lines = verify(whole)
    assert len(lines) == 2 and "index.npy cannot be read (No such file" in lines[1]


def test_what_is_no_whole_set_is_named(whole, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(ValueError, match=r"holds no manifest.json: it is no set"):
        read_manifest(other, FORMAT)
    assert set_format(other) is None
    (other / "done").mkdir()
    (other / "done/00000.done.json").write_text("{}")
    (other / "work.json").write_text('{"shards": 4}')
    with pytest.raises(ValueError, match=r"not complete: 1 of 4 shards are done; run the command"):
        read_manifest(other, FORMAT)
    for wanted, reason in (("mixflow-images/2", "another version"), ("other/1", "expected format")):
        with pytest.raises(
            ValueError, match=rf"'mixflow-images/1', expected '{wanted}': .*{reason}"
        ):
            read_manifest(whole, wanted)
    (whole / "manifest.json").write_text("[1")
    with pytest.raises(ValueError, match="cannot read .*manifest.json"):
        verify(whole)


def test_an_edited_manifest_is_refused(whole):
    file = whole / "manifest.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text)))  # other blanks, the same values
    assert read_manifest(whole, FORMAT)
    file.write_text(re.sub(r'"rows": 3', '"rows": 4', text))
    with pytest.raises(ValueError, match="manifest.json is damaged or was edited"):
        read_manifest(whole, FORMAT)


def test_files_outside_of_the_folder_are_never_read(whole):
    manifest = read_manifest(whole, FORMAT)
    del manifest["checksum"]
    manifest["files"][0]["file"] = "../secret"
    write_manifest(whole, manifest)
    for function in (lambda: check_sizes(whole, manifest), lambda: verify(whole)):
        with pytest.raises(ValueError, match="names '../secret', which is not below"):
            function()
    write_manifest(whole, {"format": FORMAT, "shards": [], "files": 3})
    with pytest.raises(ValueError, match=r"must list files as \[{file, bytes, sha256}"):
        verify(whole)
    assert set_files.how_far(whole) is None
