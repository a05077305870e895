"""`mixflow-fast data scan`: what a folder of images holds, before anything is made of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.files import user_path

if TYPE_CHECKING:
    from mixflow_fast.data.preparation.formats import Format
    from mixflow_fast.data.preparation.source import Source


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "scan",
        help="count and check a folder of images",
        description="Reads the header of every image in class folders, and prints counts, classes, "
        "what is odd, what cannot be used, and with --size what a set would take. The exit code is "
        "1 where an image cannot be used. Files that are cut off show while a set is made.",
        epilog="example: mixflow-fast data scan imagenet/train --size 256",
    )
    add_source(command)
    command.add_argument("--size", type=int, help="side of the crops in pixels")
    command.add_argument("--threads", type=int, default=0, help="default: by the cores")
    command.set_defaults(data_command=run)


def add_source(command: argparse.ArgumentParser) -> None:
    """The arguments that say which images are meant."""
    command.add_argument("images", type=user_path, help="folder of class folders")
    command.add_argument(
        "--classes",
        choices=("imagenet", "folder"),
        help="imagenet: exactly the 1000 synsets; folder: any, in alphabetical order; default: "
        "imagenet where most folders are named as synsets, else folder",
    )


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.data.preparation.source import list_source

    source = list_source(options.images, options.classes)
    return report(source, options.size, options.threads, Path())


def report(
    source: Source, size: int | None, threads: int, free_of: Path, chosen: Format | None = None
) -> int:
    """Scan and print; returns the exit code.

    Args:
        source: the images.
        size: side of the crops in pixels; None: nothing is said about a set.
        threads: 0: by the cores.
        free_of: a path on the disk that a set is meant for.
        chosen: the format that is meant.
    """
    from mixflow_fast.data.preparation.scan import (
        describe_estimates,
        describe_scan,
        scan_source,
    )
    from mixflow_fast.metrics.progress import Progress

    if size is not None and size < 1:
        raise ValueError(f"--size must be >= 1 (pixels), got {size}")
    with Progress(len(source), "scan", "images") as progress:
        found = scan_source(source, size, threads, progress.advance)
    print("\n".join(describe_scan(source, found, size)), flush=True)
    if size is not None:
        print("\n".join(describe_estimates(source, size, threads, free_of, chosen)))
    return 1 if found.bad else 0
