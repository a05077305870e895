"""What a folder of images holds, from the headers alone, and what a set of it would be."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mixflow_fast.data.preparation.formats import EXACT, FORMATS, Format, encode
from mixflow_fast.data.preparation.imagenet import (
    KNOWN_CMYK,
    KNOWN_PNG,
    TRAIN_CLASS_IMAGES,
    TRAIN_IMAGES,
)
from mixflow_fast.data.preparation.source import Header, Source, read_crop, read_header
from mixflow_fast.data.summary import sample_rows
from mixflow_fast.messages import duration, shorten, size_text

SAMPLED = 200
_CHUNK = 64
_BY_SUFFIX = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
# What a reader of JPEG may see beside it: a photo with a preview.
_JPEG_LIKE = {"JPEG", "MPO"}


@dataclass(frozen=True)
class BadImage:
    """An image that no set can be made of.

    Attributes:
        source: its number.
        file: relative to the folder of the images.
        reason: why.
    """

    source: int
    file: str
    reason: str

    def describe(self) -> str:
        """One line."""
        return f"{self.file}: {self.reason}"


@dataclass
class Scan:
    """Counts over the images of a source.

    Attributes:
        bytes: of all files.
        formats, modes: how many images have which.
        halvings: how many images are halved how often before the bicubic resize.
        enlarged: images smaller than the size.
        oddities: names of the images by what is odd about them; none of it is an error.
        exif_warnings: files whose EXIF is damaged, which matters to nobody here.
        bad: images that cannot be used, by number.
    """

    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    halvings: Counter[int] = field(default_factory=Counter)
    enlarged: int = 0
    oddities: dict[str, list[str]] = field(default_factory=dict)
    exif_warnings: int = 0
    bad: list[BadImage] = field(default_factory=list)

    def add(self, other: Scan) -> None:
        """Take up the counts of images that come after these."""
        self.bytes += other.bytes
        self.formats += other.formats
        self.modes += other.modes
        self.halvings += other.halvings
        self.enlarged += other.enlarged
        for what, names in other.oddities.items():
            self.oddities.setdefault(what, []).extend(names)
        self.bad += other.bad


def halvings(width: int, height: int, size: int) -> int:
    """How often ADM's crop halves an image before its bicubic resize."""
    count = 0
    while min(width, height) >= 2 * size:
        width, height, count = width // 2, height // 2, count + 1
    return count


