"""A folder that a user named, as a dataset: what `compare` and `bench` read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mixflow_fast.files import existing_path, user_path

if TYPE_CHECKING:
    import torch

    from mixflow_fast.data import Dataset


def add_images(command: argparse.ArgumentParser) -> None:
    """The arguments `path`, `--size` and `--device`."""
    command.add_argument(
        "path",
        type=user_path,
        help="a set that prepare or encode has made, a cache of captioned images, class folders of "
        "images, or a folder of webdataset's .tar shards",
    )
    command.add_argument("--size", type=int, help="side of the crops; needed unless it is a set")
    command.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="where the images are wanted (default: a GPU where there is one)",
    )


def open_data(path: Path, size: int | None) -> Dataset:
    """The dataset of a folder.

    Raises:
        ValueError: nothing that can be read, a size that is missing or another than the set's.
    """
    from mixflow_fast.data import build_dataset
    from mixflow_fast.data.set_files import set_format

    root = existing_path(path)
    found = set_format(root) if root.is_dir() else None
    if found is not None and found.startswith("mixflow-latents/"):
        return build_dataset("latents", path=root)
    if found is not None and found.startswith("mixflow-captioned/"):
        return build_dataset("captioned", path=root)
    if found is not None:
        return build_dataset("images", path=root, size=size)
    if size is None:
        raise ValueError(f"--size is needed: {root} is no prepared set, so its images are cropped")
    tars = root.suffix == ".tar" or (root.is_dir() and any(root.glob("*.tar")))
    return build_dataset("webdataset" if tars else "folder", path=root, size=size)


def open_device(name: str) -> torch.device:
    """The device that `--device` means; ValueError where it is not there."""
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    return torch.device("cuda", 0) if there and name != "cpu" else torch.device("cpu")
