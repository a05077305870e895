"""Sets of prepared images: pixels, bytes that no kill changes, and bad files by name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.preparation import prepare as module
from mixflow_fast.data.preparation.prepare import BadImages, Settings, prepare
from mixflow_fast.data.preparation.source import list_source, read_crop
from mixflow_fast.data.prepared_images import PreparedImages
from mixflow_fast.data.set_files import read_manifest, verify
from tests.support.image_folders import bad_images, write_folder

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = Settings(32, shard_rows=4)


@pytest.fixture
def images(tmp_path):
    return write_folder(tmp_path / "images")


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def whole(images, tmp_path) -> dict[str, bytes]:
    """What an undisturbed process makes of the images."""
    done = prepare(list_source(images), tmp_path / "whole", SETTINGS, threads=2)
    assert done.complete and done.shards == 4 == done.made and not done.unfinished
    return tree(tmp_path / "whole")


@pytest.mark.parametrize("image_format", ["webp", "raw", "jpeg"])
def test_a_set_holds_the_crops(images, tmp_path, image_format):
    source = list_source(images)
    prepare(source, tmp_path / "set", Settings(32, image_format, shard_rows=4))
    dataset = PreparedImages(tmp_path / "set", flip=False)
    assert verify(tmp_path / "set") == []
    assert dataset.source.tolist() == list(range(14)) and list(dataset.files) == source.files
    crops = [adm_center_crop(Image.open(images / name), 32) for name in source.files]
    truth = np.stack([np.asarray(crop) for crop in crops])
    found = dataset.pixels(_all(dataset)).permute(0, 2, 3, 1).numpy()
    error = np.abs(found.astype(int) - truth)
    assert error.max() == 0 if image_format != "jpeg" else 0 < error.mean() < 3
    manifest = read_manifest(tmp_path / "set", "mixflow-images/1")
    assert manifest["exact"] == (image_format != "jpeg") and manifest["count"] == 14
    pixels = truth.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(manifest["statistics"]["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(manifest["statistics"]["std"], pixels.std(0), rtol=1e-9)


def _all(dataset: PreparedImages):
    import torch

    return torch.arange(len(dataset))


def test_three_ranks_make_the_same_bytes(images, tmp_path, whole):
    complete = [
        prepare(list_source(images), tmp_path / "set", SETTINGS, rank=rank, world=3).complete
        for rank in (1, 2, 0)
    ]
    assert complete == [False, False, True]
    assert tree(tmp_path / "set") == whole


# Where a process is killed: the function that kills it at which call, what is then there, and what
# is not.
_SHARD_WORK, _PREPARE = (f"mixflow_fast.data.preparation.{m}" for m in ("shard_work", "prepare"))
KILLS = {
    "in a shard": (
        *("mixflow_fast.data.preparation.formats.Shard.add", 6),
        *("shards/.tmp-0-*.tar", "manifest.json"),
    ),
    "before the rename": (f"{_SHARD_WORK}.sha256_of", 1, "shards/.tmp-0-00000.tar", "done/0*"),
    "before the done file": (f"{_SHARD_WORK}._write_json", 2, "shards/00000.tar", "done/0*"),
    "before the manifest": (f"{_PREPARE}.write_manifest", 1, "names.txt", ".manifest*"),
    "in the files beside": (f"{_PREPARE}.write_bytes", 2, "index.npy", "source.npy"),
    # After work.json, four shards with their done files, and three files beside.
    "in the manifest": (
        "mixflow_fast.files.os.replace",
        13,
        ".manifest.json.*.tmp",
        "manifest.json",
    ),
}


@pytest.mark.parametrize(
    ("where", "world"),
    [
        *((w, 1) for w in KILLS),
        ("in a shard", 3),
        ("before the done file", 3),
        ("before the manifest", 3),
    ],
)
def test_a_killed_process_changes_no_byte(images, tmp_path, whole, where, world):
    """kill -9 at the worst moments; then other numbers of ranks go on."""
    name, call, there, missing = KILLS[where]
    out = tmp_path / "set"
    source = f"""
import os, signal
from importlib import import_module
from pathlib import Path
from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import list_source
parts = {name!r}.split(".")
for length in range(len(parts) - 1, 0, -1):
    try:
        owner = import_module(".".join(parts[:length])); break
    except ImportError:
        pass
for part in parts[length:-1]:
    owner = getattr(owner, part)
real, calls = getattr(owner, parts[-1]), []
def kill(*arguments, **options):
    calls.append(0)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(owner, parts[-1], kill)
for rank in range({world}):
    prepare(list_source(Path({str(images)!r})), Path({str(out)!r}), Settings(32, shard_rows=4),
            threads=2, rank=rank, world={world})
