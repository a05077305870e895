"""Files that `benchmarks/data.py` reads: windows of photographs, latents in three layouts."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mixflow_fast.cli import main
from mixflow_fast.data.latents_store import LatentsInfo
from mixflow_fast.data.latents_writer import ShardWriter, finish_store
from mixflow_fast.data.preparation.shard_work import ShardWork

WINDOW = (500, 375)  # the usual size of ImageNet's images
LATENT = (8, 32, 32)  # mean | std of Stable Diffusion's autoencoder at 256 pixels


def write_jpegs(folder: Path, count: int) -> None:
    """Class folders of JPEG files, quality 94 without chroma subsampling, about 95 KB each."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.RandomState(0)
    for number in range(count):
        photo = photos[number % 2]
        left, top = (
            int(rng.randint(0, a - b + 1)) for a, b in zip(photo.size, WINDOW, strict=True)
        )
        window = photo.crop((left, top, left + WINDOW[0], top + WINDOW[1]))
        out = folder / f"class{number % 2}"
        out.mkdir(parents=True, exist_ok=True)
        window.save(out / f"{number:06d}.jpg", quality=94, subsampling=0)


def write_prepared(images: Path, out: Path, size: int, image_format: str) -> Path:
    """A set as `mixflow-fast data prepare` makes it."""
    arguments = ["data", "prepare", str(images), "--size", str(size), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = main([*arguments, "--format", image_format, "--classes", "folder"])
    if status:
        raise RuntimeError(f"prepare ended with {status}")
    return out


@dataclass(frozen=True)
class LatentFiles:
    """The same latents in three layouts.

    Attributes:
        ours: folder of a set, float16, one mirror.
        repa_png, repa_npy: a PNG of 256 pixels and a float32 .npy an image, a thousand a folder.
        lightningdit: a safetensors file of float32, two mirrors and labels.
    """

    ours: Path
    repa_png: list[Path]
    repa_npy: list[Path]
    lightningdit: Path


def write_latents(folder: Path, count: int) -> LatentFiles:
    """Random moments and photographs of `count` images."""
    from sklearn.datasets import load_sample_image

    rows = torch.rand(count, *LATENT, generator=torch.Generator().manual_seed(0))
    labels = np.arange(count) % 1000
    photo = Image.fromarray(load_sample_image("china.jpg")).crop((100, 100, 356, 356))
    png = io.BytesIO()
    photo.save(png, "PNG", compress_level=0)  # as REPA's preprocessing
    names = [f"{number // 1000:05d}/img{number:08d}" for number in range(count)]
    repa_png = [folder / "images" / f"{name}.png" for name in names]
    repa_npy = [folder / "vae-sd" / f"{name}.npy" for name in names]
    for number in range(count):
        for path in (repa_png[number], repa_npy[number]):
            path.parent.mkdir(parents=True, exist_ok=True)
        repa_png[number].write_bytes(png.getvalue())
        np.save(repa_npy[number], rows[number].numpy())
    shard = folder / "latents_rank00_shard000.safetensors"
    theirs = rows.reshape(count, 32, 16, 16)
    tensors = {"latents": theirs, "latents_flip": theirs.flip(-1).contiguous()}
    save_file(tensors | {"labels": torch.from_numpy(labels)}, shard)
    ours = _write_set(folder / "set", rows.half(), labels)
    return LatentFiles(ours, repa_png, repa_npy, shard)


def _write_set(root: Path, rows: torch.Tensor, labels: np.ndarray) -> Path:
    info = LatentsInfo(
        kind="moments",
        shape=LATENT,
        dtype="float16",
        mirrors=1,
        count=len(rows),
        num_classes=1000,
        scale=0.18215,
        size=256,
        encoder={"class": "none: random numbers"},
        precision={"dtype": "fp32"},
    )
    with ShardWork(root, {}, 1, ".npy", folder="moments") as work:
        with ShardWriter(work.temporary(0), len(rows), LATENT) as shard:
            shard.write(rows)
        work.finish(0, len(rows), {"statistics": shard.statistics()})
        source = np.arange(len(rows))
        work.complete_with(lambda records: finish_store(root, info, records, labels, source))
    return root


def write_vae(folder: Path) -> Path:
    """Random weights of the size of Stable Diffusion's autoencoder, as diffusers saves them."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=256,
    )
    vae.save_pretrained(folder)
    return folder
