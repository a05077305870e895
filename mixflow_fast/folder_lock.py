"""One process at a time in a folder, on local disks and on those that machines share.

The lock is the kernel's (`flock`), which ends with its process. Where the file system has none
(Lustre without `-o flock`, some NFS), it is a file that its owner touches every few seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import secrets
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import IO

# How long a lock of another process is waited for: that of a machine that died lives on until the
# file server's lease ends.
WAIT_S = 60.0
# Without flock: how often the owner touches its file, and after how long without it he is dead.
TOUCH_S, STALE_S = 5.0, 30.0
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_LOCK, _OWNER = ".lock", ".lock.owner"


class FolderLock:
    """A folder that this process holds until `close`, or until its end.

    Args:
        folder: exists and can be written.
        wait_s: how long to wait for another process that holds it; None: `WAIT_S`.
        way_out: what else can be done, for the error.

    Attributes:
        token: random text, which others can read in the folder's `.lock`.

    Raises:
        ValueError: another process holds it; its machine, number and start, where they are known.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        wait_s: float | None = None,
        way_out: str = "choose another out=",
    ) -> None:
        self.folder, self.token, self._way_out = folder, secrets.token_hex(16), way_out
        self._wait_s = WAIT_S if wait_s is None else wait_s
        self._owner: Path | None = None
        self._closed = threading.Event()
        self._file = (folder / _LOCK).open("a+")
        try:
            if not self._flock():
                self._own()
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            self._who = f"{socket.gethostname()} {os.getpid()} {now}"
            self._file.truncate(0)
            self._file.write(f"{self._who} {self.token}\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        self._closed.set()
        self._file.close()
        if self._owner is not None and _read(self._owner) == self.token:
            self._owner.unlink(missing_ok=True)

    def _flock(self) -> bool:
        """Take the kernel's lock; False where the file system has none."""
        waiting = _Waiting(self.folder, self._wait_s, self._way_out)
        while True:
            try:
                _flock(self._file, exclusive=True)
                return True
            except OSError as error:
                if error.errno not in _HELD:
                    warnings.warn(
                        f"{self.folder} is on a file system without locks ({error.strerror}): "
                        f"this run keeps others out by touching {_OWNER} there",
                        stacklevel=4,
                    )
                    return False
            waiting.go_on(_read(self.folder / _LOCK))

    def _own(self) -> None:
        """Make the owner's file, or take over that of an owner who does not touch it any more."""
        path, waiting = self.folder / _OWNER, _Waiting(self.folder, self._wait_s, self._way_out)
        seen, since = None, time.monotonic()
        while True:
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                file.write(self.token)
                break
            # By changes and not by its age: the clocks of machines differ.
            with contextlib.suppress(FileNotFoundError):
                if (now := (_read(path), path.stat().st_mtime_ns)) != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > STALE_S:
                    # Of several that see it, one renames it.
                    os.rename(path, path.with_name(f"{_OWNER}.{self.token}"))
                    path.with_name(f"{_OWNER}.{self.token}").unlink()
                    continue
            waiting.go_on(_read(self.folder / _LOCK))
        self._owner = path
        threading.Thread(target=self._touch, daemon=True).start()

    def _touch(self) -> None:
        while not self._closed.wait(TOUCH_S):
            # Nothing is read where the file server does not answer well: the owner stays.
            if _read(self._owner) not in ("", self.token):
                warnings.warn(
                    f"{self.folder} was taken over by another run, which found this one silent",
                    stacklevel=2,
                )
                return
            with contextlib.suppress(OSError):
                os.utime(self._owner)


class _Waiting:
    """The wait for a lock of another process, which is said once."""

    def __init__(self, folder: Path, wait_s: float, way_out: str) -> None:
        self._folder, self._wait_s, self._way_out = folder, wait_s, way_out
        self._until = time.monotonic() + wait_s
        self._said = False

    def go_on(self, record: str) -> None:
        """Wait a little; ValueError at the end of the time. `record` is what `.lock` holds."""
        host, _, rest = record.partition(" ")
        pid, _, started = rest.rpartition(" ")[0].partition(" ")
        who = f"another run (process {pid} on {host} since {started})" if pid else "another run"
        if time.monotonic() >= self._until:
            raise ValueError(f"{self._folder} is in use by {who}: wait for it or {self._way_out}")
        if not self._said:
            self._said = True
            warnings.warn(
                f"{self._folder} is in use by {who}: waiting for it up to {self._wait_s:.0f} s",
                stacklevel=5,
            )
        time.sleep(min(0.5, self._wait_s / 10))


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder; without flock as far as the clocks of machines agree."""
    # A process id in a file may be another process by now; the kernel drops a lock with its owner.
    try:
        with (folder / _LOCK).open() as file:
            _flock(file, exclusive=False)
    except OSError as error:
        if error.errno in _HELD:
            return True
    # No lock file, or a file system without locks.
    with contextlib.suppress(OSError):
        return time.time() - (folder / _OWNER).stat().st_mtime < STALE_S
    return False


def shows_token(folder: Path, token: str) -> bool:
    """Whether this process sees the folder whose holder has this token."""
    with contextlib.suppress(OSError):
        os.listdir(folder.parent)  # a client of NFS may remember that it was not there
    return _read(folder / _LOCK).endswith(f" {token}")


def _flock(file: IO[str], exclusive: bool) -> None:
    import fcntl

    fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
