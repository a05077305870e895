"""Checkpoints written by real runs: disks that are full, and signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixflow_fast.checkpoints import manifest
from mixflow_fast.checkpoints.run_folder import newest_checkpoint
from mixflow_fast.metrics.metrics_file import read_metrics
from tests.support.train_ranks import TINY

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def arguments(out: Path, *overrides: str) -> list[str]:
    own = [f"out={out}", "train.zero_stage=1", "train.images=100000", "train.save_every=1"]
    return ["train", "photos", *TINY, *own, *overrides]


def check_after_a_full_disk(out: Path) -> None:
    folders = sorted((out / "checkpoints").iterdir())
    assert folders and not [f for f in folders if f.name.startswith(".")]
    for folder in folders:
        assert manifest.damage(folder, checksums=(0, 1)) is None


def can_mount() -> bool:
    mount = "mount -t tmpfs none /tmp"
    return bool(shutil.which("unshare")) and not subprocess.call(
        ["unshare", "-rm", "sh", "-c", mount], stderr=subprocess.DEVNULL
    )


MOUNT = """
mount -t tmpfs -o size=2500k none "$1"; disk=$1; shift
%s
"$@" 2> "$disk.log"; code=$?
cat "$disk.log" >&2; cp -a "$disk/run" "$0"; exit $code
"""


def train_on_a_small_disk(tmp_path: Path, before: str, *overrides: str) -> tuple[int, str, Path]:
    """A run on a real file system of 2.5 MB; its checkpoints are about 1 MB.

    Returns:
        exit code, what it said on stderr, and a copy of its folder.
    """
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    overrides = ("train.save_weights=always", *overrides)
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT % before, str(kept), str(disk)]
        + [sys.executable, "-m", "mixflow_fast.cli", *arguments(disk / "run", *overrides)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stderr, kept


@pytest.mark.skipif(not can_mount(), reason="a user may not mount a tmpfs here")
def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path) -> None:
    options = ["train.keep_last=3", "train.images=40"]
    code, said, kept = train_on_a_small_disk(tmp_path, "", *options)
    assert code == 2, said[-3000:]
    for step in (3, 4):  # these are warnings, because a later one may find room
        (line,) = (line for line in said.splitlines() if f"checkpoint of step {step}" in line)
        assert "warning" in line and "could not be written" in line and "goes on" in line
    (line,) = (line for line in said.splitlines() if "mixflow-fast: error" in line)
    assert "checkpoint of step 5 could not be written" in line
    assert "No space left on device" in line and "MiB free" in line
    check_after_a_full_disk(kept)
    assert names(kept) == ["step_00000001", "step_00000002"]


@pytest.mark.skipif(not can_mount(), reason="a user may not mount a tmpfs here")
def test_training_goes_on_until_there_is_room_again(tmp_path: Path) -> None:
    before = """
    head -c 1100k /dev/zero > "$disk/other"
    (until grep -q "checkpoint of step 4 could" "$disk.log"; do sleep 0.02; done
     rm "$disk/other") &
    """
    options = ["train.keep_last=1", "train.images=400", "train.save_every=2"]
    code, said, kept = train_on_a_small_disk(tmp_path, before, *options)
    assert code == 0, said[-3000:]
    assert "warning: checkpoint of step 4 could not be written" in said
    check_after_a_full_disk(kept)
    assert names(kept) == ["step_00000050"]
    # Rows that found no room came when there was some.
    steps = [row["step"] for row in read_metrics(kept / "metrics.jsonl")]
    assert steps == list(range(1, 51))


LIMITED = """
import os, resource, sys
from mixflow_fast import cli
from mixflow_fast.checkpoints.writing import CheckpointWriter

plain = CheckpointWriter.commit

def commit(self, *args, **kwargs):
    path = plain(self, *args, **kwargs)
    if os.environ["RANK"] == "1":  # from the second checkpoint on, this rank's disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return path

CheckpointWriter.commit = commit
sys.exit(cli.main(sys.argv[1:]))
"""


def start_ranks(ranks: int, *command: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_of_one_rank_ends_all_with_one_message(tmp_path: Path) -> None:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    overrides = ["train.microbatch_size=4", "train.keep_last=3", "train.images=24"]
    process = start_ranks(2, str(script), *arguments(tmp_path / "run", *overrides))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = (line for line in errors.splitlines() if "mixflow-fast: error" in line)
    assert "checkpoint of step 3 could not be written" in line
    assert errors.count("warning: checkpoint of step 2 could not be written") == 1
    assert "rank 1: [Errno 27] File too large" in line
    assert "exitcode  : 2" in errors, errors[-3000:]  # in torchrun's report
    check_after_a_full_disk(tmp_path / "run")
    assert names(tmp_path / "run") == ["step_00000001"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[1][-3000:])
        time.sleep(0.05)


@pytest.mark.long
def test_a_signal_to_torchrun_saves_on_all_ranks(tmp_path: Path) -> None:
    overrides = ["train.microbatch_size=4", "train.save_every=0"]
    command = ["-m", "mixflow_fast.cli", *arguments(tmp_path / "run", *overrides)]
    process = start_ranks(2, *command)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "the same command resumes" in errors, errors[-3000:]
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None and names(tmp_path / "run") == [newest.name]
