"""Small data in every format that the datasets read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data import Latents
from mixflow_fast.kernels.interpolate import Moments

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def every(dataset):
    return torch.arange(len(dataset))


def get(dataset, *indices, seed=0, first=0):
    indices = torch.tensor(indices, dtype=torch.int64)
    return dataset.get(indices, torch.arange(first, first + len(indices)), seed)


def halved_photos():
    """float64 box averages of the photographs, (photo, row, column, channel)."""
    images = [sklearn_datasets.load_sample_image(n) for n in ("china.jpg", "flower.jpg")]
    pixels = np.stack(images).astype(np.float64)[:, :426]
    return pixels.reshape(2, 213, 2, 320, 2, 3).mean(axis=(2, 4)) / 127.5 - 1


LATENTS = np.random.RandomState(3).standard_normal((6, 4, 2, 3)).astype(np.float32)
MOMENTS = np.abs(LATENTS) + np.float32(0.1)
LABELS = np.array([0, 2, 1, 2, 0, 4])
FEATURES = np.random.RandomState(4).standard_normal((6, 5, 7)).astype(np.float16)


def write_classes(folder, size=8, **images):
    """Class folders with so many images each: write_classes(folder, cat=6, dog=2)."""
    for name, count in images.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (size, size), (20 * number, 0, 0)).save(
                folder / name / f"{number}.png"
            )
    return folder


def write_npz(folder, x, labels=LABELS, **more):
    np.savez(folder / "set.npz", latents=x, labels=labels, **more)
    return folder / "set.npz"


def write_npy(folder, x, labels=LABELS):
    np.save(folder / "set.npy", x)
    np.save(folder / "set_labels.npy", labels)
    return folder / "set.npy"


def write_folder(folder, x, labels=LABELS):
    np.save(folder / "x.npy", x)
    np.save(folder / "labels.npy", labels)
    return folder


def write_repa(folder, x, labels=LABELS):
    names = [f"{i // 3:05d}/img-{i:08d}.npy" for i in range(len(x))]
    for name, sample in zip(names, x, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / name, sample)
    pairs = list(zip(names, np.asarray(labels).tolist(), strict=True))
    pairs.reverse()  # the order must not matter
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


WRITERS = [write_npz, write_npy, write_folder, write_repa]


def content(batch):
    """(B, ...) what a batch holds of each example: x, the images that it is made of, or moments."""
    if batch.x is None:
        return batch.images
    return torch.cat(batch.x[:2], 1) if isinstance(batch.x, Moments) else batch.x


def collect(loader, steps):
    """{position: (y, bytes of x)} of the next optimizer steps, and the order of positions."""
    samples, order = {}, []
    for _ in range(steps * loader.microsteps):
        batch = next(loader)
        for position, x, y in zip(batch.positions.tolist(), content(batch), batch.y, strict=True):
            assert position not in samples
            samples[position] = (int(y), x.numpy().tobytes())
            order.append(position)
    loader.close()
    return samples, order


def moments_dataset(folder):
    return Latents(write_npz(folder, MOMENTS), moments=True)
