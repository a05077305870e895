"""`mixflow-fast data import`: a set of ours of what other programs wrote."""

from __future__ import annotations

import argparse
import sys

from mixflow_fast.cli.data import prepare
from mixflow_fast.cli.data.resumable import resumable
from mixflow_fast.files import check_folder_writable, existing_path, user_path

_OF_LATENTS = ("in_place", "vae_input_range", "moments", "scale", "multiplier")
_OF_IMAGES = ("size", "format", "classes", "trust_labels", "on_bad", "max_bad", "layout")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "import",
        help="make a set of latents or images of other programs' files",
        description="Latents: REPA's and EDM2's (dataset.json beside .npy files, in a folder or a "
        "stored zip), LightningDiT's .safetensors, .npz and .npy. Images: .parquet of Hugging Face "
        "datasets, and the prepared folders and zips of REPA and EDM2. What is written is what "
        "`mixflow-fast data encode` and `prepare` write.",
        epilog="example: mixflow-fast data import repa/vae-sd --vae-input-range=-1,1 --out latents",
    )
    command.add_argument("path", type=user_path, help="file or folder")
    command.add_argument("--out", type=user_path, required=True, help="folder of the set")
    command.add_argument("--no-labels", action="store_true", help="dataset.json without classes")
    latents = command.add_argument_group("latents")
    latents.add_argument(
        "--in-place",
        action="store_true",
        help="write a manifest only, and map the files where they are (.npy, .safetensors, zip)",
    )
    latents.add_argument(
        "--vae-input-range",
        type=_range,
        metavar="LOW,HIGH",
        help="of the pixels that the VAE saw: =-1,1 (SiT, REPA) or =0,1 (EDM2)",
    )
    latents.add_argument(
        "--moments", action="store_true", help="the channels of .npz and .npy are mean | std"
    )
    latents.add_argument(
        "--scale", type=float, help="what training multiplies by (0.18215 for moments)"
    )
    latents.add_argument(
        "--multiplier",
        type=float,
        default=1.0,
        help="of LightningDiT's normalised latents (default %(default)s)",
    )
    images = command.add_argument_group("images")
    images.add_argument(
        "--size", type=int, help="side of the crops in pixels (images that are crops: their side)"
    )
    images.add_argument(
        "--classes",
        choices=("imagenet", "folder"),
        help="imagenet: refuse tables whose classes are not ImageNet's 1000 in their order",
    )
    images.add_argument(
        "--trust-labels",
        action="store_true",
        help="tables whose schema does not say what the labels mean",
    )
    prepare.add_options(images)
    usual = {name: command.get_default(name) for name in (*_OF_LATENTS, *_OF_IMAGES)}
    command.set_defaults(data_command=run, usual=usual)


def _range(text: str) -> tuple[float, float]:
    """-1,1 or 0,1."""
    ranges = {"-1,1": (-1.0, 1.0), "0,1": (0.0, 1.0)}
    found = ranges.get(text.strip("[]() ").replace(" ", ""))
    if found is None:
        raise argparse.ArgumentTypeError(f"must be -1,1 or 0,1, got {text!r}")
    return found


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.data.imports.images import is_packed
    from mixflow_fast.data.imports.recognise import (
        holds_images,
        is_foreign_latents,
        nothing_to_import,
    )

    path = existing_path(options.path)
    if is_packed(path) and holds_images(path):
        _refuse(options, _OF_LATENTS, "images")
        return _import_images(options)
    if not is_foreign_latents(path):
        raise ValueError(nothing_to_import(path))
    _refuse(options, _OF_IMAGES, "latents")
    return _import_latents(options)


def _refuse(options: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    """Refuse options that have no meaning for what the path holds."""
    for name in names:
        if getattr(options, name) != options.usual[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} has no meaning for {options.path}, which holds "
                f"{what}: leave it out"
            )


def _import_images(options: argparse.Namespace) -> int:
    prepare.check_options(options)
    from mixflow_fast.data.imports.images import list_packed
    from mixflow_fast.data.preparation.source import read_header

    source = list_packed(options.path, options.classes, options.trust_labels, options.no_labels)
    if options.size is None:
        first = read_header(source.look(0)[1])
        if first.width != first.height:
            raise ValueError(
                f"--size is needed: the images of {options.path} are no crops, the first has "
                f"{first.width} x {first.height} pixels"
            )
        options.size = first.width
    return prepare.make_set(options, source)


def _import_latents(options: argparse.Namespace) -> int:
    from mixflow_fast.data.imports.foreign_latents import copy_latents, map_latents
    from mixflow_fast.data.imports.recognise import (
        ImportOptions,
        open_foreign_latents,
        warnings_about,
    )
    from mixflow_fast.data.preparation.shard_work import ranks_of_environment
    from mixflow_fast.metrics.progress import Progress

    rank, world = ranks_of_environment()
    check_folder_writable(options.out, "--out")
    latents = open_foreign_latents(
        options.path,
        ImportOptions(
            input_range=options.vae_input_range,
            moments=options.moments,
            scale=options.scale,
            multiplier=options.multiplier,
            no_labels=options.no_labels,
        ),
    )
    if rank == 0:
        for line in latents.notes:
            print(f"note: {line}")
        for line in warnings_about(latents):
            print(f"mixflow-fast: warning: {line}", file=sys.stderr)
    if options.in_place and rank:
        return 0

    def work() -> int:
        quiet = rank != 0
        if options.in_place:
            places = latents.places()
            size = sum(place.path.stat().st_size for place in places)
            with Progress(size, "hash", "bytes", quiet=quiet) as progress:
                map_latents(latents, places, options.out, progress.advance)
            complete = True
        else:
            count = latents.info.count // world
            with Progress(count, "import", "samples", quiet=quiet) as progress:
                complete = copy_latents(latents, options.out, progress.advance, rank, world)
        if complete and rank == 0:
            how = "mapped where they are" if options.in_place else "complete"
            print(
                f"{options.out}: {how}, {latents.info.count:,} latents of {latents.info.shape}\n"
                f"  train on it with data.kind=latents data.path={options.out}"
            )
        elif not complete:
            print(f"{options.out}: the part of process {rank} of {world} is done")
        return 0

    return resumable(work, options.out, speaks=rank == 0)
