"""`mixflow-fast data verify`: whether a set is still what was written."""

from __future__ import annotations

import argparse
import threading
from typing import TYPE_CHECKING

from mixflow_fast.files import existing_folder, user_path

if TYPE_CHECKING:
    from mixflow_fast.metrics.progress import Progress

WHOLE, DAMAGED = 0, 1
_MB = 1_000_000


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "verify",
        help="hash a set of images or latents, or a cache of captioned images",
        description="Reads all files of a set and compares them with its manifest. The exit code "
        "is 0 for a whole set, 1 for a damaged or an incomplete one.",
        epilog="example: mixflow-fast data verify imagenet-256",
    )
    command.add_argument("set", type=user_path, help="folder that prepare or encode has made")
    command.add_argument("--threads", type=int, default=0, help="default: the cores")
    command.set_defaults(data_command=run)


def run(options: argparse.Namespace) -> int:
    import sys

    from mixflow_fast.data.set_files import (
        MANIFEST,
        all_files,
        bytes_of,
        how_far,
        read_manifest,
        set_format,
        verify,
    )
    from mixflow_fast.messages import size_text
    from mixflow_fast.metrics.progress import Progress

    root = existing_folder(options.set, "the folder of a set")
    if not (root / MANIFEST).is_file() and how_far(root) is None:
        read_manifest(root, "")  # raises: it is no set at all
    try:
        manifest = read_manifest(root, set_format(root) or "")
        records = all_files(root, manifest)
        size, files = bytes_of(records), len(records)
        with Progress(size // _MB, "verify", "MB") as progress:
            faults = verify(root, options.threads, _Megabytes(progress))
    except ValueError as error:
        print(f"mixflow-fast: error: {error}", file=sys.stderr)
        return DAMAGED
    if not faults:
        print(f"{root}: whole, {manifest['format']}, {files:,} files, {size_text(size)}")
        return WHOLE
    print("\n".join(faults))
    if any((root / str(record["file"])).is_symlink() for record in records):
        # Nobody is told to delete files that were not made here.
        print(
            f"{root}: {len(faults)} of {files:,} files are damaged. It maps files of another "
            f"program where they are: put those back as they were, or delete {root} (not what its "
            "links lead to) and import them again"
        )
        return DAMAGED
    manifests = MANIFEST
    if any(str(record["file"]).endswith(f"/{MANIFEST}") for record in records):
        manifests = f"each {MANIFEST} in the folders that they are in, up to {root}"
    print(
        f"{root}: {len(faults)} of {files:,} files are damaged. Delete them and {manifests}, and "
        "run the command that made the set again: it makes what is missing and nothing else"
    )
    return DAMAGED


class _Megabytes:
    """Counts bytes from several threads into a progress of megabytes."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._rest, self._lock = progress, 0, threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._rest += count
            if self._rest >= _MB:
                self._progress.advance(self._rest // _MB)
                self._rest %= _MB
