"""One checkpoint while the ranks write it: it becomes the newest, or nothing of it stays.

Training waits only while its state is copied into host memory. Files are written, agreed upon and
renamed by a thread, whose exchanges with the other ranks go through a process group of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from mixflow_fast.checkpoints import manifest
from mixflow_fast.checkpoints.host_copy import host_copy
from mixflow_fast.checkpoints.run_folder import (
    RunState,
    checkpoint_folders,
    checkpoint_name,
    publish,
    step_of,
)
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.files import ChecksummedFile, sync, write_text


class SaveError(OSError):
    """A checkpoint could not be written; raised on every rank with the same text."""


def temporary_name(step: int) -> str:
    """Folder name while the checkpoint is being written."""
    return f".writing_{checkpoint_name(step)}"


class CheckpointWriter:
    """One checkpoint: every rank makes a writer, gives it what to write, and commits it.

    A rank's error is kept until the commit, where all hear of it: raised at once it would leave the
    other ranks waiting in DeepSpeed's barriers.

    Args:
        out: run folder.
        step: optimizer steps done.
        host_group: exchange between the ranks at the commit. Where the commit runs in a thread,
            nothing else may use it meanwhile.

    Attributes:
        folder: temporary folder in which the files go.
        step: as given.
    """

    def __init__(self, out: Path, step: int, host_group: HostGroup) -> None:
        self._out, self.step, self._host_group = out, step, host_group
        self._error: str | None = None
        self._waiting: list[Callable[[], None]] = []
        self._files: dict[str, manifest.Entry] = {}
        self.folder = out / "checkpoints" / temporary_name(step)
        with self.attempt():
            self.folder.mkdir(parents=True, exist_ok=True)

    def ready(self) -> bool:
        """Whether no rank has met an error so far. Every rank must call it."""
        return not any(self._host_group.all_gather(self._error))

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Errors of writing inside are kept for the commit."""
        try:
            yield
        except (OSError, RuntimeError, MemoryError) as error:
            if self._error is None:
                free = ""
                with contextlib.suppress(OSError):
                    free = f" ({shutil.disk_usage(self._out).free / 2**20:.0f} MiB free)"
                root = _root(error)
                self._error = f"{str(root) or type(root).__name__}{free}"  # MemoryError has no text

    def write(self, state_dict: object, path: str | os.PathLike[str]) -> None:
        """Take a copy of a state, which the commit writes to this rank's own file.

        The arguments have the names by which DeepSpeed gives them.
        """
        with self.attempt():
            copied = host_copy(state_dict)
            self.later(lambda: self._write(copied, Path(path)))

    def later(self, write: Callable[[], None]) -> None:
        """Leave to the commit what writes a file into `folder`."""
        self._waiting.append(write)

    def _write(self, content: object, path: Path) -> None:
        with open(path, "wb") as raw:
            file = ChecksummedFile(raw)
            with _without_zip_checksums():
                torch.save(content, file)
            raw.flush()
            os.fsync(raw.fileno())
        name = path.relative_to(self.folder).as_posix()
        self._files[name] = {"bytes": file.bytes, "crc32": file.crc32}

    def commit(self, state: RunState, keep_last: int, keep_every: int = 0) -> Path:
        """Write it, and make it the newest checkpoint if every rank wrote its part.

        Args:
            state, keep_last, keep_every: as for the function `commit`.

        Raises:
            SaveError: a rank could not; nothing of it stays, and older checkpoints are whole.
        """
        while self._waiting and self._error is None:
            with self.attempt():
                self._waiting.pop(0)()  # lets go of the copy as soon as it is written
        self._waiting = []
        parts = self._host_group.all_gather((self._error, self._files))
        entries = {name: entry for _, own in parts for name, entry in own.items()}
        errors = [error for error, _ in parts]
        if not any(errors):
            if self._host_group.rank == 0:
                with self.attempt():
                    commit(self._out, state, keep_last, keep_every, entries)
            errors = self._host_group.all_gather(self._error)
        failed = {rank: error for rank, error in enumerate(errors) if error is not None}
        if failed:
            if self._host_group.rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._host_group.all_gather(None)  # a launcher ends all ranks when the first has ended
            who = f"rank {min(failed)}: " if self._host_group.ranks > 1 else ""
            raise SaveError(
                f"checkpoint of step {self.step} could not be written to {self._out}: "
                f"{who}{failed[min(failed)]}; the checkpoints from before stay. With that put "
                "right, the same command resumes"
            )
        return self._out / "checkpoints" / checkpoint_name(self.step)


