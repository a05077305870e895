"""`mixflow-fast data prepare`: the training crops of a folder of images, made once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mixflow_fast.cli.data.resumable import resumable
from mixflow_fast.cli.data.scan import add_source, report
from mixflow_fast.files import check_folder_writable, user_path

if TYPE_CHECKING:
    from mixflow_fast.data.preparation.prepare import Prepared, Settings
    from mixflow_fast.data.preparation.source import Source

_SHARD_IMAGES, _MAX_BAD = 4096, 100


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "prepare",
        help="make the training crops of a folder of images",
        description="ADM's centre crop of every image, decoded and resized by Pillow, in shards "
        "that are read without a resize. Any number of processes share the work (torchrun, srun), "
        "and the same command goes on after a stop.",
        epilog="example: mixflow-fast data prepare imagenet/train --size 256 --out imagenet-256",
    )
    add_source(command)
    command.add_argument("--size", type=int, required=True, help="side of the crops in pixels")
    command.add_argument("--out", type=user_path, required=True, help="folder of the set")
    add_options(command)
    command.set_defaults(data_command=run)


def add_options(command: argparse._ActionsContainer) -> None:
    """The arguments that say how a set is made."""
    command.add_argument(
        "--format",
        choices=("webp", "raw", "jpeg"),
        help="webp (default): lossless; raw: bytes, the fastest to read and the largest; jpeg: "
        "quality 98, small, not exact",
    )
    command.add_argument(
        "--layout",
        choices=("shards", "repa"),
        default="shards",
        help="repa: the folders of PNG that REPA's code reads (default %(default)s)",
    )
    command.add_argument(
        "--on-bad",
        choices=("refuse", "skip"),
        default="refuse",
        help="images that cannot be used: list them all and write all other shards, or leave them "
        "out (default %(default)s)",
    )
    command.add_argument(
        "--max-bad",
        type=int,
        default=_MAX_BAD,
        metavar="N",
        help="leave out at most so many (default %(default)s)",
    )
    command.add_argument("--dry-run", action="store_true", help="scan, and make nothing")
    command.add_argument("--threads", type=int, default=0, help="default: the cores")
    command.add_argument(
        "--shard-images",
        type=int,
        default=_SHARD_IMAGES,
        metavar="N",
        help="images a shard (default %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    check_options(options)
    from mixflow_fast.data.preparation.source import list_source

    if options.out.resolve().is_relative_to(options.images.resolve()):
        raise ValueError(
            f"--out {options.out} is inside of {options.images}, where it would be a class folder: "
            "choose a folder beside it"
        )
    return make_set(options, list_source(options.images, options.classes))


def make_set(options: argparse.Namespace, source: Source) -> int:
    """Make a set of some images; returns the exit code.

    Args:
        options: as `add` makes them, `images` apart.
        source: the images.
    """
    from mixflow_fast.data.preparation.prepare import Settings
    from mixflow_fast.data.preparation.shard_work import ranks_of_environment

    rank, world = ranks_of_environment()
    image_format = options.format or ("png" if options.layout == "repa" else "webp")
    settings = Settings(options.size, image_format, options.layout, options.shard_images)
    if options.dry_run:
        if rank:
            return 0
        return report(source, options.size, options.threads, options.out, image_format)

    def work() -> int:
        return _prepare(options, source, settings, rank, world)

    return resumable(work, options.out, speaks=rank == 0)


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers out of range and an `out` that cannot be written, before files are listed."""
    for name, least in (("size", 1), ("threads", 0), ("max_bad", 0), ("shard_images", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    check_folder_writable(options.out, "--out")


def _prepare(
    options: argparse.Namespace, source: Source, settings: Settings, rank: int, world: int
) -> int:
    import sys

    from mixflow_fast.data.preparation.prepare import prepare

    if rank == 0:
        if warning := _too_large(options, source, settings):
            print(f"mixflow-fast: warning: {warning}", file=sys.stderr)
    done = prepare(
        source,
        options.out,
        settings,
        on_bad=options.on_bad,
        max_bad=options.max_bad,
        threads=options.threads,
        rank=rank,
        world=world,
    )
    if done.complete:
        if rank == 0 or done.made:
            _say_complete(options, done)
    else:
        print(
            f"{options.out}: process {rank} of {world} made {done.made} shards; {done.unfinished} "
            f"of {done.shards} are left to the others, and whoever makes the last one completes "
            "the set"
        )
    return 0


def _too_large(options: argparse.Namespace, source: Source, settings: Settings) -> str:
    """A warning where the disk has too little room for what is left to be made; else ""."""
    from mixflow_fast.data.preparation.scan import estimate, free_bytes
    from mixflow_fast.data.set_files import how_far
    from mixflow_fast.messages import size_text

    done, total = how_far(options.out) or (0, 1)
    if done >= total:
        return ""
    found = estimate(source, settings.size, settings.image_format, options.threads, most=32)
    needed = found.bytes * (total - done) / total
    free, where = free_bytes(options.out)
    if needed <= free:
        return ""
    return (
        f"about {size_text(needed)} are needed and {size_text(free)} are free at {where}: the work "
        "will stop with a full disk, and go on once there is room"
    )


def _say_complete(options: argparse.Namespace, done: Prepared) -> None:
    from mixflow_fast.data.set_files import read_manifest, set_format, total_bytes
    from mixflow_fast.messages import size_text

    manifest = read_manifest(options.out, set_format(options.out) or "")
    how = "complete" if done.made else "complete already"
    skipped = f", {done.skipped:,} left out (skipped.jsonl)" if done.skipped else ""
    if done.skipped and not done.made:
        skipped += "; once good files are in their place, make the set in another --out"
    print(
        f"{options.out}: {how}, {manifest['count']:,} images of {manifest['size']} px in "
        f"{done.shards:,} shards, {size_text(total_bytes(manifest))}{skipped}"
    )
    if manifest["layout"] == "shards":
        print(
            f"  make its latents with `mixflow-fast data encode {options.out} --vae FOLDER --out "
            f"LATENTS`, or train on it with data.kind=images data.path={options.out}"
        )
    else:
        print("  REPA's own code reads it; for mixflow-fast make one without --layout repa")
