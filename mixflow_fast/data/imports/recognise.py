"""Tells whose latents or images a path holds, and opens them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixflow_fast.data.foreign import describe_foreign
from mixflow_fast.data.imports.archive import INDEX, open_archive
from mixflow_fast.data.imports.arrays import ArrayLatents
from mixflow_fast.data.imports.dataset_json import DatasetJsonLatents, holds_latents
from mixflow_fast.data.imports.foreign_latents import (
    SD_VAE_SCALE,
    ForeignLatents,
    channel_means,
    like_edm2,
)
from mixflow_fast.data.imports.lightningdit import LightningDiTLatents, is_lightningdit

_ARRAYS = ("latents.npy", "x.npy", "moments.npy")
EDM2_RANGE, SIGNED_RANGE = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the files do not say.

    Attributes:
        input_range: of the pixels that the VAE saw; None if not given.
        moments: the channels of plain arrays are mean | std.
        scale: what the latents are to be multiplied by; None: 0.18215 for moments, 1 for plain
            arrays, and LightningDiT's own normalisation.
        multiplier: of LightningDiT's normalised latents.
        no_labels: take images without classes as one class.
    """

    input_range: tuple[float, float] | None = None
    moments: bool = False
    scale: float | None = None
    multiplier: float = 1.0
    no_labels: bool = False


def holds_images(path: Path) -> bool:
    """Whether a path is one that `images.py` reads: parquet, or a dataset.json of images."""
    if path.suffix == ".parquet":
        return True
    if path.is_dir() and any(path.glob("*.parquet")):
        return True
    return _has_index(path) and not holds_latents(open_archive(path))


def open_foreign_latents(path: Path, options: ImportOptions) -> ForeignLatents:
    """The latents at a path.

    Raises:
        ValueError: nothing that is known, options that are missing or have no meaning, and what
            the layouts refuse.
    """
    if is_lightningdit(path):
        if options.input_range is not None or options.moments:
            raise ValueError(
                "--vae-input-range and --moments have no meaning for LightningDiT's latents: "
                "leave them out"
            )
        return LightningDiTLatents(path, options.multiplier, options.scale)
    if options.multiplier != 1.0:
        raise ValueError("--multiplier is of LightningDiT's latents: leave it out")
    if _has_index(path):
        if options.input_range is None:
            raise ValueError(
                f"{path} may be REPA's latents, whose VAE saw images in [-1, 1], or EDM2's, in "
                "[0, 1], under the same names: give --vae-input-range=-1,1 or --vae-input-range=0,1"
            )
        return DatasetJsonLatents(open_archive(path), options.input_range, options.no_labels)
    if _is_arrays(path):
        scale = options.scale
        if scale is None:
            scale = SD_VAE_SCALE if options.moments else 1.0
        return ArrayLatents(path, options.moments, scale, options.input_range or SIGNED_RANGE)
    raise ValueError(nothing_to_import(path))


def is_foreign_latents(path: Path) -> bool:
    """Whether `open_foreign_latents` knows the layout of a path; its content is not looked at."""
    return is_lightningdit(path) or _has_index(path) or _is_arrays(path)


def nothing_to_import(path: Path) -> str:
    """What is said of a path that is of no layout that is imported."""
    foreign = describe_foreign(path, "latents")
    return (
        f"{path} holds nothing that is imported: REPA's or EDM2's dataset.json (folder or zip), "
        "LightningDiT's latents_rank*_shard*.safetensors, .npz, .npy, or .parquet of images"
        f"{f'; {foreign}' if foreign else ''}"
    )


def _is_arrays(path: Path) -> bool:
    return path.suffix in (".npz", ".npy") or any((path / name).is_file() for name in _ARRAYS)


def warnings_about(latents: ForeignLatents) -> list[str]:
    """Lines on what is probably a mistake."""
    means, info = channel_means(latents), latents.info
    listed = ", ".join(f"{mean:.2f}" for mean in means[:4])
    if info.input_range == EDM2_RANGE:
        return [
            "SiT and REPA were trained on latents of images in [-1, 1]; these are of images in "
            "[0, 1], and a checkpoint of theirs cannot be post-trained on them"
        ]
    if info.kind == "moments" and like_edm2(means):
        return [
            f"the channels' means are {listed}, as EDM2's are, whose VAE saw images in [0, 1]: if "
            "they are EDM2's, they are of no use for SiT and REPA; encode the images again"
        ]
    return []


def _has_index(path: Path) -> bool:
    if path.is_dir():
        return (path / INDEX).is_file()
    return path.suffix == ".zip" and path.is_file()
