"""Locks of a run folder: between real processes, with the kernel's lock and without it."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixflow_fast import folder_lock
from mixflow_fast.folder_lock import FolderLock, is_held, shows_token

ROOT = Path(__file__).resolve().parents[1]
NO_FLOCK = """
def none(file, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = none
"""
OWNER = """
import errno, fcntl, sys, time, warnings
from pathlib import Path
from mixflow_fast import folder_lock
warnings.simplefilter("ignore")
folder_lock.TOUCH_S = 0.2
{before}
lock = folder_lock.FolderLock(Path(sys.argv[1]), wait_s=20)
print("held", flush=True)
sys.stdin.read()
lock.close()
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "TOUCH_S", 0.2)
    monkeypatch.setattr(folder_lock, "STALE_S", 1.5)
    monkeypatch.setattr(folder_lock, "WAIT_S", 0.5)


def owner_of(folder: Path, before: str = "") -> subprocess.Popen:
    """Another process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(before=before), str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def no_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)


def test_another_process_is_waited_for_and_named(tmp_path: Path) -> None:
    owner = owner_of(tmp_path)
    who = rf"\(process {owner.pid} on \S+ since 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d\S*\)"
    with (
        pytest.warns(UserWarning, match=f"is in use by another run {who}: waiting") as said,
        pytest.raises(ValueError, match=f"is in use by another run {who}: wait for it or choose"),
    ):
        FolderLock(tmp_path)
    assert len(said) == 1 and is_held(tmp_path)
    # It goes while it is waited for.
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {owner.pid}"])
    with pytest.warns(UserWarning, match="waiting for it up to 20 s"):
        lock = FolderLock(tmp_path, wait_s=20)
    assert shows_token(tmp_path, lock.token) and not shows_token(tmp_path, "other")
    lock.close()
    assert not is_held(tmp_path)
    owner.wait()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    no_flock(monkeypatch, number)
    with pytest.warns(UserWarning, match="on a file system without locks") as said:
        lock = FolderLock(tmp_path)
    assert len(said) == 1 and is_held(tmp_path) and shows_token(tmp_path, lock.token)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=rf"is in use by another run \(process {os.getpid()} on "),
    ):
        FolderLock(tmp_path, wait_s=4.0)  # longer than an owner may be silent
    lock.close()
    assert not is_held(tmp_path) and not (tmp_path / ".lock.owner").exists()


def test_without_locks_the_file_of_a_dead_owner_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = owner_of(tmp_path, NO_FLOCK)
    no_flock(monkeypatch, errno.ENOSYS)
    assert is_held(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    started = time.monotonic()
    with pytest.warns(UserWarning, match=f"in use by another run .process {owner.pid} on"):
        lock = FolderLock(tmp_path, wait_s=20)
    assert time.monotonic() - started > folder_lock.STALE_S
    assert (tmp_path / ".lock.owner").read_text() == lock.token
    lock.close()


def test_an_owner_that_is_taken_over_says_so_and_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_flock(monkeypatch, errno.ENOSYS)
    with pytest.warns(UserWarning) as said:
        lock = FolderLock(tmp_path)
        (tmp_path / ".lock.owner").write_text("another's")
        time.sleep(1)
        lock.close()
    assert re.search("was taken over by another run", str(said[-1].message))
    assert (tmp_path / ".lock.owner").read_text() == "another's"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such"):
        FolderLock(tmp_path / "no-such")
    assert not is_held(tmp_path)


def test_an_owner_who_cannot_read_for_a_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that does not answer well is no other run."""
    no_flock(monkeypatch, errno.ENOSYS)
    with pytest.warns(UserWarning, match="without locks"):
        lock = FolderLock(tmp_path)
    read = folder_lock._read
    monkeypatch.setattr(folder_lock, "_read", lambda path: "")
    time.sleep(3 * folder_lock.TOUCH_S)
    monkeypatch.setattr(folder_lock, "_read", read)
    before = (tmp_path / ".lock.owner").stat().st_mtime_ns
    time.sleep(3 * folder_lock.TOUCH_S)
    assert (tmp_path / ".lock.owner").stat().st_mtime_ns > before
    lock.close()