"""
    done = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert list(out.glob(there)) and not list(out.glob(missing))
    world = 4 - world
    for rank in range(world):
        prepare(list_source(images), out, SETTINGS, rank=rank, world=world)
    assert tree(out) == whole


def test_a_full_disk_costs_the_open_shard(images, tmp_path, whole, monkeypatch):
    add, calls = module.Shard.add, []

    def full(*arguments):
        calls.append(0)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.Shard, "add", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/shards/.tmp-0-00001.tar'"):
            prepare(list_source(images), tmp_path / "set", SETTINGS)
    assert sorted(os.listdir(tmp_path / "set/shards")) == ["00000.tar"]
    prepare(list_source(images), tmp_path / "set", SETTINGS)
    assert tree(tmp_path / "set") == whole


def test_a_complete_set_is_left_alone(images, tmp_path, whole):
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    done = prepare(list_source(images), tmp_path / "whole", SETTINGS)
    assert done.complete and not done.made
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_damaged_shard_is_made_again_alone(images, tmp_path, whole):
    (tmp_path / "whole/shards/00002.tar").unlink()
    done = prepare(list_source(images), tmp_path / "whole", SETTINGS)
    assert done.complete and done.made == 1 and tree(tmp_path / "whole") == whole


def test_other_settings_and_other_images_are_refused(images, tmp_path, whole):
    source, out = list_source(images), tmp_path / "whole"
    for settings, words in (
        (Settings(48, shard_rows=4), "size = 32, now it is 48"),
        (Settings(32, "raw", shard_rows=4), "image_format = 'webp', now it is 'raw'"),
        (Settings(32, shard_rows=5), "shard_rows = 4, now it is 5"),
    ):
        with pytest.raises(ValueError, match=f"begun with {words}"):
            prepare(source, out, settings)
    (images / "b/006.JPEG").unlink()
    with pytest.raises(ValueError, match="begun with source = {'images': 14,.* now it is .*13"):
        prepare(list_source(images), out, SETTINGS)
    with pytest.raises(ValueError, match="size and shard_rows must be >= 1"):
        Settings(0)
    with pytest.raises(ValueError, match="repa has png alone"):
        Settings(32, "raw", "repa")


@pytest.fixture
def damaged(images):
    """The images with each kind of bad file among them, two of them in one shard."""
    for place, (kind, (content, _)) in enumerate(bad_images().items()):
        folder = "a" if place < 4 else "b"
        (images / folder / f"{place:03d}x {kind}.JPEG").write_bytes(content)
    return images


def test_bad_images_are_refused_by_a_whole_list(damaged, tmp_path, capsys):
    source = list_source(damaged)
    with pytest.raises(BadImages) as error:
        prepare(source, tmp_path / "set", SETTINGS)
    assert len(error.value.bad) == 8
    text = str(error.value)
    assert text.startswith("8 of 22 images cannot be used. The published ImageNet has none")
    for bad, (kind, (_, reason)) in zip(error.value.bad, bad_images().items(), strict=True):
        assert bad.file.endswith(f"x {kind}.JPEG") and source.files[bad.source] == bad.file
        assert reason.lower() in bad.reason.lower() and f"{bad.file}: {bad.reason}" in text
    assert capsys.readouterr().err.count("bad image: ") == 8
    assert not (tmp_path / "set/manifest.json").exists()
    made = sorted(os.listdir(tmp_path / "set/shards"))
    spoiled = {bad.source // 4 for bad in error.value.bad}
    assert made == [f"{k:05d}.tar" for k in range(6) if k not in spoiled] and made


def test_files_that_were_replaced_complete_the_set(damaged, images, tmp_path):
    with pytest.raises(BadImages):
        prepare(list_source(damaged), tmp_path / "set", SETTINGS)
    good = (images / "a/001.JPEG").read_bytes()
    for file in images.rglob("*x *.JPEG"):
        file.write_bytes(good)
    assert prepare(list_source(images), tmp_path / "set", SETTINGS).complete
    prepare(list_source(images), tmp_path / "fresh", SETTINGS)
    assert tree(tmp_path / "set") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("image_format", ["webp", "raw"])
def test_bad_images_are_left_out_and_numbers_stay(damaged, tmp_path, image_format):
    source = list_source(damaged)
    settings = Settings(32, image_format, shard_rows=4)
    done = prepare(source, tmp_path / "set", settings, on_bad="skip")
    assert done.complete and done.skipped == 8
    rows = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").open()]
    assert [row["file"] for row in rows] == [f for f in source.files if "x " in f]
    assert all(source.files[row["source"]] == row["file"] and row["reason"] for row in rows)
    dataset = PreparedImages(tmp_path / "set", flip=False)
    assert len(dataset) == 14 and "left out" in " ".join(dataset.summary().notes)
    kept = [number for number, name in enumerate(source.files) if "x " not in name]
    assert dataset.source.tolist() == kept and list(dataset.files) == [
        source.files[n] for n in kept
    ]
    assert dataset.labels(_all(dataset)).tolist() == source.labels[kept].tolist()
    for index, image in enumerate(dataset.pixels(_all(dataset))):
        crop = adm_center_crop(Image.open(damaged / dataset.files[index]), 32)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(crop))
    for rank in range(3):
        prepare(source, tmp_path / "three", settings, on_bad="skip", rank=rank, world=3)
    assert tree(tmp_path / "three") == tree(tmp_path / "set")


def test_too_many_bad_images_are_refused(damaged, tmp_path):
    source = list_source(damaged)
    with pytest.raises(BadImages, match="More than --max-bad 7") as error:
        prepare(source, tmp_path / "set", SETTINGS, on_bad="skip", max_bad=7)
    assert len(error.value.bad) == 8  # it stops at the first one too many
    with pytest.raises(BadImages, match="More than --max-bad 2") as error:
        prepare(source, tmp_path / "two", SETTINGS, on_bad="skip", max_bad=2)
    assert len(error.value.bad) == 3
    assert prepare(source, tmp_path / "set", SETTINGS, on_bad="skip", max_bad=8).complete


def test_what_was_skipped_is_not_passed_over_when_it_is_refused(damaged, tmp_path):
    """Shards of an earlier start with --on-bad skip have holes."""
    source = list_source(damaged)
    prepare(source, tmp_path / "set", SETTINGS, on_bad="skip", rank=0, world=2)
    with pytest.raises(BadImages) as error:
        prepare(source, tmp_path / "set", SETTINGS)
    assert len(error.value.bad) == 8


def test_files_that_were_replaced_after_a_skip_complete_the_set(damaged, tmp_path):
    with pytest.raises(BadImages, match="More than --max-bad 7"):
        prepare(list_source(damaged), tmp_path / "set", SETTINGS, on_bad="skip", max_bad=7)
    assert any((tmp_path / "set/done").iterdir())
    source = list_source(damaged)
    good = next(source.read(n) for n in range(len(source)) if is_good(source.read(n)))
    for number, name in enumerate(source.files):
        if not is_good(source.read(number)):
            (damaged / name).write_bytes(good)
    done = prepare(source, tmp_path / "set", SETTINGS)
    assert done.complete and not done.skipped
    assert prepare(source, tmp_path / "anew", SETTINGS).complete
    assert read_manifest(tmp_path / "set", "mixflow-images/1") == read_manifest(
        tmp_path / "anew", "mixflow-images/1"
    )


def is_good(content):
    try:
        return read_crop(content, 32) is not None
    except ValueError:
        return False


def test_nothing_but_bad_images(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").touch()
    with pytest.raises(ValueError, match="no image of .*images can be used"):
        prepare(list_source(tmp_path / "images"), tmp_path / "set", SETTINGS, on_bad="skip")


def test_a_file_that_vanishes_stops_the_work(images, tmp_path):
    source = list_source(images)
    (images / "a/003.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="003.JPEG"):
        prepare(source, tmp_path / "set", SETTINGS, on_bad="skip")


def test_a_pillow_without_webp(images, tmp_path, monkeypatch):
    monkeypatch.setattr(module.features, "check", lambda name: name != "webp")
    with pytest.raises(ValueError, match="cannot write WebP: install Pillow's wheel"):
        prepare(list_source(images), tmp_path / "set", SETTINGS)
    assert prepare(list_source(images), tmp_path / "raw", Settings(32, "raw")).complete


def test_repas_layout(images, tmp_path):
    source = list_source(images)
    assert prepare(source, tmp_path / "set", Settings(32, "png", "repa")).complete
    listed = json.loads((tmp_path / "set/images/dataset.json").read_text())["labels"]
    assert listed[9] == ["00000/img00000009.png", 1] and len(listed) == 14
    for number, (name, _) in enumerate(listed):
        stored = np.asarray(Image.open(tmp_path / "set/images" / name))
        crop = adm_center_crop(Image.open(images / source.files[number]), 32)
        np.testing.assert_array_equal(stored, np.asarray(crop))
    assert verify(tmp_path / "set") == []
    (tmp_path / "set/images/00000/img00000003.png").write_bytes(b"x")
    (line,) = verify(tmp_path / "set")
    assert line.startswith("images/00000 has ")


def test_two_writers_of_one_manifest(images, tmp_path, whole, monkeypatch):
    """A rank that comes to the end while another writes the manifest waits, and leaves it."""
    out = tmp_path / "set"
    prepare(list_source(images), out, SETTINGS)
    (out / "manifest.json").unlink()
    source = f"""
import sys, time
from pathlib import Path
from mixflow_fast.data.preparation import prepare as module
from mixflow_fast.data.preparation.source import list_source
real = module.write_manifest
def slow(*arguments):
    print("writing", flush=True); time.sleep(1.0); real(*arguments)
module.write_manifest = slow
module.prepare(list_source(Path({str(images)!r})), Path({str(out)!r}),
               module.Settings(32, shard_rows=4), rank=1, world=2)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", source], env=env, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"writing\n"
        monkeypatch.setattr(module, "write_manifest", None)  # it must not be called
        with pytest.warns(UserWarning, match="is in use by"):
            assert prepare(list_source(images), out, SETTINGS, rank=0, world=2).complete
        assert other.wait(20) == 0
    assert tree(out) == whole
