"""Two sets of real images that scikit-learn ships: photographs and digits.

They download nothing; the demo and the tests run on them.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, check_indices, random_flip
from mixflow_fast.data.summary import DataSummary, digest_of

SPLITS = ("train", "heldout", "all")


def _sklearn_datasets() -> ModuleType:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "the embedded image sets need scikit-learn: pip install 'mixflow_fast[data]'"
        ) from error
    return datasets


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


class Photos:
    """Every window of the two photographs that scikit-learn ships, each halved by 2x2 box average.

    Class 0 is `china.jpg`, class 1 `flower.jpg`, each 213 x 320 after halving (the last odd row is
    dropped). Of every 53 columns the first 33 are for training and the last 20 are held out; a
    window never leaves its band, so the two splits share no pixel. The bands are narrow because
    the photographs are uneven: with 80 columns the Frechet distance between the splits is 5, here
    0.6 (pixels pooled to 8x8). `split="all"` is every window of the whole photograph, bands
    ignored. Windows are cut on demand, none is stored.

    Args:
        split: "train", "heldout" or "all".
        size: window side in pixels, at most 20 for "heldout", 33 for "train".
        flip: mirrors left-right with probability 1/2, a function of (seed, position).

    Raises:
        ValueError: unknown split, size that fits no band, scikit-learn is missing.
    """

    period = 53
    bands = {"train": (0, 33), "heldout": (33, 53)}
    files = ("china.jpg", "flower.jpg")
    num_classes = 2

    def __init__(self, split: str = "train", size: int = 16, flip: bool = False) -> None:
        _check_split(split)
        datasets = _sklearn_datasets()
        photos = [torch.tensor(datasets.load_sample_image(file)) for file in self.files]
        pixels = torch.stack(photos).permute(0, 3, 1, 2).to(torch.float32)
        halved = torch.nn.functional.avg_pool2d(pixels, 2)  # sums of four bytes: exact in float32
        height, width = halved.shape[2:]
        self._first, band_end = self.bands.get(split, (0, width))
        period = self.period if split in self.bands else width
        if not isinstance(size, int) or not 1 <= size <= min(band_end - self._first, height):
            raise ValueError(
                f"size must be in [1, {min(band_end - self._first, height)}] for the {split!r} "
                f"photo windows, got {size!r}"
            )
        # A view, which costs no memory: (photo, channel, top row, left column, row, column).
        self._windows = (halved / 127.5 - 1.0).unfold(2, size, 1).unfold(3, size, 1)
        self._period = period
        self._starts = band_end - self._first - size + 1
        self._rows = height - size + 1
        self._columns = width // period * self._starts
        self.flip = flip
        self.shape = (3, size, size)
        self.name = f"photos-{size}-{split}"

    def __len__(self) -> int:
        return len(self.files) * self._rows * self._columns

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(photo, top row, left column) of each window in the halved photographs, (B,) int64."""
        window, column = indices // self._columns, indices % self._columns
        band, start = column // self._starts, column % self._starts
        return window // self._rows, window % self._rows, band * self._period + self._first + start

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: x (B, 3, size, size)."""
        check_indices(indices, positions, len(self))
        photo, row, column = self.locate(indices)
        x = self._windows[photo, :, row, column].contiguous()
        if self.flip:
            x = random_flip(x, positions, seed)
        return Batch(x, photo, positions)

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of the name."""
        return _summary(self, [file.partition(".")[0] for file in self.files])


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, mapped to [-1, 1].

    Args:
        size: 8, or 16 or 32 by nearest upsampling (each pixel becomes a 2x2 or 4x4 block).
        split: "heldout" is every fifth image (index % 5 == 4), "train" the others, or "all".

    Raises:
        ValueError: another size, unknown split.
    """

    num_classes = 10

    def __init__(self, size: int = 8, split: str = "train") -> None:
        _check_split(split)
        if size not in (8, 16, 32):
            raise ValueError(f"size must be 8, 16 or 32 for the digits, got {size!r}")
        digits = _sklearn_datasets().load_digits()
        heldout = torch.arange(len(digits.target)) % 5 == 4
        keep = {"train": ~heldout, "heldout": heldout, "all": torch.ones_like(heldout)}[split]
        self._x = (torch.tensor(digits.images, dtype=torch.float32) / 8.0 - 1.0)[keep][:, None]
        self._y = torch.tensor(digits.target, dtype=torch.int64)[keep]
        self._factor = size // 8
        self.shape = (1, size, size)
        self.name = f"digits-{size}-{split}"

    def __len__(self) -> int:
        return len(self._y)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: x (B, 1, size, size); nothing here is random."""
        check_indices(indices, positions, len(self))
        x = self._x[indices].repeat_interleave(self._factor, -1)
        return Batch(x.repeat_interleave(self._factor, -2), self._y[indices], positions)

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of the name."""
        return _summary(self, [str(digit) for digit in range(self.num_classes)])


def _summary(dataset: Photos | Digits, class_names: list[str]) -> DataSummary:
    return DataSummary(
        unit="images",
        examples=len(dataset),
        classes=dataset.num_classes,
        shape=dataset.shape,
        digest=digest_of([dataset.name.encode()]),
        class_names=tuple(class_names),
    )
