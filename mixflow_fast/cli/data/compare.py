"""`mixflow-fast data compare`: DALI's pixels against Pillow's, on this machine."""

from __future__ import annotations

import argparse
from statistics import median
from typing import TYPE_CHECKING

from mixflow_fast.cli.data.images import add_images, open_data, open_device
from mixflow_fast.files import user_path

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from mixflow_fast.data.compare import Difference, Kind

_COLUMNS = ("file", "halvings", "images", "identical", "mean", "max", "> 1", "> 4", "PSNR worst",
            "median")  # fmt: skip


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="compare the pixels of DALI and of Pillow on this machine",
        description="Reads the same images through Pillow and through DALI, as a run with "
        "data.loader=dali does, and says how far apart they are (bytes 0 to 255), by kind of file "
        "and halvings of the crop. Exit code: 1 if the images of a lossless prepared set are not "
        "identical, else 0.",
        epilog="example: mixflow-fast data compare imagenet/train --size 256",
    )
    add_images(command)
    command.add_argument("--count", type=int, default=512, help="images (default %(default)s)")
    command.add_argument(
        "--vae",
        type=user_path,
        metavar="FOLDER",
        help="an AutoencoderKL of diffusers: how far apart the latents are, too",
    )
    command.set_defaults(data_command=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.data.compare import compare
    from mixflow_fast.data.dali import dali_problem, preprocessing_version
    from mixflow_fast.metrics.progress import Progress

    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    dataset, device = open_data(options.path, options.size), open_device(options.device)
    if problem := dali_problem(dataset):
        raise ValueError(f"there is nothing to compare: {problem}")
    encode = None if options.vae is None else _encoder(options, dataset.size, device)
    count = min(options.count, len(dataset))
    with Progress(count, "comparing", "images") as progress:
        found = compare(dataset, count, device, encode, progress.advance)
    print(f"{count:,} images of {options.path}, Pillow against {preprocessing_version(device)}")
    print("\n".join(_table(found)))
    differing = sum(d.images - d.identical for d in found.values())
    if not dataset.crops and getattr(dataset, "exact", False) and differing:
        print(
            f"{differing} images of a lossless set are not what Pillow reads: use "
            "data.loader=threads on this machine"
        )
        return 1
    return 0


def _encoder(
    options: argparse.Namespace, size: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    from mixflow_fast.models.autoencoders.sdvae import SDVAE

    encoder = SDVAE(options.vae, size, name="--vae").to(device)
    return lambda images: encoder(images).mean


def _table(found: dict[Kind, Difference]) -> list[str]:
    encoded = any(difference.latents for difference in found.values())
    rows = [[*_COLUMNS, *(["latents"] if encoded else [])]]
    for kind, d in found.items():
        halvings = "-" if kind.halvings is None else str(kind.halvings)
        row = [kind.file, halvings, f"{d.images:,}", f"{d.identical:,}", f"{d.mean:.4f}"]
        row += [str(d.largest), f"{d.share_over(1):.2%}", f"{d.share_over(4):.2%}"]
        row += [f"{f(d.psnr):.1f} dB" if d.psnr else "-" for f in (min, median)]
        rows.append([*row, *([f"{median(d.latents):.1e}"] if encoded else [])])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
