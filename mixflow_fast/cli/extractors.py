"""Options of `evaluate` and `reference` that choose feature networks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mixflow_fast.files import user_path

if TYPE_CHECKING:
    from mixflow_fast.evaluation.features.extractor import Extractor


def add_options(
    command: argparse.ArgumentParser, title: str = "features, at least one of", device: bool = True
) -> None:
    """The options, which `chosen` reads.

    Args:
        command: gets them.
        title: of their group.
        device: whether --device is among them.
    """
    group = command.add_argument_group(title)
    group.add_argument(
        "--inception",
        type=user_path,
        metavar="W.pth",
        help="FID's Inception-v3 from weights-inception-2015-12-05-6726825d.pth: fid, sfid, is, "
        "precision, recall, kid",
    )
    group.add_argument(
        "--dinov2",
        type=user_path,
        metavar="DIR",
        help="DINOv2 ViT-L/14 from a folder of transformers: fd_dinov2",
    )
    group.add_argument(
        "--effnet",
        action="store_true",
        help="EfficientNet-Lite0 of the extra `features`: fd_effnet_lite0",
    )
    group.add_argument(
        "--effnet-p128",
        action="store_true",
        help="the same projected to 128 dimensions, for about 1,000 images: fd_effnet_lite0_p128",
    )
    group.add_argument(
        "--effnet-side",
        type=int,
        metavar="N",
        help="resize images to N x N for it; default: as they are, at least 32",
    )
    group.add_argument(
        "--pixels",
        action="store_true",
        help="averaged pixels and a random network, without weights: fd_pooled_pixels, "
        "fd_random_conv",
    )
    group.add_argument(
        "--allow-unknown-weights",
        action="store_true",
        help="take weights of another hash or another DINOv2; their numbers are others",
    )
    if device:
        command.add_argument("--device", help="default: cuda if there is one, else cpu")


def given(options: argparse.Namespace) -> list[str]:
    """Which of the options are on the command line."""
    names = (
        "inception",
        "dinov2",
        "effnet",
        "effnet_p128",
        "effnet_side",
        "pixels",
        "allow_unknown_weights",
    )
    return [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) not in (None, False)]


def device_of(options: argparse.Namespace) -> str:
    """The device by name.

    Raises:
        ValueError: PyTorch knows no such device.
    """
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be such as cpu, cuda or cuda:1, got {name!r}") from error
    return name


def chosen(options: argparse.Namespace, device: str | None = None) -> list[Extractor]:
    """The networks that were asked for, on a device; None: that of `device_of`.

    Raises:
        ValueError: none were, or one cannot be loaded.
    """
    from mixflow_fast.evaluation.features.dinov2 import DinoV2Features
    from mixflow_fast.evaluation.features.effnet_lite import EffNetLite0
    from mixflow_fast.evaluation.features.extractor import PixelFeatures
    from mixflow_fast.evaluation.features.inception import Inception
    from mixflow_fast.evaluation.frechet import FEATURES

    device, unknown = device or device_of(options), options.allow_unknown_weights
    found: list[Extractor] = []
    if options.inception is not None:
        found.append(Inception(options.inception, device, allow_unknown=unknown))
    if options.dinov2 is not None:
        found.append(DinoV2Features(options.dinov2, device, allow_unknown=unknown))
    if options.effnet:
        found.append(EffNetLite0(side=options.effnet_side, device=device))
    if options.effnet_p128:
        found.append(EffNetLite0(True, options.effnet_side, device=device))
    if options.pixels:
        found += [PixelFeatures(name) for name in FEATURES]
    if not found:
        raise ValueError(
            "no features were chosen: give --inception W.pth, --dinov2 DIR, --effnet, "
            "--effnet-p128 or --pixels"
        )
    return found
