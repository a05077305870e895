"""`manifest.json`: what a checkpoint's files must be, so that a damaged one is never loaded.

It is the last file to be written: size and CRC-32 of all others, and a CRC-32 of that list. CRC-32
finds damage, not forgery; at 2 to 4 GB/s it costs a small part of what `torch.save` does, which
SHA-256 would not.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from mixflow_fast.files import check_inside, crc32, write_text

NAME = "manifest.json"
_FORMAT = 1


class Entry(TypedDict):
    """Size and CRC-32 of a file."""

    bytes: int
    crc32: int


def entry(path: Path) -> Entry:
    """Size and checksum of a file as it is now."""
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


def write(folder: Path, files: Mapping[str, Entry]) -> None:
    """Write a folder's manifest, the last file in it.

    Args:
        folder: of the checkpoint.
        files: `entry` by name below the folder, with slashes.
    """
    content = {"format": _FORMAT, "crc32": _crc32_of_json(files), "files": files}
    write_text(folder / NAME, json.dumps(content, indent=1))


def damage(checkpoint: Path, checksums: tuple[int, int] | None = None) -> str | None:
    """Why a checkpoint cannot be used, with the file's name; None if it can.

    Args:
        checkpoint: its folder.
        checksums: (i, n) also reads every n-th file, from the i-th on; None reads only sizes.
    """
    try:
        content = json.loads((checkpoint / NAME).read_text())
        files = content["files"]
        if content["crc32"] != _crc32_of_json(files) or content["format"] != _FORMAT:
            return f"{NAME} is not valid"
        try:
            check_inside(files, checkpoint / NAME)
        except ValueError as error:
            return str(error)
        if reason := other_size(checkpoint, files):
            return reason
        if checksums is not None:
            for name in sorted(files)[checksums[0] :: checksums[1]]:
                if crc32(checkpoint / name) != files[name]["crc32"]:
                    return f"{name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{NAME} is missing"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{NAME} is not valid"
    return None


def other_size(folder: Path, files: Mapping[str, Entry]) -> str | None:
    """The first file that is missing or has another size than its entry says."""
    for name, entry in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return None


def _crc32_of_json(value: object) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
