"""Latents in plain arrays: a .npz, or a .npy with its labels beside it (`data/latent_files.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.imports.foreign_latents import Place
from mixflow_fast.data.latent_files import open_latents
from mixflow_fast.data.latents_store import LatentsInfo


class ArrayLatents:
    """As `ForeignLatents`.

    Args:
        root: the file, or the folder of the files.
        moments: the channels are mean | std.
        scale: what the latents are to be multiplied by.
        input_range: of the pixels that the encoder saw.

    Raises:
        ValueError: arrays that are missing, or of another shape or dtype.
    """

    def __init__(
        self, root: Path, moments: bool, scale: float, input_range: tuple[float, float]
    ) -> None:
        found = open_latents(root, moments, with_features=False)
        if not isinstance(found.x, np.ndarray) or found.x.ndim != 4 or not len(found.x):
            raise ValueError(f"latents of {str(root)!r} must be (N, C, h, w), got {found.x.shape}")
        if found.x.dtype.name not in ("float16", "float32"):
            raise ValueError(
                f"latents of {str(root)!r} must be float16 or float32, got {found.x.dtype}"
            )
        labels = found.labels
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(found.x):
            raise ValueError(
                f"labels of {str(root)!r} must be ({len(found.x)},) integers, got {labels.shape} "
                f"{labels.dtype}"
            )
        if labels.min() < 0:
            raise ValueError(f"labels of {str(root)!r} must be >= 0, got {labels.min()}")
        self._root, self._x = root, found.x
        self.labels = labels.astype(np.int64)
        self.source = np.arange(len(labels))
        self.info = LatentsInfo(
            kind="moments" if moments else "sample",
            shape=found.x.shape[1:],
            dtype=found.x.dtype.name,
            mirrors=1,
            count=len(labels),
            num_classes=int(labels.max()) + 1,
            scale=scale,
            input_range=input_range,
            source={"imported": "arrays"},
        )
        self.notes: tuple[str, ...] = ()

    def read(self, samples: range) -> Tensor:
        """As `ForeignLatents.read`."""
        return torch.from_numpy(np.array(self._x[samples.start : samples.stop]))

    def name_of(self, sample: int) -> str:
        """As `ForeignLatents.name_of`."""
        return f"row {sample} of {str(self._root)!r}"

    def places(self) -> list[Place]:
        """As `ForeignLatents.places`."""
        file = getattr(self._x, "filename", None)
        if file is None or not self._x.flags.c_contiguous:
            raise ValueError(
                f"--in-place needs a .npy in C order, got {str(self._root)!r}: leave it out"
            )
        return [Place(Path(file), len(self._x), (self._x.offset,))]
