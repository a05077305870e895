"""Small sets of latents in the format of `mixflow-fast data encode`."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from mixflow_fast.data.latents_store import LatentsInfo
from mixflow_fast.data.latents_writer import ShardWriter, finish_store
from mixflow_fast.data.preparation.shard_work import ShardWork

# Samples 0 to 4 with two mirrors each, moments of two channels; exact in float16.
ROWS = torch.randint(1, 500, (10, 4, 3, 2), generator=torch.Generator().manual_seed(0)) / 64
LABELS = np.array([0, 2, 1, 1, 0])
SOURCE = np.array([3, 4, 7, 8, 20])
INFO = LatentsInfo(
    kind="moments",
    shape=(4, 3, 2),
    dtype="float16",
    mirrors=2,
    count=5,
    num_classes=3,
    scale=0.5,
    size=24,
    encoder={"class": "AutoencoderKL", "weights_sha256": "5" * 64},
    precision={"dtype": "fp32"},
)


def write_store(root, rows=ROWS, samples_per_shard=2, labels=LABELS, source=SOURCE, **info):
    """A set of `rows` with these labels and numbers; `info` replaces what INFO says."""
    info = dataclasses.replace(INFO, shape=tuple(rows.shape[1:]), **info)
    info = dataclasses.replace(info, count=len(rows) // info.mirrors)
    of_shard = samples_per_shard * info.mirrors
    blocks = rows.to(getattr(torch, info.dtype)).split(of_shard)
    with ShardWork(root, {}, len(blocks), ".npy", folder="moments") as work:
        for number in work.remaining():
            block = blocks[number]
            with ShardWriter(work.temporary(number), len(block), info.shape, info.dtype) as shard:
                shard.write(block)
            work.finish(number, len(block), {"statistics": shard.statistics()})
        work.complete_with(lambda records: finish_store(root, info, records, labels, source))
    return root


def training_on(root, side=16, channels=3):
    """Settings of a small run on a set of moments."""
    return [
        "data.kind=latents", f"data.path={root}", "data.flip=false", "data.size=null",
        f"model.input_size={side}", f"model.in_channels={channels}", "model.num_classes=3",
    ]  # fmt: skip
