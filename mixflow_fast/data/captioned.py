"""Captioned images as text-to-image networks train on them: cached latents and text.

A cache, format `mixflow-captioned/1`, is what `mixflow-fast encode` makes:

    manifest.json       written last: a folder without one is not complete
    items/first.npy     int64 (N + 1,): the captions of image i are first[i] .. first[i + 1] - 1 of
    items/prompt.npy    int64 (K,): rows of the set of prompts
    prompts/            a set of prompts (`data/prompts_store.py`)
    latents/1152x896/   a set of latents (`data/latents_store.py`) for each shape, width x height in
                        pixels; `source.npy` says which image i a sample is. The autoencoder's shift
                        is in the stored mean already: x1 = scale (mean + std eps)

Which caption, which mirror image and whether the prompt is dropped are functions of (seed, global
position). A dropped prompt is the empty one, as guidance asks the network for it, and never zeros.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from mixflow_fast import __version__
from mixflow_fast.data.dataset import Batch, check_indices, copy_batch, joined, mirrored, split
from mixflow_fast.data.latent_statistics import Statistics
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.data.npy_files import load_npy
from mixflow_fast.data.prompts_store import EMPTY_ROW, PromptsStore, Text
from mixflow_fast.data.set_files import MANIFEST, check_sizes, how_far, read_manifest
from mixflow_fast.data.summary import DataSummary, digest_of, sample_rows
from mixflow_fast.files import existing_path
from mixflow_fast.kernels.interpolate import Moments, sample_moments
from mixflow_fast.kernels.philox import Stream, uniform
from mixflow_fast.messages import did_you_mean

if TYPE_CHECKING:
    import os

FORMAT = "mixflow-captioned/1"
FIRST, PROMPT = "items/first.npy", "items/prompt.npy"
PROMPTS, LATENTS = "prompts", "latents"
_MEASURED = 256  # examples whose mean and std are taken


@dataclass(frozen=True)
class BucketInfo:
    """Images of one shape: "width x height" in pixels as a name, 1152x896, and how many."""

    name: str
    count: int

    @property
    def folder(self) -> str:
        """Of its latents, relative to the cache."""
        return f"{LATENTS}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class CaptionedInfo:
    """What the manifest of a cache says.

    Attributes:
        items: images N of the source, the ones that were left out among them.
        captions: captions K of them.
        prompts: different ones, and the empty one.
        text: cached (embeddings) or online (tokens).
        class_name: of the transformer that it was made for.
        length: tokens that prompts were padded to.
        buckets: the shapes.
        model: what encoded it: hashes of configurations and of the autoencoder's weights.
        source: what was encoded.
        settings: of the command.
        files: of this folder itself; the sets in it list their own.
    """

    items: int
    captions: int
    prompts: int
    text: Text
    class_name: str
    length: int
    buckets: tuple[BucketInfo, ...]
    model: Mapping[str, object] = field(default_factory=dict)
    source: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    files: tuple[Mapping[str, object], ...] = ()

    def to_record(self) -> dict[str, object]:
        """The manifest."""
        return {"format": FORMAT, "version": __version__, "shards": []} | asdict(self)

    @classmethod
    def read(cls, root: Path) -> CaptionedInfo:
        """Of a folder.

        Raises:
            ValueError: no manifest, one of another format, or one that does not describe a cache.
        """
        if not (root / MANIFEST).is_file() and how_far(root) is None:
            raise ValueError(
                f"{str(root)!r} holds no {MANIFEST}: it is no cache of captioned images; make one "
                "with `mixflow-fast encode --model FOLDER --data IMAGES --out CACHE`"
            )
        record = read_manifest(root, FORMAT)
        try:
            known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
            known["files"] = tuple(known["files"])
            known["buckets"] = tuple(BucketInfo(b["name"], b["count"]) for b in record["buckets"])
            info = cls(**known)
            if info.text not in get_args(Text) or not info.buckets:
                raise ValueError(f"text {info.text!r}, {len(info.buckets)} buckets")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(root / 'manifest.json')!r} does not describe a cache of captioned images "
                f"({error}): make it again with `mixflow-fast encode`"
            ) from error
        return info


class CaptionedLatents:
    """A cache of `mixflow-fast encode` as examples: moments of latents, and parts of prompts.

    Samples are numbered bucket by bucket; those of one `get` must be of one bucket, as
    `BucketOrder` gives them.

    Args:
        path: folder of the cache; `~` is expanded.
        buckets: names of the shapes to train on; None for all that there are.
        mirrors: as `Latents`; None: both where the cache has both.
        drop: probability of the empty prompt.

    Attributes:
        info: what the manifest says.
        prompts: the set of prompts.
        buckets: the shapes that are used.
        bucket_sizes: samples of each.
        shape: (C, h, w) of the largest.
        scale: x1 = scale (mean + std eps).
        flip: whether both mirrors are used; see `without_flips`.
        drop: as given.

    Raises:
        ValueError: no such cache, one that is not whole or damaged, a bucket that it has not, a
            probability outside of [0, 1).
    """

    num_classes = 1

    def __init__(
        self,
        path: str | os.PathLike[str],
        buckets: Sequence[str] | None = None,
        mirrors: int | None = None,
        drop: float = 0.0,
    ) -> None:
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be a probability in [0, 1), got {drop!r}")
        self.root = existing_path(path)
        self.info = CaptionedInfo.read(self.root)
        check_sizes(self.root, read_manifest(self.root, FORMAT))
        self.buckets = _chosen(self.info.buckets, buckets, str(path))
        self.prompts = PromptsStore(self.root / PROMPTS)
        self._stores = [LatentsStore(self.root / bucket.folder) for bucket in self.buckets]
        self._first, self._prompt = self._captions()
        self._check_sets()
        stored = min(store.info.mirrors for store in self._stores)
        if mirrors == 2 and stored == 1:
            raise ValueError(
                f"mirrors=2 needs latents of the mirrored images, which {str(path)!r} does not "
                "hold: encode with --mirrors 2, or leave data.mirrors out"
            )
        self.flip = (mirrors or stored) == 2
        self.drop = drop
        self.bucket_sizes = [store.info.count for store in self._stores]
        sizes = torch.tensor(self.bucket_sizes)
        self._ends = torch.cumsum(sizes, 0)
        rows = [store.info.shape for store in self._stores]
        largest = max(rows, key=lambda row: (row[1] * row[2], row))
        self.shape = (largest[0] // 2, largest[1], largest[2])
        self.scale = self._stores[0].info.scale
        self.name = f"captioned-{self.root.resolve().stem}"

    def _captions(self) -> tuple[Tensor, Tensor]:
        """`first` and `prompt` of the items, checked."""
        info = self.info
        found = []
        for name, count in ((FIRST, info.items + 1), (PROMPT, info.captions)):
            array = load_npy(self.root / name)
            if array.shape != (count,) or array.dtype.name != "int64":
                raise ValueError(
                    f"{str(self.root / name)!r} must be ({count},) int64, got {array.shape} "
                    f"{array.dtype}: make the cache again"
                )
            found.append(torch.from_numpy(array.copy()))
        first, prompt = found
        ordered = bool((first.diff() >= 0).all()) and int(first[0]) == 0
        if not ordered or int(first[-1]) != info.captions:
            raise ValueError(f"{str(self.root / FIRST)!r} does not rise from 0 to {info.captions}")
        rows = self.prompts.info.count
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < rows:
            raise ValueError(
                f"{str(self.root / PROMPT)!r} must name rows in [0, {rows}), got "
                f"{int(prompt.min())} to {int(prompt.max())}: make the cache again"
            )
        return first, prompt

    def _check_sets(self) -> None:
        """Prompts must be those of the cache, latents moments of images that have captions."""
        text, here = self.prompts.info, self.info
        for name, found, expected in (
            ("text", text.text, here.text),
            ("class_name", text.class_name, here.class_name),
            ("length", text.length, here.length),
            ("count", text.count, here.prompts),
        ):
            if found != expected:
                raise ValueError(
                    f"{str(self.prompts.root)!r} has {name} {found!r}, the cache's manifest says "
                    f"{expected!r}: make the cache again"
                )
        first = self._stores[0].info
        for bucket, store in zip(self.buckets, self._stores, strict=True):
            where, info = repr(str(store.root)), store.info
            if info.kind != "moments" or info.count != bucket.count:
                raise ValueError(
                    f"{where} must be {bucket.count} moments, as the cache's manifest says, got "
                    f"{info.count} of kind {info.kind}: make the cache again"
                )
            if (info.shape[0], info.scale, info.dtype) != (
                first.shape[0],
                first.scale,
                first.dtype,
            ):
                raise ValueError(
                    f"{where} has {info.shape[0] // 2} channels, scale {info.scale:g}, "
                    f"{info.dtype}, {str(self._stores[0].root)!r} has "
                    f"{first.shape[0] // 2}, {first.scale:g}, "
                    f"{first.dtype}: all must be of one autoencoder; make the cache again"
                )
            item = store.source
            if int(item.min()) < 0 or int(item.max()) >= self.info.items:
                raise ValueError(f"{where} holds images that the cache has no captions of")
            if bool((self._first[item + 1] == self._first[item]).any()):
                raise ValueError(f"{where} holds images without a caption")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: x are `Moments`, cond the parts of the prompts, y zeros.

        Raises:
            ValueError: as `check_indices`; samples of several buckets.
        """
        store, rows, prompts = self._rows(indices, positions, seed)
        x = split(store.take(rows), store.info.scale)
        y = torch.zeros(len(indices), dtype=torch.int64)
        return Batch(x, y, positions, cond=self.prompts.take(prompts))

    def fill(self, out: Batch, indices: Tensor, positions: Tensor, seed: int) -> None:
        """As `get`, straight into given memory."""
        store, rows, prompts = self._rows(indices, positions, seed)
        whole = joined(out.x) if isinstance(out.x, Moments) else None
        if whole is None and out.x is not None:
            copy_batch(out, self.get(indices, positions, seed))
            return
        if whole is not None:
            store.fill(whole, rows)
        if out.cond is not None:
            self.prompts.fill(out.cond, prompts)
        out.y.zero_()

    def willneed(self, indices: Tensor, positions: Tensor, seed: int) -> None:
        """Have the rows of a coming batch read ahead, without waiting for them."""
        store, rows, prompts = self._rows(indices, positions, seed)
        store.willneed(rows)
        self.prompts.willneed(prompts)

    def prompt_rows(self, indices: Tensor, positions: Tensor, seed: int) -> Tensor:
        """(B,) int64 rows of the prompts that samples have at their positions."""
        return self._rows(indices, positions, seed)[2]

    def _rows(
        self, indices: Tensor, positions: Tensor, seed: int
    ) -> tuple[LatentsStore, Tensor, Tensor]:
        """The bucket's latents, (B,) rows of them, and (B,) rows of the prompts."""
        check_indices(indices, positions, len(self))
        bucket = torch.searchsorted(self._ends, indices, right=True)
        if bucket.numel() and int(bucket.min()) != int(bucket.max()):
            names = [self.buckets[number].name for number in bucket.unique().tolist()]
            raise ValueError(
                f"samples of one batch must be of one bucket, got {', '.join(names)}: ask for "
                "indices that BucketOrder gives"
            )
        number = int(bucket[0]) if bucket.numel() else 0
        store = self._stores[number]
        sample = indices - (self._ends[number] - self.bucket_sizes[number])
        rows = sample * store.info.mirrors
        if self.flip:
            rows = rows + mirrored(positions, seed)
        item = store.source[sample]
        first, count = self._first[item], self._first[item + 1] - self._first[item]
        chosen = uniform(seed, Stream.CAPTION_CHOICE, positions)[:, 0].double() * count
        prompts = self._prompt[first + chosen.long()]
        if self.drop:
            dropped = uniform(seed, Stream.PROMPT_DROP, positions)[:, 0] < self.drop
            prompts = torch.where(dropped, EMPTY_ROW, prompts)
        return store, rows, prompts

    def statistics(self) -> Statistics:
        """Mean and std of x over a fixed sample of examples, in the shares of the buckets."""
        total, square, numbers, examples = 0.0, 0.0, 0, 0
        for store in self._stores:
            count = max(1, min(store.info.count, _MEASURED * store.info.count // len(self)))
            samples = torch.tensor(sample_rows(store.info.count, count))
            moments = split(store.take(samples * store.info.mirrors), self.scale)
            x = sample_moments(moments, 0, samples).double()
            total, square = total + float(x.sum()), square + float(x.square().sum())
            numbers, examples = numbers + x.numel(), examples + len(x)
        mean = total / numbers
        return Statistics(examples, mean, math.sqrt(square / numbers - mean**2), self.scale)

    def without_drop(self) -> CaptionedLatents:
        """The same examples with all their prompts; shares the memory of this one."""
        plain = copy.copy(self)
        plain.drop = 0.0
        return plain

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of the manifests, and of which prompt is whose."""
        parts = [self._first.numpy().tobytes(), self._prompt.numpy().tobytes()]
        parts += self.prompts.identity()
        for bucket, store in zip(self.buckets, self._stores, strict=True):
            # Which image a latent is of decides on its captions.
            parts += [bucket.name.encode(), *store.identity(), store.source.numpy().tobytes()]
        parts.append(json.dumps({"mirrors": 1 + self.flip}).encode())
        info = self.info
        shapes = ", ".join(f"{bucket.name}: {bucket.count:,}" for bucket in self.buckets)
        what = "embeddings" if info.text == "cached" else "tokens"
        return DataSummary(
            unit="captioned latents",
            examples=len(self),
            classes=0,
            shape=self.shape,
            digest=digest_of(parts),
            notes=(
                f"the cache has {info.captions:,} captions, {info.prompts:,} different prompts "
                f"with the empty one ({what} of {info.class_name}'s encoders, {info.length} "
                "tokens)",
                f"latents by pixels {shapes}",
            ),
        )


def _chosen(
    there: tuple[BucketInfo, ...], names: Sequence[str] | None, path: str
) -> tuple[BucketInfo, ...]:
    """The buckets of these names, in the cache's order."""
    if names is None:
        return there
    known = [bucket.name for bucket in there]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ValueError(
            f"buckets must be of those that the cache {path!r} has, {', '.join(known)}, got "
            f"{', '.join(map(repr, wrong)) or 'none'}"
            f"{did_you_mean(wrong[0], known) if wrong else ''}"
        )
    return tuple(bucket for bucket in there if bucket.name in names)
