"""Prompts of a text-to-image cache, as what its text encoders make of them.

    manifest.json                written last, with a record of every file and its part
    prompts.jsonl                {"row", "sha256", "text"} of each prompt, row 0 is ""
    shards/00000/PART.npy ...    (rows, ...) of one part; data begin at byte 4096

The encoders come one after the other, each over all shards, so that one at a time is loaded. A unit
of work is a shard of one encoder: a folder with all that it makes of the prompts. Batches have one
size, the last one of a shard is filled up and cut, and none crosses shards, so a shard's bytes do
not depend on who makes it when.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from mixflow_fast.data.npy_files import padded_header
from mixflow_fast.data.preparation.encode import ahead
from mixflow_fast.data.preparation.shard_work import ShardWork, named_errors
from mixflow_fast.data.prompts_store import PROMPTS, STORED_AS, PromptsShard, Text
from mixflow_fast.files import replacing
from mixflow_fast.messages import duration
from mixflow_fast.metrics.progress import Progress

SHARD_PROMPTS = 2048  # 4.3 GB of T5 at 256 tokens


class PromptPart(Protocol):
    """A tensor of one prompt.

    Attributes:
        shape: without the batch.
        dtype: floating, int32 or uint8.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class TextStage(Protocol):
    """One text encoder.

    Attributes:
        name: such as "t5".
        parts: names of what it makes of a prompt.
    """

    name: str
    parts: Sequence[str]


class TextEncoders(Protocol):
    """What makes prompts to numbers: `PromptEncoder` of `models/text_to_image/prompts.py`.

    Attributes:
        stages: the encoders, in the order of their work.
        parts: what all of them make of a prompt.
        token_parts: all that `tokens` gives.
    """

    stages: Sequence[TextStage]
    parts: Mapping[str, PromptPart]
    token_parts: Mapping[str, PromptPart]

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of all encoders, on the CPU; needs no weights."""
        ...

    def embed(self, stage: str, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of one encoder, which is loaded for it where it is not."""
        ...

    def release(self, stage: str) -> None:
        """Free the memory of one encoder."""
        ...


@dataclass(frozen=True)
class Prompts:
    """The prompts of a source, each once, and which ones an item has.

    Attributes:
        texts: in the order of first appearance; the first is "", that of a dropped prompt.
        first: captions of item i are `rows[first[i]:first[i + 1]]`.
        rows: of `texts`.
    """

    texts: list[str]
    first: list[int]
    rows: list[int]

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]]) -> Prompts:
        """Of the captions of all items."""
        numbers, first, rows = {"": 0}, [0], list[int]()
        for item in captions:
            rows += [numbers.setdefault(text, len(numbers)) for text in item]
            first.append(len(rows))
        return cls(list(numbers), first, rows)

    def digest(self) -> str:
        """SHA-256 of the prompts in their order."""
        found = hashlib.sha256()
        for text in self.texts:
            found.update(json.dumps(text).encode() + b"\n")
        return found.hexdigest()


