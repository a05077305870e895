"""A small cache of captioned images with random content, written without an encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.captioned import (
    FIRST,
    FORMAT,
    LATENTS,
    PROMPT,
    PROMPTS,
    BucketInfo,
    CaptionedInfo,
)
from mixflow_fast.data.latents_store import LatentsInfo
from mixflow_fast.data.latents_writer import ShardWriter, finish_store
from mixflow_fast.data.npy_files import padded_header
from mixflow_fast.data.prompts_store import PROMPTS as PROMPTS_FILE
from mixflow_fast.data.prompts_store import PartInfo, PromptsInfo, PromptsShard
from mixflow_fast.data.set_files import MANIFEST, file_record, write_manifest

# What the tiny SD3 of `tests.support.text_to_image` is told.
SD3_PARTS = {
    "clip_l": PartInfo((5, 8), "bfloat16"),
    "pooled_l": PartInfo((24,), "bfloat16"),
    "clip_g": PartInfo((5, 12), "bfloat16"),
    "pooled_g": PartInfo((40,), "bfloat16"),
    "t5": PartInfo((7, 32), "bfloat16"),
}


def part_values(name: str, part: PartInfo, rows: int) -> Tensor:
    """What row r of a part holds: random numbers of (name, r)."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    made = [
        torch.randn(part.shape, generator=torch.Generator().manual_seed(seed + row))
        for row in range(rows)
    ]
    return torch.stack(made).to(getattr(torch, part.dtype))


def latent_values(item: int, mirror: int, shape: tuple[int, int, int]) -> Tensor:
    """The moments of an image, (2 C, h, w) float16, a positive std behind the mean."""
    generator = torch.Generator().manual_seed(2 * item + mirror)
    channels, height, width = shape
    mean = torch.randn(channels, height, width, generator=generator)
    std = 0.1 + torch.rand(channels, height, width, generator=generator) / 10
    return torch.cat([mean, std]).half()


def write_cache(
    root: Path,
    captions: Sequence[int] = (1,) * 16,
    buckets: Mapping[str, Sequence[int]] | None = None,
    parts: Mapping[str, PartInfo] = SD3_PARTS,
    mirrors: int = 1,
    text: str = "cached",
    channels: int = 16,
    class_name: str = "SD3Transformer2DModel",
    length: int = 7,
    shard_rows: int = 6,
    scale: float = 1.5305,
) -> Path:
    """Write a cache.

    Args:
        root: its folder.
        captions: how many each image has; caption k of all is the prompt of row 1 + k.
        buckets: images of each shape, by names as "64x64"; None: all in "64x64".
        parts, mirrors, text, class_name, length: as the manifests say them.
        channels: C of a latent.
        shard_rows: prompts in a file.
        scale: of the latents.
    """
    buckets = {"64x64": range(len(captions))} if buckets is None else buckets
    rows = 1 + sum(captions)
    first = np.concatenate([[0], np.cumsum(captions)]).astype(np.int64)
    (root / "items").mkdir(parents=True)
    np.save(root / FIRST, first)
    np.save(root / PROMPT, np.arange(1, rows, dtype=np.int64))
    write_prompts(root / PROMPTS, rows, parts, text, class_name, length, shard_rows)
    for name, items in buckets.items():
        width, height = (int(side) // 8 for side in name.split("x"))
        _write_latents(root / LATENTS / name, items, mirrors, (channels, height, width), scale)
    info = CaptionedInfo(
        items=len(captions),
        captions=rows - 1,
        prompts=rows,
        text=text,
        class_name=class_name,
        length=length,
        buckets=tuple(BucketInfo(name, len(items)) for name, items in buckets.items()),
        files=tuple(
            file_record(root, name)
            for name in (
                *(FIRST, PROMPT, f"{PROMPTS}/{MANIFEST}"),
                *(f"{LATENTS}/{name}/{MANIFEST}" for name in buckets),
            )
        ),
    )
    assert info.to_record()["format"] == FORMAT
    write_manifest(root, info.to_record())
    return root


def write_prompts(
    root: Path,
    rows: int,
    parts: Mapping[str, PartInfo] = SD3_PARTS,
    text: str = "cached",
    class_name: str = "SD3Transformer2DModel",
    length: int = 7,
    shard_rows: int = 6,
) -> Path:
    """Write a set of prompts: "" and "prompt 1", "prompt 2", ..."""
    shards = []
    for name, part in parts.items():
        values = part_values(name, part, rows)
        stored = values.view(torch.int16).numpy().view(np.uint16)
        if part.dtype != "bfloat16":
            stored = values.numpy()
        for number, start in enumerate(range(0, rows, shard_rows)):
            block = np.ascontiguousarray(stored[start : start + shard_rows])
            file = f"shards/{number:05d}/{name}.npy"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            with open(root / file, "wb") as opened:
                opened.write(padded_header(block.shape, block.dtype.name))
                opened.write(block.tobytes())
            record = file_record(root, file)
            shards.append(PromptsShard(file, name, len(block), record["bytes"], record["sha256"]))
    texts = ["", *(f"prompt {row}" for row in range(1, rows))]
    lines = [
        json.dumps({"row": r, "sha256": hashlib.sha256(t.encode()).hexdigest(), "text": t})
        for r, t in enumerate(texts)
    ]
    (root / PROMPTS_FILE).write_text("\n".join(lines) + "\n")
    info = PromptsInfo(
        count=rows, text=text, class_name=class_name, length=length, parts=dict(parts),
        shards=tuple(shards),
    )  # fmt: skip
    write_manifest(root, info.to_record() | {"files": [file_record(root, PROMPTS_FILE)]})
    return root


def _write_latents(
    root: Path, items: Sequence[int], mirrors: int, shape: tuple[int, int, int], scale: float
) -> None:
    (root / "moments").mkdir(parents=True)
    stored = (2 * shape[0], *shape[1:])
    rows = [latent_values(item, mirror, shape) for item in items for mirror in range(mirrors)]
    with ShardWriter(root / "moments" / "00000.npy", len(rows), stored) as writer:
        writer.write(torch.stack(rows))
    record = file_record(root, "moments/00000.npy") | {"rows": len(rows)}
    info = LatentsInfo(
        kind="moments", shape=stored, dtype="float16", mirrors=mirrors, count=len(items),
        num_classes=1, scale=scale,
    )  # fmt: skip
    zeros = np.zeros(len(items), np.int64)
    finish_store(root, info, [record], zeros, np.array(items, np.int64))
