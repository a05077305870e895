"""Images in class folders, with the centre crop of ADM (openai/guided-diffusion; SiT and RAE)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, check_indices, random_flip

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to (size, size).

    While the short side is at least 2 * size both sides are halved (integer division) with a box
    filter; then bicubic to a short side of `size` (long side rounded), then the centre is cut out
    at offsets floor((side - size) / 2).
    """
    from PIL import Image as pil

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), pil.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, pil.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageFolder:
    """Images in class folders, `path/<class>/**/<image>`, classes in alphabetical order.

    Each image becomes RGB, ADM's centre crop of side `size`, x / 127.5 - 1. Files are listed once,
    sorted; hidden files and folders are skipped.

    Args:
        path: folder of class folders.
        size: side in pixels.
        flip: mirrors left-right with probability 1/2, a function of (seed, position).

    Raises:
        ValueError: missing path, no class, a class without images, a bad size; in `get`, an image
            that cannot be read (with its name).
    """

    def __init__(self, path: str | os.PathLike[str], size: int, flip: bool = True) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size must be an integer >= 1 (pixels), got {size!r}")
        root = Path(path)
        if not root.is_dir():
            raise ValueError(f"path must be a folder of class folders, got {str(path)!r}")
        self.classes = sorted(
            entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
        )
        if not self.classes:
            raise ValueError(f"no class folder in {str(path)!r}: expected path/<class>/<image>")
        self.files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            # An empty folder would shift no label, but a class that is never seen is a mistake.
            found = _list_images(root / name)
            if not found:
                raise ValueError(
                    f"class folder {name!r} in {str(path)!r} holds no image "
                    f"({', '.join(IMAGE_SUFFIXES)}): remove it or fill it"
                )
            self.files += found
            labels += [label] * len(found)
        self._y = torch.tensor(labels, dtype=torch.int64)
        self._size, self.flip = size, flip
        self.num_classes = len(self.classes)
        self.shape = (3, size, size)
        self.name = f"folder-{root.resolve().name}-{size}"

    def __len__(self) -> int:
        return len(self.files)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: x (B, 3, size, size)."""
        check_indices(indices, positions, len(self))
        pixels = torch.empty(len(indices), self._size, self._size, 3, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            pixels[row] = _decode(self.files[index], self._size)
        x = (pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0).contiguous()
        if self.flip:
            x = random_flip(x, positions, seed)
        return Batch(x, self._y[indices], positions)


def _list_images(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        # In place, because `walk` goes on with this list.
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES):
                found.append(os.path.join(parent, name))
    return sorted(found)


def _decode(file: str, size: int) -> Tensor:
    """(size, size, 3) uint8."""
    import numpy as np
    from PIL import Image as pil

    try:
        with pil.open(file) as image:
            return torch.from_numpy(np.array(adm_center_crop(image.convert("RGB"), size)))
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {file!r}: {error}") from error
