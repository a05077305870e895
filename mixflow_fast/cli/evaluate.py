"""`mixflow-fast evaluate`: numbers of a sample set against a reference, with their errors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli import extractors
from mixflow_fast.files import user_path

if TYPE_CHECKING:
    from mixflow_fast.evaluation.evaluate import Evaluation
    from mixflow_fast.evaluation.features.extractor import Extractor
    from mixflow_fast.evaluation.pictures import Pictures
    from mixflow_fast.evaluation.protocol import Protocol
    from mixflow_fast.evaluation.reference import Reference


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "evaluate",
        help="FID and other numbers of a sample set, with standard errors",
        description="Computes features of the samples once, keeps them in a folder, and makes the "
        "numbers of them: value, bias of a set of this size, standard error, 95% interval.",
        epilog="example: mixflow-fast evaluate samples.npz --reference "
        "VIRTUAL_imagenet256_labeled.npz --inception weights-inception-2015-12-05-6726825d.pth",
    )
    command.add_argument(
        "samples",
        type=user_path,
        metavar="SET",
        help="a set's folder or .npz, any .npz (arr_0 as ADM writes it, or x as `sample` does), or "
        "a folder of images",
    )
    command.add_argument(
        "--reference",
        type=user_path,
        required=True,
        help="ADM's .npz, EDM2's .pkl, or what `mixflow-fast reference` made",
    )
    extractors.add_options(command)
    command.add_argument(
        "--metrics",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,...",
        help="fid, sfid, is, precision, recall, kid, fd_...; default: all that can be computed",
    )
    command.add_argument(
        "--reconstructions",
        action="store_true",
        help="SET holds an autoencoder's reconstructions of the validation images and not "
        "generated samples: its fid is rFID, and the reference must be of --split val",
    )
    command.add_argument(
        "--fid-inf",
        action="store_true",
        help="extrapolate Frechet distances to infinitely many samples (minutes)",
    )
    command.add_argument(
        "--features",
        type=user_path,
        metavar="DIR",
        help="where features are kept, and taken from again; default: beside the set",
    )
    command.add_argument(
        "--out", type=user_path, metavar="FILE", help="append the numbers to a .jsonl as one row"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from mixflow_fast.evaluation.evaluate import check_measurable, evaluate
    from mixflow_fast.evaluation.features.extractor import kept_or_extracted
    from mixflow_fast.evaluation.pictures import open_pictures
    from mixflow_fast.evaluation.reference import read_reference

    if options.out is not None:
        # Before the work, so that a wrong place costs nothing.
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.is_dir():
            raise ValueError(f"--out must be a file, and {options.out} is a folder")
    pictures = open_pictures(options.samples)
    reference = read_reference(options.reference)
    device = extractors.device_of(options)
    networks = extractors.chosen(options, device)
    wanted = options.metrics
    check_measurable(networks, reference, wanted, options.reconstructions)
    place = place_of_features(options.samples, options.features)
    features = [
        kept_or_extracted(
            place.folder, network, pictures.batches, pictures.source, save=place.writable
        )
        for network in networks
    ]
    if wanted is None or {"precision", "recall", "kid"} & set(wanted):
        reference = with_image_features(reference, networks, options.features)
    found = evaluate(
        features,
        reference,
        wanted,
        fid_inf=options.fid_inf,
        device=device,
        reconstructions=options.reconstructions,
    )
    say(found, pictures, str(options.samples), place, options.out)
    return 0


@dataclass(frozen=True)
class Place:
    """Where features are looked for, and whether new ones can be kept there."""

    folder: Path
    writable: bool

    @property
    def kept(self) -> Path | None:
        """The folder, if features are kept in it."""
        return self.folder if self.writable else None


def place_of_features(path: Path, chosen: Path | None) -> Place:
    """Of pictures: what --features says, else beside them, as sets/a.features for sets/a.npz."""
    if chosen is not None:
        return Place(chosen, True)
    path = path.absolute()
    name = path.name if path.is_dir() else path.stem
    folder = path.with_name(f"{name}.features")
    place = folder if folder.exists() else folder.parent
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Place(folder, True)
    print(
        f"{place} cannot be written to: features of {path.name} are not kept (--features DIR "
        "keeps them)",
        file=sys.stderr,
    )
    return Place(folder, False)


def with_image_features(
    reference: Reference, networks: Sequence[Extractor], chosen: Path | None
) -> Reference:
    """An ADM file with the features of its images, if the network for them is there.

    Args:
        reference: any.
        networks: that were chosen.
        chosen: what --features says.
    """
    from mixflow_fast.evaluation.features.extractor import kept_or_extracted
    from mixflow_fast.evaluation.pictures import open_pictures
    from mixflow_fast.evaluation.reference import POOL

    network = next((each for each in networks if each.id.name == POOL.partition(".")[0]), None)
    if network is None or not reference.has_images:
        return reference
    images = open_pictures(reference.path)
    # A folder of its own: features of the set have the same names.
    own = None if chosen is None else chosen / f"reference-{reference.sha256[:12]}"
    place = place_of_features(reference.path, own)
    found = kept_or_extracted(
        place.folder, network, images.batches, images.source, save=place.writable
    )
    return replace(reference, features={POOL: found.arrays["pool"]})


def say(found: Evaluation, pictures: Pictures, name: str, place: Place, out: Path | None) -> None:
    """Print the numbers, and append them to a file as one row.

    Args:
        found: the numbers.
        pictures: what they are of.
        name: of the set, as the user gave it.
        place: of its features.
        out: the .jsonl; None: none.
    """
    from mixflow_fast.evaluation.pictures import protocol_of

    protocol = protocol_of(pictures, place.kept)
    if out is not None:
        kept = None if place.kept is None else str(place.kept)
        row = found.to_row(name, protocol, weights=pictures.origin or None, features=kept)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    _print(found, protocol, pictures.protocol is not None)


def _print(found: Evaluation, of_set: Protocol, recorded: bool) -> None:
    what = "reconstructions" if found.reconstructions else "samples"
    print(f"{found.n:,} {what} of protocol {of_set.short} against {found.reference.path.name}")
    if not recorded:
        print("  how they were made is not known: their content stands in their protocol")
    for name, each in found.estimates.items():
        low, high = each.interval()
        bias = f", without its bias {each.corrected:.5g}" if each.bias else ""
        own = found.protocol(of_set, name).short
        print(
            f"  {name:21s}{each.value:.5g} (se {each.se:.2g}{bias}, 95% {low:.5g} .. {high:.5g}), "
            f"protocol {own}"
        )
        infinity = each.to_record().get("inf")
        if infinity is not None:
            print(f"  {'':21s}{infinity:.5g} at infinitely many samples, by extrapolation")
    for line in found.warnings:
        print(f"  warning: {line}")
