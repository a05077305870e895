"""`mixflow-fast data prepare` as a user meets it: the way through, stops, and the next step."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixflow_fast.cli.data import prepare as command
from mixflow_fast.data.preparation import formats
from mixflow_fast.data.prepared_images import PreparedImages
from tests.support.command_line import run
from tests.support.image_folders import write_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def images(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)


def prepare(images, out, *more, capsys):
    return run(
        *("data", "prepare", images, "--size", 32, "--out", out, "--shard-images", 4, *more),
        capsys=capsys,
    )


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("image_format", [None, "webp", "raw", "jpeg"])
def test_a_folder_becomes_a_set(images, tmp_path, capsys, image_format):
    more = [] if image_format is None else ["--format", image_format]
    out = tmp_path / "some/set"
    code, said, error = prepare(images, out, *more, capsys=capsys)
    assert code == 0 and error == ""
    assert said.startswith(f"{out}: complete, 14 images of 32 px in 4 shards, ")
    assert f"\n  make its latents with `mixflow-fast data encode {out} --vae FOLDER" in said
    assert said.endswith(f", or train on it with data.kind=images data.path={out}\n")
    assert PreparedImages(out).encoded == (image_format != "raw")
    code, said, _ = prepare(images, out, *more, capsys=capsys)
    assert code == 0 and "complete already, 14 images" in said


def test_a_dry_run_makes_nothing(images, tmp_path, capsys):
    code, said, _ = prepare(images, tmp_path / "set", "--dry-run", "--format", "raw", capsys=capsys)
    assert code == 0 and "14 in 2 classes" in said and not (tmp_path / "set").exists()
    assert "exact (14 images tried) <- chosen" in said and f"at {tmp_path}" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--size", "0"], "--size must be >= 1, got 0"),
        (["--threads", "-1"], "--threads must be >= 0"),
        (["--max-bad", "-1"], "--max-bad must be >= 0"),
        (["--shard-images", "0"], "--shard-images must be >= 1"),
        (["--layout", "repa", "--format", "raw"], "the layout repa has no images of format raw"),
        (["--classes", "imagenet"], "998 of the 1000 synsets are missing"),
    ],
)
def test_refusals_are_one_line_and_make_nothing(images, tmp_path, capsys, more, words):
    if "imagenet" in more:
        os.rename(images / "a", images / "n01440764"), os.rename(images / "b", images / "n01443537")
    code, said, error = prepare(images, tmp_path / "set", *more, capsys=capsys)
    assert code == 2 and said == "" and error.count("\n") == 1 and words in error
    assert not (tmp_path / "set").exists()


def test_an_out_that_cannot_be_used(images, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    for out, words in (("file", "is not a folder"), ("other", "is not empty and no set was begun")):
        code, _, error = prepare(images, tmp_path / out, capsys=capsys)
        assert code == 2 and words in error


def test_an_out_among_the_classes(images, capsys):
    code, _, error = prepare(images, images / "set", capsys=capsys)
    assert code == 2 and "where it would be a class folder" in error
    assert not (images / "set").exists()


def test_bad_images_are_refused_and_then_skipped(images, tmp_path, capsys):
    (images / "a/001.JPEG").write_bytes(b"")
    code, said, error = prepare(images, tmp_path / "set", capsys=capsys)
    assert code == 2 and said == ""
    assert "error: 1 of 14 images cannot be used." in error and "--on-bad skip" in error
    assert error.endswith("\n  a/001.JPEG: it is empty (0 bytes)\n")
    code, said, _ = prepare(images, tmp_path / "set", "--on-bad", "skip", capsys=capsys)
    assert code == 0 and "complete, 13 images" in said and "1 left out (skipped.jsonl)" in said
    code, _, error = prepare(
        images, tmp_path / "none", "--on-bad", "skip", "--max-bad", 0, capsys=capsys
    )
    assert code == 2 and "More than --max-bad 0" in error


def test_ranks_share_the_work(images, tmp_path, capsys, monkeypatch):
    prepare(images, tmp_path / "one", capsys=capsys)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, words in (
        (1, "process 1 of 3 made 1 shards; 3 of 4 are left"),
        (2, "2 of 4"),
        (0, ""),
    ):
        monkeypatch.setenv("RANK", str(rank))
        code, said, _ = prepare(images, tmp_path / "three", capsys=capsys)
        assert code == 0 and words in said
    assert "complete, 14 images" in said and tree(tmp_path / "one") == tree(tmp_path / "three")


def test_a_full_disk_says_how_to_go_on(images, tmp_path, capsys, monkeypatch):
    add, calls = formats.Shard.add, []

    def full(*arguments):
        calls.append(0)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(formats.Shard, "add", full)
        code, _, error = prepare(images, tmp_path / "set", capsys=capsys)
    assert code == 2 and error.count("\n") == 1
    assert "No space left on device; once there is room, the same command goes on" in error
    assert "1 of 4 shards are done: " in error and not list(tmp_path.rglob(".tmp*"))
    assert prepare(images, tmp_path / "set", capsys=capsys)[0] == 0


def test_too_little_room_is_said_before(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "mixflow_fast.data.preparation.scan.free_bytes", lambda path: (1000, tmp_path)
    )
    code, _, error = prepare(images, tmp_path / "set", capsys=capsys)
    assert code == 0 and " are needed and 1.00 kB are free at " in error


SLOW = """
import sys, time
from mixflow_fast.data.preparation import source
from mixflow_fast.data.preparation import prepare
real = prepare.read_crop
def slow(file, size):
    time.sleep(0.25)
    return real(file, size)
prepare.read_crop = slow
from mixflow_fast.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "mixflow-fast: interrupted; the same command goes on from here, "),
        (signal.SIGTERM, 143, "mixflow-fast: stopped by SIGTERM; the same command goes on from "),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_a_stop_loses_the_open_shard_alone(images, tmp_path, capsys, number, code, words):
    out = tmp_path / "set"
    arguments = ["data", "prepare", str(images), "--size", "32", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments, "--shard-images", "4", "--threads", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + 60
        while not (out / "done/00000.done.json").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert error.startswith(words) and error.count("\n") == bool(words)
    assert not words or (" of 4 shards are done\n" in error and not list(out.rglob(".tmp*")))
    assert (out / "shards/00000.tar").exists() and not (out / "manifest.json").exists()
    assert prepare(images, out, capsys=capsys)[0] == 0
    prepare(images, tmp_path / "whole", capsys=capsys)
    assert tree(out) == tree(tmp_path / "whole")


def test_defaults_are_those_of_the_library():
    from mixflow_fast.data.preparation.prepare import MAX_BAD, SHARD_ROWS

    assert (command._SHARD_IMAGES, command._MAX_BAD) == (SHARD_ROWS, MAX_BAD)
