"""Work in shards: any number of processes, each of which may be killed and started again.

A shard is a file (or a folder of files) that is a function of the source and of the settings alone.
It is written under another name, flushed and renamed, and then a small file in `done/` says so.
What is done is never made twice; what is not done is shared by the processes that are there, by
their numbers and without a word between them. Whoever finds all shards done writes the manifest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from mixflow_fast.data.set_files import (
    DONE,
    MANIFEST,
    WORK,
    check_sizes,
    folder_digest,
    read_manifest,
    set_format,
    sha256_of,
    size_of,
)
from mixflow_fast.files import sync
from mixflow_fast.folder_lock import FolderLock

_LOCKS, _TEMPORARY = ".locks", ".tmp-"
# All that a set's folder may hold besides its files before this command was there.
_IGNORED = {".DS_Store", "lost+found"}
# What settings are called on the command line, where that is another name.
_OPTIONS = {
    "shard_rows": "--shard-images",
    "shard_samples": "--shard-samples",
    "shard_images": "--shard-images",
    "shard_prompts": "--shard-prompts",
    "image_format": "--format",
    "mirrors": "--mirrors",
    "data": "--data",
    "text": "--text",
    "text_length": "--t5-length",
    "text_dtype": "--dtype",
    "text_batch": "--text-batch",
    "image_batch": "--batch",
    "buckets": "--buckets or --size",
    "class_name": "--model",
    "transformer": "--model",
    "encoders": "--model",
    "device": "--device",
    "vae": "--model",
}


def ranks_of_environment() -> tuple[int, int]:
    """(number of this process, how many there are) as torchrun or srun say it; else (0, 1)."""
    from mixflow_fast.distributed.process_group import rank, world_size

    return rank(), world_size()


class ShardWork:
    """The shards of one set, and this process's part of them. Use it as a context manager.

    Args:
        out: folder of the set; it is made.
        settings: plain values that decide about the content. A set that was begun with others is
            refused.
        shards: how many.
        suffix: of the shards' files, such as ".tar"; "" for shards that are folders.
        rank, world: this process among those that were started together.
        folder: of the shards, below `out`.
        manifest: name of the file that is written last.
        kept: the shards stay when the set is whole. Else one that is gone then is no damage.

    Attributes:
        complete: the manifest is there: nothing is left to do.
        redone: shards that were done and whose file is missing or has another size.

    Raises:
        ValueError: the set was begun with other settings (names the first), `out` holds something
            else, or another process works as the same rank.
    """

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, object],
        shards: int,
        suffix: str,
        rank: int = 0,
        world: int = 1,
        *,
        folder: str = "shards",
        manifest: str = MANIFEST,
        kept: bool = True,
    ) -> None:
        self.out, self._folder, self._suffix, self.shards = out, out / folder, suffix, shards
        self._rank, self._world, self._manifest, self._kept = rank, world, out / manifest, kept
        _check_folder(out, manifest, folder)
        # Some values are written otherwise than they are (tuples as lists).
        wanted = json.loads(json.dumps({**settings, "shards": shards}, allow_nan=False))
        _compare(out, wanted)
        for made in (self._folder, out / DONE, out / _LOCKS / str(rank)):
            made.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(out / _LOCKS / str(rank), way_out="choose another --out")
        try:
            self._begin(wanted)
        except BaseException:
            self.close()
            raise

    def _begin(self, wanted: Mapping[str, object]) -> None:
        self._clear(f"{_TEMPORARY}{self._rank}-")
        was_complete = self._manifest.is_file()
        if not (self.out / WORK).is_file():
            # Under a name of this rank's: process numbers repeat on other machines.
            partial = self.out / f"{_TEMPORARY}{self._rank}-{WORK}"
            _write_json(partial, wanted)
            os.replace(partial, self.out / WORK)
        _compare(self.out, wanted)  # two may have begun at once
        records = {number: self._record(number) for number in self._done()}
        self.redone = sorted(n for n, record in records.items() if not self._holds(n, record))
        if not self._kept and self._manifest.is_file():  # looked at after them: it comes first
            self.redone = []
        for number in self.redone:
            self._done_file(number).unlink(missing_ok=True)
        missing = len(records) - len(self.redone) < self.shards
        lacks = self._manifest.name == MANIFEST and _lacks_files(self.out)
        if was_complete and (missing or lacks):
            self._manifest.unlink(missing_ok=True)
        self.complete = self._manifest.is_file()

    def __enter__(self) -> ShardWork:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process work as this rank; what it had begun is deleted."""
        with contextlib.suppress(OSError):  # a full or a broken disk: the next start deletes it
            self._clear(f"{_TEMPORARY}{self._rank}-")
        self._lock.close()
        if self._manifest.is_file():  # who still holds a lock has nothing left to make
            shutil.rmtree(self.out / _LOCKS, ignore_errors=True)

    def remaining(self) -> list[int]:
        """Numbers of the shards that this process is to make, in order.

        Every `world`-th of all shards, less what is done: of those that are left the parts of two
        processes would depend on what the other had finished when each of them looked.
        """
        done = self._done()
        return [n for n in range(self._rank, self.shards, self._world) if n not in done]

    def make_again(self, unwanted: Callable[[Mapping[str, object]], bool]) -> None:
        """Take those of this process's shards as not done whose done file is `unwanted`."""
        for number in self._done() & set(range(self._rank, self.shards, self._world)):
            if unwanted(self._record(number)):
                self._done_file(number).unlink(missing_ok=True)

    def unfinished(self) -> int:
        """How many shards are not done, of whatever process."""
        return self.shards - len(self._done())

    def path(self, number: int) -> Path:
        """Where a finished shard is."""
        return self._folder / f"{number:05d}{self._suffix}"

    def temporary(self, number: int) -> Path:
        """Where to write a shard, on the same file system."""
        return self._folder / f"{_TEMPORARY}{self._rank}-{number:05d}{self._suffix}"

    def finish(
        self,
        number: int,
        rows: int,
        extra: Mapping[str, object],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Flush and rename what was written at `temporary(number)`, and note that it is done.

        Args:
            number: of the shard.
            rows: examples in it.
            extra: what else is to be known when the manifest is written: plain values, a function
                of the shard alone.
            digests: of a shard that is a folder, SHA-256 of each file, where its writer knows them:
                the files are not read again then.
        """
        partial, path = self.temporary(number), self.path(number)
        if number in self._done():  # by a process that was started beside this one: the same bytes
            _remove(partial)
            return
        size, digest = _measure(partial, digests)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
        _sync(self._folder)
        note = self.out / DONE / f"{_TEMPORARY}{self._rank}-{number:05d}.json"
        _write_json(note, {"rows": rows, "bytes": size, "sha256": digest, **extra})
        os.replace(note, self._done_file(number))
        _sync(self.out / DONE)

    def forget(self, number: int) -> None:
        """What is done of a shard was found to be damaged: it is not done any more."""
        self._done_file(number).unlink(missing_ok=True)

    def discard(self, number: int) -> None:
        """Delete what was written at `temporary(number)`."""
        _remove(self.temporary(number))

    def finished(self) -> list[dict[str, object]]:
        """What the done files hold of the shards that are done, in order, whoever made them."""
        return [self._record(number) for number in sorted(self._done())]

    def records(self) -> list[dict[str, object]] | None:
        """What the shards' done files hold, in the order of the shards: rows, bytes, sha256, extra.

        `file` is added, relative to `out`. None while some shard is not done.
        """
        done = self._done()
        if len(done) < self.shards:
            return None
        return [
            {"file": self.path(n).relative_to(self.out).as_posix(), **self._record(n)}
            for n in range(self.shards)
        ]

    def complete_with(self, write: Callable[[list[dict[str, object]]], None]) -> bool:
        """Finish the set where all shards are done; one process at a time.

        Args:
            write: gets `records()`, writes the files beside the shards, and the manifest last.

        Returns:
            whether the set is whole now, by this process or another.
        """
        records = self.records()
        if records is None:
            return self._manifest.is_file()
        lock = self.out / _LOCKS / "manifest"
        try:
            lock.mkdir(parents=True, exist_ok=True)
            with FolderLock(lock, way_out="run the command once more"):
                if not self._manifest.is_file():
                    self._clear(_TEMPORARY)  # of ranks that died: nothing is left to make
                    for partial in self.out.glob(".*.tmp"):  # of a manifest's writer that died
                        _remove(partial)
                    write(records)
        except FileNotFoundError:  # another process has finished the set and its locks
            if not self._manifest.is_file():
                raise
        self.complete = True
        return True

    def _done(self) -> set[int]:
        """Numbers of the shards that are done; by a listing, which no network client remembers."""
        names = os.listdir(self.out / DONE)
        found = {int(n[:5]) for n in names if n.endswith(".done.json") and n[:5].isdigit()}
        return {number for number in found if number < self.shards}

    def _done_file(self, number: int) -> Path:
        return self.out / DONE / f"{number:05d}.done.json"

    def _record(self, number: int) -> dict[str, object]:
        """Content of a done file; without `bytes` where it is damaged, so that nothing fits it."""
        try:
            record = json.loads(self._done_file(number).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _holds(self, number: int, record: Mapping[str, object]) -> bool:
        """Whether the shard's file is there, with the size that was noted."""
        try:
            return size_of(self.path(number)) == record.get("bytes")
        except OSError:
            return False

    def _clear(self, prefix: str) -> None:
        for folder in (self._folder, self.out / DONE, self.out):
            for path in folder.glob(f"{prefix}*"):
                _remove(path)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """A write that fails says which file it was: of a full disk the system only says that it is."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _check_folder(out: Path, manifest: str, folder: str) -> None:
    """Refuse a folder that holds something else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is not a folder: choose another --out")
    names = _names(out)
    if {WORK, manifest} & names or not names - {_LOCKS, DONE}:
        return
    # Another rank, which began at the same time, makes its folders first; and may be further now.
    if not names - {_LOCKS, DONE, folder} and (not _names(out / folder) or (out / WORK).is_file()):
        return
    raise ValueError(
        f"{out} is not empty and no set was begun there (it holds {min(names)!r}): choose "
        "another --out"
    )


def _names(folder: Path) -> set[str]:
    return {n for n in os.listdir(folder) if not n.startswith(_TEMPORARY)} - _IGNORED


def _lacks_files(out: Path) -> bool:
    """Whether a manifest is damaged, or a file that it lists is missing or has another size."""
    try:
        check_sizes(out, read_manifest(out, set_format(out) or ""))
    except ValueError:
        return True
    return False


def _compare(out: Path, wanted: Mapping[str, object]) -> None:
    """Refuse a set that was begun with other settings."""
    if not (out / WORK).is_file():
        return
    try:
        begun = json.loads((out / WORK).read_text(encoding="utf-8"))
        names = [*wanted, *(name for name in begun if name not in wanted)]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"cannot read {out / WORK}: {error}. Choose another --out, or delete {out}"
        ) from error
    for name in names:
        before, now = begun.get(name), wanted.get(name)
        if before != now:
            before, now = _differing(before, now)
            option = f" ({_OPTIONS[name]})" if name in _OPTIONS else ""
            raise ValueError(
                f"{out} was begun with {name} = {before!r}, now it is {now!r}{option}: "
                "go on with what it was begun with, choose another --out, or delete the folder"
            )


def _differing(before: object, now: object) -> tuple[object, object]:
    """Of two records only the entries that are not the same."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return before, now
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    return {n: before.get(n) for n in names}, {n: now.get(n) for n in names}


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False)
    with named_errors(path), path.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _measure(path: Path, digests: Mapping[str, str] | None) -> tuple[int, str]:
    """Size and SHA-256 of a shard that was written, flushed to the disk."""
    for written in (*path.rglob("*"), path) if path.is_dir() else (path,):
        _sync(written)
    return size_of(path), sha256_of(path) if digests is None else folder_digest(digests)


def _sync(path: Path) -> None:
    with named_errors(path):
        sync(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
