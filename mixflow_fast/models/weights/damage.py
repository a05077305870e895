"""Weights that are not what was written: wrong checksums, values that are not finite.

`torch.load` looks at neither. The tensors of a file are mapped, so both are one reading of those
that are used, not of the optimizer's state beside them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_BLOCK = 1 << 20


def first_damaged(path: Path, tensors: bool = True) -> str | None:
    """The first member of a zip-layout .pt file whose checksum is wrong; None if there is none.

    Args:
        path: the file; one of another layout has no checksums.
        tensors: False leaves out the tensors' values and reads the rest, which is small.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in _with_checksum(archive):
                if tensors or not _is_tensor(member):
                    try:
                        with archive.open(member) as file:
                            while file.read(_BLOCK):
                                pass
                    except zipfile.BadZipFile:
                        return member.filename
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"{type(error).__name__}: {error}" if zipfile.is_zipfile(path) else None
    return None


def _with_checksum(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    """The members whose checksum was recorded: torch can leave it out, and then it is 0."""
    return (member for member in archive.infolist() if member.CRC)


def _is_tensor(member: zipfile.ZipInfo) -> bool:
    return Path(member.filename).parent.name == "data"


def wrong_checksums(files: Iterable[Path], state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose bytes are not what the zip-layout files say they are.

    Args:
        files: where the tensors are mapped from.
        state: as `torch.load(mmap=True)` gives them: a storage is a member of the archive.
    """
    recorded: dict[int, set[int]] = {}
    for path in filter(zipfile.is_zipfile, files):
        with zipfile.ZipFile(path) as archive:
            for member in filter(_is_tensor, archive.infolist()):
                recorded.setdefault(member.file_size, set()).add(member.CRC)
    sound: dict[int, bool] = {}
    for tensor in state.values():
        storage = tensor.untyped_storage()
        place, known = storage.data_ptr(), recorded.get(storage.nbytes(), {0})
        # Which member it is cannot be asked; that another of its size has its checksum is as
        # unlikely as that damage leaves the checksum as it was.
        if place not in sound:
            sound[place] = 0 in known or _crc32(storage) in known
    return [n for n, tensor in state.items() if not sound[tensor.untyped_storage().data_ptr()]]


def _crc32(storage: torch.UntypedStorage) -> int:
    return zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; one pass over memory unless the sum overflows."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # of eight bits, torch knows neither sums nor isfinite
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def not_finite(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many values are not finite, by the name of each tensor that has any."""
    bad = {name: tensor for name, tensor in state.items() if not is_finite(tensor)}
    return {name: int((~tensor.float().isfinite()).sum()) for name, tensor in bad.items()}


def describe_not_finite(state: Mapping[str, Tensor], under: str = "") -> str:
    """ "NAME has 12 values that are not finite, ..." of the first such tensor; "" if all are.

    Args:
        state: name -> tensor.
        under: said after the name.
    """
    counts = not_finite(state)
    if not counts:
        return ""
    name, values = next(iter(counts.items()))
    what = "1 value that is" if values == 1 else f"{values} values that are"
    more = f", and {len(counts) - 1} more of {len(state)} tensors" * (len(counts) > 1)
    return f"{name}{under} has {what} not finite{more}"


def refuse_not_finite(state: Mapping[str, Tensor], owner: object, way_out: str) -> None:
    """ValueError that names `owner`, the tensor and the way out, unless all values are finite."""
    if text := describe_not_finite(state):
        raise ValueError(f"{owner}: {text}: {way_out}")