class SaveInProgress:
    """A commit in a thread, which begins at once.

    Args:
        step: optimizer steps of the checkpoint.
        commit: a call of its writer's `commit`.

    Attributes:
        step: as given.
        seconds: how long the commit took, once it is done.
    """

    def __init__(self, step: int, commit: Callable[[], Path]) -> None:
        self.step, self.seconds = step, 0.0
        self._commit = commit
        self._path: Path | None = None
        self._error: BaseException | None = None
        # A daemon: a rank whose peers are gone must be able to end while this waits for them.
        self._thread = threading.Thread(target=self._run, name="mixflow_fast-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._path = self._commit()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - started

    @property
    def done(self) -> bool:
        """Whether it came to its end, good or bad."""
        return not self._thread.is_alive()

    def wait(self, limit_s: float | None = None) -> Path | None:
        """Wait for its end.

        Args:
            limit_s: seconds; None waits as long as it takes.

        Returns:
            the checkpoint's folder; None where the limit came first.

        Raises:
            SaveError: a rank could not write; on every rank.
            RuntimeError: the exchange with the other ranks failed.
        """
        self._thread.join(limit_s)
        if not self.done:
            return None
        if self._error is not None:
            raise self._error
        return self._path


@contextlib.contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """torch.save puts a CRC-32 of its own into the file: the manifest has one of the whole file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def commit(
    out: Path,
    state: RunState,
    keep_last: int,
    keep_every: int = 0,
    entries: Mapping[str, manifest.Entry] | None = None,
) -> Path:
    """Make a fully written temporary checkpoint the newest one. One rank only, after all wrote.

    Args:
        out: run folder.
        state: goes to state.json, and says the step.
        keep_last: newest checkpoints that stay; older ones are deleted.
        keep_every: checkpoints whose step is a multiple stay for good; 0 = none.
        entries: manifest entries of files that their ranks flushed; the others are made here.

    Returns:
        the checkpoint's folder.

    Raises:
        OSError: it could not be written.
    """
    folder = out / "checkpoints"
    temporary, final = folder / temporary_name(state.step), folder / checkpoint_name(state.step)
    write_text(temporary / "state.json", state.to_json())
    entries = dict(entries or {})
    # A rank on another machine may have written to a disk of its own.
    if reason := manifest.other_size(temporary, entries):
        raise OSError(
            f"{reason} as rank 0 sees {temporary}: out= must be on a file system that all machines "
            "share"
        )
    # Files and their names must be on the disk before the manifest says that they are there.
    for path in sorted(temporary.rglob("*")):
        name = path.relative_to(temporary).as_posix()
        if path.is_dir():
            sync(path)
        elif name not in entries:
            sync(path)
            entries[name] = manifest.entry(path)
    manifest.write(temporary, entries)
    aside = final.with_name(f".deleting_{final.name}")
    if final.exists():  # written again, by a run that resumed from it with other shards
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    # A kill between the two renames leaves both under names that the next start knows.
    try:
        os.rename(temporary, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    sync(folder)
    # Older ones go only now: until the new name is on the disk they are all there is.
    shutil.rmtree(aside, ignore_errors=True)
    _prune(out, state.step, keep_last, keep_every)
    try:
        publish(final, out)
    except OSError as error:
        warnings.warn(
            f"{final} is complete, but {out / 'weights.pt'} is still an older one: {error}",
            stacklevel=2,
        )
    return final


def _prune(out: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete older checkpoints than the `keep_last` newest whole ones up to `step`, which was just
    written; not multiples of keep_every. Later ones are damaged: the run did not begin with them.
    """
    up_to = [path for path in checkpoint_folders(out) if step_of(path) <= step]
    whole = [path for path in up_to if manifest.damage(path) is None]
    oldest = step_of(whole[-keep_last:][0])
    for path in checkpoint_folders(out):
        if step_of(path) < oldest and not (keep_every and step_of(path) % keep_every == 0):
            with contextlib.suppress(OSError):
                _delete(path)


def _delete(checkpoint: Path) -> None:
    """Under another name first, so that a kill leaves no half of it under its own."""
    aside = checkpoint.with_name(f".deleting_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _root(error: BaseException) -> BaseException:
    """The system's error behind torch's own ("unexpected pos 832 vs 790" is a full disk)."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    return inner or error
