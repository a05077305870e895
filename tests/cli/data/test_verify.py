"""`mixflow-fast data verify`: 0 for a whole set, 1 for a damaged one, and what to do then."""

import pytest

from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import list_source
from mixflow_fast.data.set_files import file_record, write_manifest
from tests.support.caches import write_cache
from tests.support.command_line import run
from tests.support.image_folders import write_folder


@pytest.fixture
def made(tmp_path):
    source = list_source(write_folder(tmp_path / "images"))
    prepare(source, tmp_path / "set", Settings(32, shard_rows=4))
    return tmp_path / "set"


def test_a_whole_set(made, capsys):
    code, said, error = run("data", "verify", made, capsys=capsys)
    assert code == 0 and error == ""
    assert said.startswith(f"{made}: whole, mixflow-images/1, 7 files, ")


def test_a_flipped_bit_is_found_and_mended(made, tmp_path, capsys):
    content = bytearray((made / "shards/00001.tar").read_bytes())
    content[5000] ^= 4
    (made / "shards/00001.tar").write_bytes(content)
    code, said, _ = run("data", "verify", made, capsys=capsys)
    assert code == 1 and said.startswith("shards/00001.tar has the SHA-256 ")
    assert f"{made}: 1 of 7 files are damaged. Delete them and manifest.json, and run" in said
    # As it says:
    (made / "shards/00001.tar").unlink(), (made / "manifest.json").unlink()
    done = prepare(list_source(tmp_path / "images"), made, Settings(32, shard_rows=4))
    assert done.made == 1 and run("data", "verify", made, capsys=capsys)[0] == 0


def test_a_file_beside_the_shards_is_mended_too(made, tmp_path, capsys):
    (made / "index.npy").write_bytes(b"x")
    code, said, _ = run("data", "verify", made, capsys=capsys)
    assert code == 1 and said.startswith("index.npy has 1 bytes, expected ")
    (made / "index.npy").unlink(), (made / "manifest.json").unlink()
    done = prepare(list_source(tmp_path / "images"), made, Settings(32, shard_rows=4))
    assert done.made == 0 and run("data", "verify", made, capsys=capsys)[0] == 0


def test_an_incomplete_set_and_a_damaged_manifest(made, capsys):
    text = (made / "manifest.json").read_text()
    (made / "manifest.json").write_text(text.replace('"count": 14', '"count": 15'))
    code, _, error = run("data", "verify", made, capsys=capsys)
    assert code == 1 and "manifest.json is damaged or was edited" in error
    (made / "manifest.json").unlink(), (made / "done/00003.done.json").unlink()
    code, said, error = run("data", "verify", made, capsys=capsys)
    assert code == 1 and said == "" and "is not complete: 3 of 4 shards are done" in error


def test_sets_of_other_formats_are_hashed_alike(tmp_path, capsys):
    (tmp_path / "labels.npy").write_bytes(b"labels")
    files = [file_record(tmp_path, "labels.npy")]
    write_manifest(tmp_path, {"format": "mixflow-latents/1", "shards": [], "files": files})
    code, said, _ = run("data", "verify", tmp_path, capsys=capsys)
    assert code == 0 and "whole, mixflow-latents/1, 1 files, 6 bytes" in said


def test_what_is_no_set_is_refused(made, tmp_path, capsys):
    for path, words in (
        (tmp_path / "images", "holds no manifest.json: it is no set"),
        (made / "manifest.json", "is not a folder: give the folder of a set"),
        (tmp_path / "sett", "did you mean 'set'?"),
    ):
        code, _, error = run("data", "verify", path, capsys=capsys)
        assert code == 2 and words in error and error.count("\n") == 1


def test_a_cache_of_captioned_images_is_hashed_with_its_sets(tmp_path, capsys):
    cache = write_cache(tmp_path / "c", buckets={"64x64": range(9), "96x48": range(9, 16)})
    code, said, error = run("data", "verify", cache, capsys=capsys)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert (
        code == 0
        and error == ""
        and said.startswith(f"{cache}: whole, mixflow-captioned/1, {len(files) - 1} files, ")
    )
    damaged = "prompts/shards/00001/t5.npy", "latents/96x48/moments/00000.npy"
    for name in damaged:
        content = bytearray((cache / name).read_bytes())
        content[-1] ^= 4
        (cache / name).write_bytes(content)
    code, said, _ = run("data", "verify", cache, capsys=capsys)
    assert (
        code == 1 and f"{cache}: 2 of {len(files) - 1} files are damaged. Delete them and" in said
    )
    assert f"each manifest.json in the folders that they are in, up to {cache}" in said
    for name in damaged:
        assert f"{name} has the SHA-256 " in said
    (cache / "prompts/manifest.json").write_text("{}")
    code, said, _ = run("data", "verify", cache, capsys=capsys)
    assert code == 1 and "prompts/manifest.json has 2 bytes, expected " in said
    (cache / "manifest.json").unlink()
    code, _, error = run("data", "verify", cache, capsys=capsys)
    assert code == 2 and "holds no manifest.json" in error
