"""Features of a set, computed with each shard by the process that makes it.

They are of the 8-bit pictures as the file holds them, never of floats. Each shard's are kept until
the set is whole, and then put together to where `mixflow-fast evaluate` looks for them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.evaluation.features.extractor import (
    BATCH,
    Extractor,
    Features,
    extract,
    kept_features,
)


class ShardFeatures:
    """Computes and keeps the features of shards.

    Args:
        folder: for the features of shards, below the set's.
        extractors: the networks.
        shard: ids in a shard.
    """

    def __init__(self, folder: Path, extractors: Sequence[Extractor], shard: int) -> None:
        self._folder, self._extractors, self._shard = folder, extractors, shard

    def on_shard(self, number: int, pictures: np.ndarray) -> None:
        """Compute those of one shard, (rows, H, W, C) uint8."""
        for extractor in self._extractors:
            self._of_shard(extractor, number, pictures)

    def gather(self, pictures: np.ndarray, source: str) -> list[Features]:
        """Features of the whole set, an item for each extractor.

        Those of a shard that are lacking, or are of other pictures, are computed.

        Args:
            pictures: (n, H, W, C) uint8 of the whole set.
            source: its fingerprint, as `Features`.
        """
        starts = range(0, len(pictures), self._shard)
        shards = [pictures[start : start + self._shard] for start in starts]
        return [
            _joined([self._of_shard(each, n, rows) for n, rows in enumerate(shards)], source)
            for each in self._extractors
        ]

    def delete(self) -> None:
        """Delete the features of shards."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _of_shard(self, extractor: Extractor, number: int, pictures: np.ndarray) -> Features:
        place = self._folder / f"{number:05d}"
        # By content: damaged shards are made again, and other pictures have other features.
        source = hashlib.sha256(np.ascontiguousarray(pictures).data).hexdigest()
        kept = kept_features(place, extractor, source)
        if kept is not None:
            return kept
        ids = number * self._shard + np.arange(len(pictures))
        found = extract(_batches(pictures), extractor, ids, source)
        found.save(place)
        return found


def _batches(pictures: np.ndarray) -> Iterator[Tensor]:
    for start in range(0, len(pictures), BATCH):
        rows = torch.from_numpy(np.array(pictures[start : start + BATCH]))
        yield rows.movedim(-1, 1).expand(-1, 3, -1, -1).contiguous()


def _joined(parts: Sequence[Features], source: str) -> Features:
    first = parts[0]
    return Features(
        {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays},
        np.concatenate([part.ids for part in parts]),
        first.extractor,
        tuple(number for part in parts for number in part.constant),
        source,
    )