@dataclass(frozen=True)
class StoredPart:
    """A part as it lies on the disk.

    Attributes:
        shape: of one prompt.
        dtype: bfloat16 of whatever is floating; else the encoder's.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, part: PromptPart) -> StoredPart:
        """Of what an encoder gives."""
        return cls(part.shape, torch.bfloat16 if part.dtype.is_floating_point else part.dtype)

    @property
    def bytes(self) -> int:
        """Of one prompt."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Tokens:
    """Of "online" the token ids alone are stored: the encoders run in training."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class PromptsPlan:
    """Units of work: shard s of stage k is unit k * shards + s.

    Attributes:
        encoders: what makes prompts to numbers.
        text: "cached": what the encoders make; "online": token ids.
        count: prompts.
        shard_prompts: of a shard; the last has what is left.
        batch: prompts of one call of an encoder.
    """

    encoders: TextEncoders
    text: Text
    count: int
    shard_prompts: int
    batch: int

    @property
    def stages(self) -> Sequence[TextStage]:
        if self.text == "cached":
            return self.encoders.stages
        return (_Tokens("tokens", tuple(self.encoders.token_parts)),)

    @property
    def parts(self) -> dict[str, StoredPart]:
        """All that is stored of a prompt."""
        cached = self.text == "cached"
        parts = self.encoders.parts if cached else self.encoders.token_parts
        return {name: StoredPart.of(part) for name, part in parts.items()}

    def made(self, stage: TextStage, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """A stage's parts of a batch, in the dtypes that are stored, on the encoder's device."""
        parts = self.parts
        made = self.encoders.embed(stage.name, tokens) if self.text == "cached" else tokens
        return {name: made[name].to(parts[name].dtype) for name in stage.parts}

    def release(self, stage: TextStage) -> None:
        """Free what a stage has loaded."""
        if self.text == "cached":
            self.encoders.release(stage.name)

    @property
    def shards(self) -> int:
        """Of each encoder."""
        return -(-self.count // self.shard_prompts)

    @property
    def units(self) -> int:
        return self.shards * len(self.stages)

    def stage(self, unit: int) -> TextStage:
        return self.stages[unit // self.shards]

    def rows(self, unit: int) -> range:
        first = unit % self.shards * self.shard_prompts
        return range(first, min(first + self.shard_prompts, self.count))

    def bytes(self, unit: int) -> int:
        parts = self.parts
        return len(self.rows(unit)) * sum(parts[name].bytes for name in self.stage(unit).parts)

    def batches(self, units: Iterable[int]) -> Iterator[range]:
        """Rows of the batches of units, in their order; none crosses units."""
        for unit in units:
            yield from _cut(self.rows(unit), self.batch)


def _cut(rows: range, batch: int) -> Iterator[range]:
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch]


def make_prompts(
    work: ShardWork, plan: PromptsPlan, prompts: Prompts, threads: int, rank: int, quiet: bool
) -> int:
    """Make this process's units that are left; returns how many.

    Raises:
        ValueError: an encoder gives other parts than it says, or values that are not finite.
        OSError: the disk is full.
    """
    mine = work.remaining()
    for stage in plan.stages:
        units = [unit for unit in mine if plan.stage(unit) == stage]
        if units:
            _make_stage(work, plan, prompts, stage, units, threads, rank, quiet)
    return len(mine)


def _make_stage(
    work: ShardWork,
    plan: PromptsPlan,
    prompts: Prompts,
    stage: TextStage,
    units: list[int],
    threads: int,
    rank: int,
    quiet: bool,
) -> None:
    """Load one encoder, run it over units, and release it."""
    label = stage.name if rank == 0 else f"{stage.name} (rank {rank})"
    total, begun, done = sum(len(plan.rows(unit)) for unit in units), time.monotonic(), 0

    def tokens(rows: range) -> dict[str, Tensor]:
        texts = [prompts.texts[row] for row in rows]
        return plan.encoders.tokens(texts + texts[-1:] * (plan.batch - len(texts)))

    with (
        Progress(total, label, "prompts", quiet=quiet) as progress,
        # One thread: tokenizers of Rust are not to be called from several at a time.
        ThreadPoolExecutor(1, thread_name_prefix="mixflow_fast-tokens") as tokenizers,
        ThreadPoolExecutor(1, thread_name_prefix="mixflow_fast-shard") as writers,
    ):
        made = ahead(tokenizers, tokens, plan.batches(units), 2 * max(1, threads))
        behind = _Behind(writers)
        try:
            for unit in units:
                rows = plan.rows(unit)
                with _UnitWriter(work.temporary(unit), len(rows), stage, plan.parts) as writer:
                    for batch in _cut(rows, plan.batch):
                        _, ids = next(made)
                        parts = {k: v[: len(batch)] for k, v in plan.made(stage, ids).items()}
                        _check_finite(parts, stage, [prompts.texts[r] for r in batch])
                        behind.do(writer.write, {k: v.cpu() for k, v in parts.items()})
                        done += len(batch)
                        progress.advance(len(batch))
                        progress.show(f"{done / (time.monotonic() - begun):.3g} prompts/s")
                    behind.wait()
                written = writer.files()
                digests = {f"{name}.npy": str(f["sha256"]) for name, f in written.items()}
                behind.do(work.finish, unit, len(rows), {"files": written}, digests)
                _say_shard(progress, plan, unit)
            behind.wait()
        except BaseException:
            tokenizers.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            plan.release(stage)
        progress.log(f"{label}: {total:,} prompts in {duration(time.monotonic() - begun)}")


def _say_shard(progress: Progress, plan: PromptsPlan, unit: int) -> None:
    if plan.shards > 1:
        progress.log(f"{plan.stage(unit).name}: shard {unit % plan.shards + 1} of {plan.shards}")


def _check_finite(parts: Mapping[str, Tensor], stage: TextStage, texts: Sequence[str]) -> None:
    for name, part in parts.items():
        if not part.is_floating_point():
            continue
        bad = (~part.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(
                f"{stage.name} makes values that are not finite of the prompt "
                f"{texts[bad[0]]!r:.200} (part {name}): look at its weights in --model"
            )


class _Behind:
    """Work of one thread, of which at most two pieces wait; its errors come with the next piece."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._waiting = pool, deque[Future[None]]()

    def do(self, function: Callable[..., None], *arguments: object) -> None:
        while len(self._waiting) > 1:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *arguments))

    def wait(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()


class _UnitWriter:
    """Writes a folder with a .npy of each part of a stage, and hashes what it writes."""

    def __init__(
        self, path: Path, rows: int, stage: TextStage, parts: Mapping[str, StoredPart]
    ) -> None:
        self._path, self._rows = path, rows
        self._parts = {name: parts[name] for name in stage.parts}
        self._stack, self._stage = ExitStack(), stage.name
        self._hashes = {name: hashlib.sha256() for name in self._parts}
        self._bytes = dict.fromkeys(self._parts, 0)

    def __enter__(self) -> _UnitWriter:
        with named_errors(self._path):
            self._path.mkdir()
            self._files = {
                name: self._stack.enter_context(open(self._path / f"{name}.npy", "wb"))
                for name in self._parts
            }
        for name, part in self._parts.items():
            stored = STORED_AS[str(part.dtype).removeprefix("torch.")]
            header = padded_header((self._rows, *part.shape), stored)
            self._append(name, memoryview(header))
        return self

    def write(self, parts: Mapping[str, Tensor]) -> None:
        """Append rows of every part; ValueError for other names, shapes or dtypes."""
        for name, part in self._parts.items():
            rows = parts.get(name)
            if rows is None or tuple(rows.shape[1:]) != part.shape or rows.dtype != part.dtype:
                got = "nothing" if rows is None else f"{tuple(rows.shape)} {rows.dtype}"
                raise ValueError(
                    f"the text encoder {self._stage} must give {name} as (B, "
                    f"{', '.join(map(str, part.shape))}) {part.dtype}, got {got}"
                )
            self._append(name, memoryview(rows.contiguous().view(torch.uint8).numpy()).cast("B"))

    def files(self) -> dict[str, dict[str, object]]:
        """Bytes and SHA-256 of each part's file."""
        return {
            name: {"bytes": self._bytes[name], "sha256": self._hashes[name].hexdigest()}
            for name in self._parts
        }

    def _append(self, name: str, data: memoryview) -> None:
        with named_errors(self._path / f"{name}.npy"):
            self._files[name].write(data)
        self._hashes[name].update(data)
        self._bytes[name] += len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with named_errors(self._path):
            self._stack.close()


def shard_records(plan: PromptsPlan, records: Sequence[Mapping[str, object]]) -> list[PromptsShard]:
    """All files, part by part, from what the units' done files hold."""
    found = list[PromptsShard]()
    for k, stage in enumerate(plan.stages):
        units = records[k * plan.shards : (k + 1) * plan.shards]
        for part in stage.parts:
            found += [
                PromptsShard(f"{u['file']}/{part}.npy", part, u["rows"], **u["files"][part])
                for u in units
            ]
    return found


def write_texts(root: Path, texts: Sequence[str]) -> None:
    """Write prompts.jsonl."""
    with replacing(root / PROMPTS) as partial, open(partial, "wb") as file:
        for row, text in enumerate(texts):
            digest = hashlib.sha256(text.encode()).hexdigest()
            line = {"row": row, "sha256": digest, "text": text}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