def scan_source(
    source: Source,
    size: int | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Scan:
    """Read the header of every image.

    Args:
        source: the images.
        size: side of the crops in pixels, for halvings.
        threads: 0: four a core, since they wait for the disk.
        progress: called with how many more were read, from the calling thread.
    """
    found = Scan()
    chunks = [range(n, min(n + _CHUNK, len(source))) for n in range(0, len(source), _CHUNK)]
    with warnings.catch_warnings(record=True) as caught:
        # Of the whole process, and hence of the threads.
        warnings.simplefilter("always")
        with ThreadPoolExecutor(threads or 4 * core_count()) as pool:
            for part in pool.map(lambda numbers: _scan_part(source, numbers, size), chunks):
                found.add(part)
                if progress is not None:
                    progress(_CHUNK)
    found.exif_warnings = sum("EXIF" in str(warning.message) for warning in caught)
    return found


def core_count() -> int:
    """Cores of this process, shared with the other ranks of this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    ranks = ranks.partition("(")[0].partition(",")[0]
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(1, int(ranks) if ranks.isdecimal() else 1))


def _scan_part(source: Source, numbers: Sequence[int], size: int | None) -> Scan:
    part = Scan()
    for number in numbers:
        name = source.files[number]
        try:
            length, file = source.look(number)
            part.bytes += length
            header = read_header(file)
        except ValueError as error:
            part.bad.append(BadImage(number, name, str(error)))
            continue
        part.formats[header.format] += 1
        part.modes[header.mode] += 1
        if size is not None:
            part.halvings[halvings(header.width, header.height, size)] += 1
            part.enlarged += min(header.width, header.height) < size
        for what in _oddities(name, header):
            part.oddities.setdefault(what, []).append(name)
    return part


def _oddities(name: str, header: Header) -> Iterator[str]:
    expected = _BY_SUFFIX.get(os.path.splitext(name)[1].lower())
    if header.format != expected and not (expected == "JPEG" and header.format in _JPEG_LIKE):
        yield f"{header.format} by the name of another format"
    if header.mode in ("L", "1", "LA"):
        yield "grey"
    elif header.mode not in ("RGB", "CMYK"):
        yield f"mode {header.mode}"
    elif header.mode == "CMYK":
        yield "CMYK"
    if header.orientation != 1:
        yield "EXIF orientation, not applied as in ADM"


@dataclass(frozen=True)
class Estimate:
    """What a set would be, from a sample of the images.

    Attributes:
        images: in the sample, of those that could be read.
        bytes: expected size of the whole set.
        seconds: expected time of all images, with the threads that were tried.
    """

    images: int
    bytes: float
    seconds: float


def estimate(
    source: Source, size: int, image_format: Format, threads: int = 0, most: int = SAMPLED
) -> Estimate:
    """Prepare a sample of the images in memory, evenly spaced and always the same.

    Args:
        source: the images.
        size: side in pixels.
        image_format: of the set.
        threads: 0: one a core.
        most: images in the sample.
    """
    numbers = sample_rows(len(source), most)

    def length(number: int) -> int:
        try:
            return len(encode(read_crop(source.read(number), size), image_format))
        except (ValueError, OSError):
            return 0

    started = time.monotonic()
    with quiet_pillow(), ThreadPoolExecutor(threads or core_count()) as pool:
        lengths = [n for n in pool.map(length, numbers) if n]
    seconds = (time.monotonic() - started) / max(1, len(numbers)) * len(source)
    # With the headers of a tar's two members, and half a block of padding each.
    overhead = 0 if image_format in ("raw", "png") else 4 * 512
    mean = float(np.mean(lengths)) + overhead if lengths else 0.0
    return Estimate(len(lengths), mean * len(source), seconds)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's warnings on damaged EXIF and large images are of no use while a set is made."""
    with warnings.catch_warnings():  # of the whole process, and hence of its threads
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


def describe_scan(source: Source, found: Scan, size: int | None) -> list[str]:
    """Lines for people on what was found."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    classes = "1 class" if len(source.classes) == 1 else f"{len(source.classes)} classes"
    lines = [
        f"images    {len(source):,} in {classes} ({counts.min():,} to {counts.max():,} each), "
        f"{size_text(found.bytes)}"
    ]
    if source.scheme == "imagenet":
        lines.append(f"classes   the 1000 synsets of ImageNet-1k{_train_note(len(source), counts)}")
    else:
        lines.append(f"classes   folders in alphabetical order: {shorten(source.classes)}")
    lines.append(f"formats   {_counted(found.formats)}")
    lines.append(f"modes     {_counted(found.modes)}")
    if size is not None:
        halved = "; ".join(
            f"{k:,} halved {'once' if n == 1 else f'{n} times'}" if n else f"{k:,} not halved"
            for n, k in sorted(found.halvings.items())
        )
        lines.append(f"crop      at {size} px: {halved or 'none'}; {found.enlarged:,} enlarged")
    for what, names in sorted(found.oddities.items()):
        lines.append(f"odd       {what}: {len(names):,}{_known(what, names, source)}")
    if found.exif_warnings:
        lines.append(f"odd       damaged EXIF, which nobody reads: {found.exif_warnings:,}")
    lines += [f"note      {note}" for note in source.notes]
    lines += [f"warning   {warning}" for warning in source.warnings]
    lines.append(f"bad       {len(found.bad):,}" + (":" if found.bad else ""))
    return lines + [f"  {bad.describe()}" for bad in found.bad]


def describe_estimates(
    source: Source, size: int, threads: int, free_of: Path, chosen: Format | None = None
) -> list[str]:
    """Lines for people on sizes, time and free disk.

    Args:
        source: the images.
        size: side in pixels.
        threads: 0: one a core.
        free_of: a path on the disk that the set is meant for; it need not exist.
        chosen: the format that is meant; None: all are equal.
    """
    lines = []
    for image_format in (*FORMATS, *([chosen] if chosen and chosen not in FORMATS else [])):
        found = estimate(source, size, image_format, threads)
        mark = " <- chosen" if image_format == chosen else ""
        exact = "exact" if image_format in EXACT else "not exact"
        lines.append(
            f"{image_format:<9} about {size_text(found.bytes)} in {duration(found.seconds)} with "
            f"{threads or core_count()} threads, {exact} ({found.images} images tried){mark}"
        )
    free, where = free_bytes(free_of)
    return [*lines, f"free      {size_text(free)} at {where}"]


def free_bytes(path: Path) -> tuple[int, Path]:
    """Bytes that may be written on the disk of a path, and the nearest folder that exists."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    status = os.statvfs(there)
    return status.f_bavail * status.f_frsize, there


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common()) or "none"


def _train_note(images: int, counts: np.ndarray) -> str:
    if images == TRAIN_IMAGES and (int(counts.min()), int(counts.max())) == TRAIN_CLASS_IMAGES:
        return ", as many images as the training set has"
    return (
        f"; the training set has {TRAIN_IMAGES:,} images, {TRAIN_CLASS_IMAGES[0]} to "
        f"{TRAIN_CLASS_IMAGES[1]} each"
    )


def _known(what: str, names: Sequence[str], source: Source) -> str:
    """Whether an oddity is one that ImageNet is known for, else where it is."""
    known = (
        KNOWN_CMYK if what == "CMYK" else KNOWN_PNG if what.startswith("PNG by") else frozenset()
    )
    others = [n for n in names if os.path.splitext(os.path.basename(n))[0] not in known]
    if source.scheme == "imagenet" and known and not others:
        return " (all known of ImageNet)"
    return f", such as {others[0]}" if others else ""
