"""`mixflow-fast data info`: what a set is, and how far one is that is being made."""

import json

import pytest

from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import list_source
from mixflow_fast.data.set_files import write_manifest
from tests.support.caches import write_cache
from tests.support.command_line import run
from tests.support.image_folders import write_folder


@pytest.fixture
def source(tmp_path):
    return list_source(write_folder(tmp_path / "images"))


def test_a_prepared_set(source, tmp_path, capsys):
    prepare(source, tmp_path / "set", Settings(32, shard_rows=4))
    code, said, error = run("data", "info", tmp_path / "set", capsys=capsys)
    assert code == 0 and error == ""
    assert said.startswith(f"{tmp_path / 'set'}: 14 images, 7 files, ")
    for line in ("size: 32", "image_format: webp", "exact: True", "classes: a, b", "skipped: 0"):
        assert f"\n  {line}\n" in said
    assert "\n    mean: " in said and "sha256:" not in said.replace("names_sha256", "")
    code, said, _ = run("data", "info", tmp_path / "set", "--json", capsys=capsys)
    assert json.loads(said)["class_names"] == ["a", "b"]
    (tmp_path / "set/index.npy").unlink()
    code, said, _ = run("data", "info", tmp_path / "set", capsys=capsys)
    assert code == 0 and "warning: " in said and "index.npy cannot be read" in said


def test_a_set_in_the_making(source, tmp_path, capsys):
    prepare(source, tmp_path / "set", Settings(32, shard_rows=4), rank=1, world=3)
    code, said, _ = run("data", "info", tmp_path / "set", capsys=capsys)
    assert code == 0 and "not complete, 1 of 4 shards are done\n  format: mixflow-images/1" in said
    code, said, _ = run("data", "info", tmp_path / "set", "--json", capsys=capsys)
    assert json.loads(said)["complete"] is False and json.loads(said)["done"] == 1


def test_a_set_of_latents(tmp_path, capsys):
    manifest = {
        "format": "mixflow-latents/1",
        "kind": "moments",
        "count": 1281167,
        "scale": 0.18215,
        "encoder": {"class": "AutoencoderKL"},
        "shards": [],
        "files": [],
    }
    write_manifest(tmp_path, manifest)
    code, said, _ = run("data", "info", tmp_path, capsys=capsys)
    assert code == 0 and "1,281,167 moments, 0 files" in said
    assert "  scale: 0.18215\n  encoder:\n    class: AutoencoderKL\n" in said


def test_what_is_no_set_is_refused(tmp_path, capsys):
    code, _, error = run("data", "info", tmp_path, capsys=capsys)
    assert code == 2 and "holds no manifest.json" in error and error.count("\n") == 1


def test_a_cache_of_captioned_images(tmp_path, capsys):
    cache = write_cache(tmp_path / "c", buckets={"64x64": range(9), "96x48": range(9, 16)})
    code, said, error = run("data", "info", cache, capsys=capsys)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert code == 0 and error == ""
    assert said.startswith(f"{cache}: 16 captioned latents, {len(files) - 1} files, ")
    for line in ("text: cached", "length: 7", "prompts: 17", "buckets: 64x64 9; 96x48 7"):
        assert f"\n  {line}\n" in said + "\n"
