"""Random reads from the shards of a set, from any thread and after a fork."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path


class ShardFiles:
    """Files that are opened when they are first read, and stay open.

    A read gives its own place (`pread`), so that threads and forked processes share the files.

    Args:
        paths: the files, by number.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, count: int) -> bytes:
        """`count` bytes of a shard from `offset` on.

        Raises:
            ValueError: the shard cannot be opened or ends before.
        """
        descriptor, parts = self._open(shard), []
        while count:
            part = os.pread(descriptor, count, offset)
            if not part:
                raise ValueError(
                    f"{self._paths[shard]} ends at byte {offset:,}, {count:,} more are expected: "
                    "it was cut off or replaced while it is in use"
                )
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _open(self, shard: int) -> int:
        found = self._descriptors.get(shard)
        if found is None:
            with self._lock:
                found = self._descriptors.get(shard)
                if found is None:
                    try:
                        found = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
                    except OSError as error:
                        raise ValueError(
                            f"cannot open the shard {self._paths[shard]}: {error.strerror} (a "
                            f"process opens all {len(self._paths)} of a set; `ulimit -n` is how "
                            "many files it may have open)"
                        ) from error
                    self._descriptors[shard] = found
        return found

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


class Names(Sequence[str]):
    """Lines of a text file, read when the first is asked for: most runs never do.

    Args:
        path: of the file.
        count: how many lines it has.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count
        self._lines: list[bytes] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if self._lines is None:
            self._lines = self._path.read_bytes().split(b"\n")
        return os.fsdecode(self._lines[range(self._count)[index]])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(self._count))
