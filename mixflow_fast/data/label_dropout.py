"""Training examples with the null class in place of some labels, for classifier-free guidance.

It is a dataset around a dataset, because `get` is the pure function of (index, position, seed) that
the loader runs in its threads: whoever makes a batch of the run, to train on it or to look for what
went wrong with it, gets the labels that the network saw. Validation takes the dataset inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mixflow_fast.data.bucket_order import bucket_sizes
from mixflow_fast.data.dataset import Batch, Dataset, ImageDataset, fill, take
from mixflow_fast.data.summary import DataSummary
from mixflow_fast.kernels.philox import Stream, uniform


def drop_labels(
    y: Tensor, positions: Tensor, seed: int, probability: float, null_class: int
) -> Tensor:
    """(B,) int64 labels with `null_class` in place of some, a function of (seed, position) alone.

    Args:
        y: (B,) int64 labels.
        positions: (B,) int64 global sample positions.
        seed: in [0, 2**64).
        probability: in [0, 1), of the null class.
        null_class: the label of an example without a class.
    """
    return torch.where(
        uniform(seed, Stream.LABEL_DROPOUT, positions)[:, 0] < probability, null_class, y
    )


class LabelDropout:
    """A dataset whose batches have some labels replaced by the null class.

    Args:
        dataset: the examples.
        probability: in [0, 1), of the null class; 0 leaves every label.
        null_class: of the network; None only with probability 0.

    Attributes:
        num_classes, shape, name: of the dataset. A dropped label is `null_class`, which may lie
            outside of [0, num_classes).
        files: of the dataset where it has one a sample, else empty.
        dataset: the examples themselves; where they are an `ImageDataset`, what that has is here
            too.
    """

    def __init__(
        self, dataset: Dataset | ImageDataset, probability: float, null_class: int | None
    ) -> None:
        if probability and null_class is None:
            raise ValueError(
                f"label dropout of {probability} needs a null class, got a network without one: "
                "set model.class_dropout_prob > 0, or train.label_dropout=0"
            )
        self.dataset, self._probability, self._null_class = dataset, probability, null_class
        self.num_classes, self.shape, self.name = dataset.num_classes, dataset.shape, dataset.name
        self.files: Sequence[object] = getattr(dataset, "files", ())

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As the dataset's, with some labels dropped."""
        batch = take(self.dataset, indices, positions, seed)
        return dataclasses.replace(batch, y=self._dropped(batch.y, positions, seed))

    def fill(self, out: Batch, indices: Tensor, positions: Tensor, seed: int) -> None:
        """As `get`, into given memory."""
        fill(self.dataset, out, indices, positions, seed)
        if self._probability:
            out.y.copy_(self._dropped(out.y, positions, seed))

    def willneed(self, indices: Tensor, positions: Tensor, seed: int) -> None:
        """Tells the dataset, where it can be told, what will be asked for."""
        tell = getattr(self.dataset, "willneed", None)
        if tell is not None:
            tell(indices, positions, seed)

    def labels(self, indices: Tensor, positions: Tensor, seed: int) -> Tensor:
        """(B,) int64 labels as in `get`, of a dataset that gives labels without the images."""
        return self._dropped(self.dataset.labels(indices), positions, seed)

    def _dropped(self, y: Tensor, positions: Tensor, seed: int) -> Tensor:
        if not self._probability:
            return y
        return drop_labels(y, positions, seed, self._probability, self._null_class)

    @property
    def bucket_sizes(self) -> list[int]:
        """Samples of each bucket, in the order of their indices."""
        return bucket_sizes(self.dataset)

    @property
    def size(self) -> int:
        """As `ImageDataset`, like those below."""
        return self.dataset.size

    @property
    def flip(self) -> bool:
        return self.dataset.flip

    @property
    def encoded(self) -> bool:
        return self.dataset.encoded

    @property
    def crops(self) -> bool:
        return self.dataset.crops

    def payload(self, index: int) -> bytes:
        """As `ImageDataset`."""
        return self.dataset.payload(index)

    def name_of(self, index: int) -> str:
        """As `ImageDataset`."""
        return self.dataset.name_of(index)

    def summary(self) -> DataSummary:
        """Of the dataset: dropping labels does not make it another one."""
        return self.dataset.summary()
