"""The cache of a text-to-image run: embeddings of prompts and latents of images with captions.

    manifest.json        written last
    items/first.npy      int64 (N + 1,): captions of item i are rows first[i] to first[i + 1] - 1 of
    items/prompt.npy     int64 (K,): rows of the prompts
    prompts/             a set of its own (`encode_prompts.py`); a prompt stands once, row 0 is ""
    latents/WxH/         a set of latents for each bucket; its source.npy holds the items' numbers

Each set is made by shards (`shard_work.py`) whose bytes are a function of the source, the model and
the settings. One model is loaded at a time: the text encoders, then the autoencoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mixflow_fast.data.buckets import Bucket, nearest_bucket
from mixflow_fast.data.captioned import (
    FIRST,
    FORMAT,
    LATENTS,
    PROMPT,
    BucketInfo,
    CaptionedInfo,
)
from mixflow_fast.data.captioned import PROMPTS as PROMPTS_FOLDER
from mixflow_fast.data.latents_store import FORMAT as LATENTS_FORMAT
from mixflow_fast.data.preparation.captioned.listing import BadItem
from mixflow_fast.data.preparation.captioned_source import BadItems, CaptionedSource
from mixflow_fast.data.preparation.encode import (
    Plan,
    batch_of,
    deterministic_cudnn,
    precision_of,
)
from mixflow_fast.data.preparation.encode_buckets import (
    SHARD_IMAGES,
    Autoencoder,
    BucketMaker,
    BucketPlan,
    finish_bucket,
    known_bad,
    preprocessing,
)
from mixflow_fast.data.preparation.encode_prompts import (
    SHARD_PROMPTS,
    Prompts,
    PromptsPlan,
    StoredPart,
    TextEncoders,
    make_prompts,
    shard_records,
    write_texts,
)
from mixflow_fast.data.preparation.prepare import MAX_BAD, OnBad
from mixflow_fast.data.preparation.scan import free_bytes, quiet_pillow
from mixflow_fast.data.preparation.shard_work import ShardWork
from mixflow_fast.data.prompts_store import FORMAT as TEXT_FORMAT
from mixflow_fast.data.prompts_store import PROMPTS, PartInfo, PromptsInfo, Text
from mixflow_fast.data.set_files import MANIFEST, file_record, how_far, write_manifest
from mixflow_fast.files import replacing
from mixflow_fast.messages import size_text

TEXT_BATCH = 32
# Of the settings, what the manifest says as `settings`.
_OF_MANIFEST = (
    *("text_dtype", "text_batch", "image_batch", "buckets", "mirrors", "device", "preprocessing"),
    *("shard_images", "shard_prompts"),
)


@dataclass(frozen=True)
class CaptionedModel:
    """What encodes, of one model folder.

    Attributes:
        text: the text encoders.
        autoencoder: of the pictures.
        class_name: of the transformer that is to be trained.
        text_length: tokens of the prompt as the long encoder sees it.
        record: SHA-256 of the files of the model by their parts: transformer, encoders, vae.
    """

    text: TextEncoders
    autoencoder: Autoencoder
    class_name: str
    text_length: int
    record: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class CaptionedOptions:
    """How a cache is made.

    Attributes:
        buckets: sizes that the images are brought to.
        text: "cached": embeddings; "online": token ids, and the encoders run in training.
        text_dtype: of the text encoders' work, for the record.
        mirrors: 2 encodes mirrored images too, for which a caption's left and right are wrong.
        batch: images of one call of the autoencoder; None: as `encode`.
        text_batch: prompts of one call of a text encoder.
        on_bad, max_bad: as `prepare`.
        threads: that decode images.
        shard_images, shard_prompts: of a shard.
    """

    buckets: tuple[Bucket, ...]
    text: Text = "cached"
    text_dtype: str = "bf16"
    mirrors: Literal[1, 2] = 1
    batch: int | None = None
    text_batch: int = TEXT_BATCH
    on_bad: OnBad = "refuse"
    max_bad: int = MAX_BAD
    threads: int = 1
    shard_images: int = SHARD_IMAGES
    shard_prompts: int = SHARD_PROMPTS


@dataclass(frozen=True)
class CaptionedEncoded:
    """What `encode_captioned` did.

    Attributes:
        items, prompts: of the cache.
        made: shards that this process made.
        shards, unfinished: in all, and those left to other processes.
        skipped: images left out while they were encoded.
        seconds: that it took.
    """

    items: int
    prompts: int
    made: int
    shards: int
    unfinished: int
    skipped: int
    seconds: float


class CaptionedJob:
    """One cache: what it takes, and making it.

    Args:
        source: images with captions.
        out: folder of the cache; one that was begun with these settings is gone on with.
        model: what encodes. Its weights are read when they are needed.
        device: where it runs.
        options: how.

    Attributes:
        prompts: each prompt of the source once.
        buckets: those that images go to, in the order of `options.buckets`.

    Raises:
        ValueError: a bucket that the autoencoder has no latent for; numbers out of range.
    """

    def __init__(
        self,
        source: CaptionedSource,
        out: Path,
        model: CaptionedModel,
        device: torch.device,
        options: CaptionedOptions,
    ) -> None:
        self.source, self.out, self._model = source, out, model
        self._device, self._options = device, options
        self._digest = source.digest()
        self.prompts = Prompts.of(source.captions(i) for i in range(len(source)))
        self.prompts_plan = PromptsPlan(
            model.text,
            options.text,
            len(self.prompts.texts),
            options.shard_prompts,
            options.text_batch,
        )
        self.buckets = tuple(self._plan_buckets())

    def _plan_buckets(self) -> list[BucketPlan]:
        options, autoencoder = self._options, self._model.autoencoder
        near: dict[tuple[int, int], Bucket] = {}
        places = np.empty(len(self.source), np.int64)
        for item in range(len(self.source)):
            size = self.source.size(item)
            if size not in near:
                near[size] = nearest_bucket(size, options.buckets)
            places[item] = options.buckets.index(near[size])
        found = []
        for number, bucket in enumerate(options.buckets):
            items = np.nonzero(places == number)[0]
            if not len(items):
                continue
            batch = batch_of(options.batch, bucket.width * bucket.height, options.mirrors)
            plan = Plan(len(items), options.shard_images, batch // options.mirrors, options.mirrors)
            channels, height, width = bucket.latent_shape(autoencoder.channels, autoencoder.factor)
            found.append(BucketPlan(bucket, items, plan, (2 * channels, height, width)))
        return found

    def describe(self) -> list[str]:
        """Lines for people: what is there, and the bytes of each kind."""
        captions, texts = len(self.prompts.rows), len(self.prompts.texts)
        lines = [
            f"source    {len(self.source):,} images with {captions:,} captions: {texts:,} prompts, "
            'each stored once ("" among them)',
            f"{'':28}{'bytes each':>12}{'count':>12}{'in all':>12}",
        ]
        for name, shape, each, count in self._kinds():
            lines.append(f"{name:<28}{each:>12,}{count:>12,}{size_text(each * count):>12}  {shape}")
        free, where = free_bytes(self.out)
        total = self.total_bytes()
        lines.append(f"{'total':<28}{'':>24}{size_text(total):>12}")
        short = "" if self.missing_bytes() <= free else ", which is TOO LITTLE"
        lines.append(f"free      {size_text(free)} at {where}{short}")
        if self._options.text == "cached":
            ids = sum(StoredPart.of(p).bytes for p in self._model.text.token_parts.values())
            text = size_text(ids * self.prompts_plan.count)
            lines.append(
                f"note      --text online would store {text} of token ids in place of the text; "
                "training then runs the text encoders"
            )
        done, shards = how_far(self.out) or (0, 0)
        if done:
            lines.append(f"done      {done:,} of {shards:,} shards")
        if small := self._enlarged():
            lines.append(f"enlarged  {small:,} images are smaller than their bucket")
        lines += [f"note      {note}" for note in self.source.notes]
        lines += [f"warning   {warning}" for warning in self.source.warnings]
        if self.source.skipped:
            lines.append(f"left out  {len(self.source.skipped):,} entries that cannot be used")
        return lines

    def _kinds(self) -> list[tuple[str, str, int, int]]:
        """(name, shape, bytes each, count) of all that is stored."""
        plan = self.prompts_plan
        kinds = [
            (f"text {name}", _shape_text(part.shape, part.dtype), part.bytes, plan.count)
            for name, part in plan.parts.items()
        ]
        for bucket in self.buckets:
            mirrors = self._options.mirrors
            kinds.append(
                (
                    f"latents {bucket.bucket.name}",
                    _shape_text(bucket.shape, torch.float16) + (" x 2" if mirrors == 2 else ""),
                    2 * int(np.prod(bucket.shape)) * mirrors,
                    len(bucket.items),
                )
            )
        return kinds

    def total_bytes(self) -> int:
        """Of the whole cache, without its lists."""
        return sum(each * count for _, _, each, count in self._kinds())

    def _enlarged(self) -> int:
        return sum(
            bucket.bucket.enlarges(self.source.size(item))
            for bucket in self.buckets
            for item in bucket.items.tolist()
        )

    @property
    def settings(self) -> dict[str, object]:
        """Plain values that all parts of a cache must agree on."""
        options = self._options
        sets = {PROMPTS_FOLDER: self.prompts_plan.units}
        sets |= {_latents(bucket): bucket.shards for bucket in self.buckets}
        return {
            "format": FORMAT,
            "class_name": self._model.class_name,
            # Before the model's record, which lists no encoder's weights for token ids: the first
            # that differs is what a user is told.
            "text": options.text,
            **self._model.record,
            "text_length": self._model.text_length,
            # Token ids are the same whatever runs the encoders.
            "text_dtype": options.text_dtype if options.text == "cached" else None,
            "text_batch": options.text_batch if options.text == "cached" else None,
            "buckets": [bucket.name for bucket in options.buckets],
            "mirrors": options.mirrors,
            "image_batch": {
                b.bucket.name: b.plan.batch_samples * b.plan.mirrors for b in self.buckets
            },
            "device": precision_of("fp32", self._device, 0)["device"],
            "preprocessing": preprocessing(),
            "shard_images": options.shard_images,
            "shard_prompts": options.shard_prompts,
            "data": self._data(),
            "sets": sets,
        }

    def run(self, rank: int = 0, world: int = 1, quiet: bool = False) -> CaptionedEncoded:
        """Make the cache, or the part of it that is left to this process.

        Args:
            rank, world: this process among those that were started together.
            quiet: no progress.

        Raises:
            BadItems: images that cannot be decoded; all other shards are made.
            ValueError: other settings than `out` was begun with, too little space, a text or a
                latent that is not finite.
            OSError: the disk is full. As with any other end only shards that were open are lost.
        """
        start = time.monotonic()
        settings = self.settings
        self._check_space()  # before anything is there, so that other settings may be tried
        # No shard lies here: the sets below have them.
        with ShardWork(self.out, settings, 0, "", rank, world, folder="items") as whole:
            with deterministic_cudnn(), quiet_pillow():
                made = self._make_prompts(rank, world, quiet)
                latents = self._make_latents(rank, world, quiet, whole.complete)
            # Looked at when all is made here: others may have finished sets after this process.
            unfinished = self._unfinished()
            if not unfinished:
                whole.complete_with(lambda _: self._finish(settings))
        return CaptionedEncoded(
            items=len(self.source),
            prompts=len(self.prompts.texts),
            made=made + latents,
            shards=sum(settings["sets"].values()),
            unfinished=unfinished,
            skipped=sum(len(self._bad_of(bucket)) for bucket in self.buckets),
            seconds=time.monotonic() - start,
        )

    def _unfinished(self) -> int:
        """Shards that are not done, or sets without a manifest, of whatever process."""
        done, total = how_far(self.out) or (0, 1)
        sets = [self.out / PROMPTS_FOLDER]
        sets += [
            self.out / _latents(bucket)
            for bucket in self.buckets
            if len(self._bad_of(bucket)) < len(bucket.items)
        ]
        return total - done or sum(not (root / MANIFEST).is_file() for root in sets)

    def _make_prompts(self, rank: int, world: int, quiet: bool) -> int:
        """Make units of the prompts; returns how many."""
        options, plan = self._options, self.prompts_plan
        root = self.out / PROMPTS_FOLDER
        settings = {
            "format": TEXT_FORMAT,
            "text": options.text,
            "text_length": self._model.text_length,
            "shard_prompts": options.shard_prompts,
            "prompts": self.prompts.digest(),
        }

        def finish(records: list[dict[str, object]]) -> None:
            write_texts(root, self.prompts.texts)
            info = PromptsInfo(
                count=plan.count,
                text=options.text,
                class_name=self._model.class_name,
                length=self._model.text_length,
                parts={
                    name: PartInfo(part.shape, str(part.dtype).removeprefix("torch."))
                    for name, part in plan.parts.items()
                },
                encoders=self._model.record["encoders"],
                shards=tuple(shard_records(plan, records)),
            )
            info.check()
            write_manifest(root, info.to_record() | {"files": [file_record(root, PROMPTS)]})

        with ShardWork(root, settings, plan.units, "", rank, world) as work:
            if work.complete:
                return 0
            made = make_prompts(work, plan, self.prompts, options.threads, rank, quiet)
            work.complete_with(finish)
            return made

    def _make_latents(self, rank: int, world: int, quiet: bool, complete: bool) -> int:
        """Make shards of all buckets; returns how many. BadItems after all others are made."""
        made, refused, encoder = 0, list[BadItem](), None
        for bucket in self.buckets:
            with self._bucket_work(bucket, rank, world) as work:
                # What was left out may be a good file by now.
                if self._options.on_bad == "refuse" and not (complete or work.complete):
                    work.make_again(lambda record: bool(record.get("skipped")))
                if numbers := work.remaining():
                    encoder = encoder or self._model.autoencoder.load()
                    maker = BucketMaker(
                        work,
                        self.source,
                        bucket,
                        self._device,
                        max(1, self._options.threads),
                        self._judge() if self._options.on_bad == "skip" else None,
                    )
                    refused += maker.make(numbers, encoder, rank, quiet)
                    made += len(numbers)
                work.complete_with(partial(self._finish_bucket, work, bucket))
        if refused:
            raise BadItems(
                refused,
                len(self.source),
                "All other shards are made: put good files in their place and run the command "
                "again, or leave them out by --on-bad skip",
            )
        return made

    def _bucket_work(self, bucket: BucketPlan, rank: int, world: int) -> ShardWork:
        settings = {
            "format": LATENTS_FORMAT,
            "vae": self._model.autoencoder.record,
            "mirrors": self._options.mirrors,
            "precision": self._precision(bucket),
            "preprocessing": preprocessing(),
            "shard_images": self._options.shard_images,
            "data": self._data(),
            "bucket": {"name": bucket.bucket.name, "items": len(bucket.items)},
        }
        root, shards = self.out / _latents(bucket), bucket.shards
        return ShardWork(root, settings, shards, ".npy", rank, world, folder="moments")

    def _finish_bucket(
        self, work: ShardWork, bucket: BucketPlan, records: list[dict[str, object]]
    ) -> None:
        autoencoder, precision = self._model.autoencoder, self._precision(bucket)
        finish_bucket(work.out, records, bucket, autoencoder, precision, self._data())

    def _precision(self, bucket: BucketPlan) -> dict[str, object]:
        batch = bucket.plan.batch_samples * self._options.mirrors
        return precision_of("fp32", self._device, batch)

    def _data(self) -> dict[str, object]:
        return {"items": len(self.source), "sha256": self._digest}

    def _bad_of(self, bucket: BucketPlan) -> list[BadItem]:
        """What was left out of a bucket's shards that are done, whoever made them."""
        return known_bad(self.out / _latents(bucket))

    def _judge(self) -> Callable[[Sequence[BadItem]], None]:
        """What refuses too many bad images, those that are known before counted."""
        before = [*self.source.skipped, *(b for k in self.buckets for b in self._bad_of(k))]
        most = self._options.max_bad

        def judge(found: Sequence[BadItem]) -> None:
            if len(before) + len(found) > most:
                raise BadItems(
                    [*before, *found],
                    len(self.source) + len(self.source.skipped),
                    f"More than --max-bad {most}: look at them, or allow more of them",
                )

        return judge

    def _finish(self, settings: Mapping[str, object]) -> None:
        """Write the lists of items and the manifest."""
        files = []
        for name, values in ((FIRST, self.prompts.first), (PROMPT, self.prompts.rows)):
            with replacing(self.out / name) as written, open(written, "wb") as file:
                np.save(file, np.array(values, np.int64))
            files.append(file_record(self.out, name))
        buckets = []
        for bucket in self.buckets:
            kept = len(bucket.items) - len(self._bad_of(bucket))
            if kept:
                buckets.append(BucketInfo(bucket.bucket.name, kept))
                files.append(file_record(self.out, f"{_latents(bucket)}/{MANIFEST}"))
        if not buckets:
            raise ValueError(
                f"no image of {self.source.root} can be used: nothing is left to train"
            )
        files.append(file_record(self.out, f"{PROMPTS_FOLDER}/{MANIFEST}"))
        info = CaptionedInfo(
            items=len(self.source),
            captions=len(self.prompts.rows),
            prompts=len(self.prompts.texts),
            text=self._options.text,
            class_name=self._model.class_name,
            length=self._model.text_length,
            buckets=tuple(buckets),
            model=self._model.record,
            source=self._data(),
            settings={name: value for name, value in settings.items() if name in _OF_MANIFEST},
            files=tuple(files),
        )
        write_manifest(self.out, info.to_record())

    def missing_bytes(self) -> int:
        """Of the shards that nobody has done."""
        plan = self.prompts_plan
        needed = sum(
            plan.bytes(unit)
            for unit in range(plan.units)
            if not (self.out / PROMPTS_FOLDER / "shards" / f"{unit:05d}").exists()
        )
        for bucket in self.buckets:
            row = 2 * int(np.prod(bucket.shape))
            needed += sum(
                bucket.plan.rows(number) * row
                for number in range(bucket.shards)
                if not (self.out / _latents(bucket) / "moments" / f"{number:05d}.npy").exists()
            )
        return needed

    def _check_space(self) -> None:
        """ValueError where the disk has too little space for what is missing."""
        needed, (free, where) = self.missing_bytes(), free_bytes(self.out)
        if needed > free:
            raise ValueError(
                f"{self.out} needs {size_text(needed)} more, {where} has {size_text(free)} free: "
                "make room, choose another --out, or give --text online or a shorter --t5-length, "
                "which take less"
            )


def _latents(bucket: BucketPlan) -> str:
    return f"{LATENTS}/{bucket.bucket.name}"


def _shape_text(shape: Sequence[int], dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return f"{' x '.join(map(str, shape))} {names.get(dtype, str(dtype)[6:])}"
