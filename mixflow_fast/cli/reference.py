"""`mixflow-fast reference`: moments and features of real images, to measure sample sets against."""

from __future__ import annotations

import argparse

from mixflow_fast.cli import extractors
from mixflow_fast.files import check_writable, user_path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "reference",
        help="make a reference of real images for `evaluate`",
        description="Computes features of images and writes their mean and covariance, and the "
        "features of some of them for kid, precision and recall.",
        epilog="example: mixflow-fast reference imagenet/val --size 256 --inception "
        "weights-inception-2015-12-05-6726825d.pth --out val256.npz",
    )
    command.add_argument(
        "data", type=user_path, metavar="DATA", help="folder of images at any depth, or a .npz"
    )
    command.add_argument(
        "--size", type=int, help="side of ADM's centre crop; default: images as they are"
    )
    command.add_argument(
        "--split",
        choices=("train", "val"),
        help="which images of the data set these are: val is for reconstructions (rFID) and is "
        "refused for generated samples (gFID); default: not said",
    )
    extractors.add_options(command)
    command.add_argument(
        "--keep",
        type=int,
        default=10_000,
        help="images whose features are kept (default %(default)s; KID uses all that are there)",
    )
    command.add_argument("--out", type=user_path, required=True, help="the .npz to write")
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, got {options.out}")
    if options.size is not None and options.size < 1:
        raise ValueError(f"--size must be >= 1, got {options.size}")
    if options.keep < 0:
        raise ValueError(f"--keep must be >= 0, got {options.keep}")
    check_writable(options.out, options.force)
    from mixflow_fast.evaluation.features.extractor import extract
    from mixflow_fast.evaluation.pictures import open_pictures
    from mixflow_fast.evaluation.reference import read_reference, write_reference

    pictures = open_pictures(options.data, options.size)
    networks = extractors.chosen(options)
    features = [extract(pictures.batches(), each, source=pictures.source) for each in networks]
    crop = "" if options.size is None else f", ADM's centre crop of {options.size} pixels"
    # Its name alone: the same images elsewhere make the same file, which is known by its hash.
    description = f"{options.data.resolve().name}{crop}"
    write_reference(options.out, features, description, options.keep, options.split)
    made = read_reference(options.out)
    print(f"{options.out}: {pictures.count:,} images, {', '.join(made.gaussians)}")
    print(f"  sha256 {made.sha256}")
    return 0
