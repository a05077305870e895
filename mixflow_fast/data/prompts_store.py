"""Sets of prompts on the disk, format `mixflow-prompts/1`: what their manifest says, and reading.

    manifest.json                 written last: a folder without one is not complete
    shards/00000/t5.npy ...       (rows, ...) of what one text encoder gives, from byte 4096 on
    prompts.jsonl                 a line a row: its number, the SHA-256 of the prompt, the prompt

Every prompt stands once, whoever it belongs to. Row 0 is the empty prompt "", which stands in for
a prompt that is dropped. A part is what one encoder gives for a prompt (`PromptLayout`), or, in a
set whose text is "online", its tokens. bfloat16, which numpy does not know, is stored as the
uint16 of the same bits.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from mixflow_fast import __version__
from mixflow_fast.data.npy_files import load_npy
from mixflow_fast.data.set_files import check_sizes, read_manifest

if TYPE_CHECKING:
    import numpy as np

FORMAT = "mixflow-prompts/1"
PROMPTS = "prompts.jsonl"
EMPTY_ROW = 0
Text = Literal["cached", "online"]
# How each dtype stands in a .npy.
STORED_AS: Mapping[str, str] = {
    "bfloat16": "uint16",
    "float32": "float32",
    "float16": "float16",
    "int32": "int32",
    "uint8": "uint8",
}


@dataclass(frozen=True)
class PartInfo:
    """A part of what is stored of each prompt.

    Attributes:
        shape: of one prompt.
        dtype: a key of `STORED_AS`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of one prompt."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class PromptsShard:
    """A file with one part of consecutive rows: its name below the folder, and what it holds."""

    file: str
    part: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PromptsInfo:
    """What the manifest of a set of prompts says.

    Attributes:
        count: rows, the empty prompt's among them.
        text: cached (embeddings) or online (tokens).
        class_name: of the transformer that the parts are for.
        length: tokens that prompts were padded to, which the network sees.
        parts: by name.
        encoders: what made them: hashes of their files.
        shards: the files; those of a part in the order of the rows.
    """

    count: int
    text: Text
    class_name: str
    length: int
    parts: Mapping[str, PartInfo]
    encoders: Mapping[str, object] = field(default_factory=dict)
    shards: tuple[PromptsShard, ...] = ()

    def to_record(self) -> dict[str, object]:
        """The manifest but for its `files`."""
        return {"format": FORMAT, "version": __version__} | asdict(self)

    @classmethod
    def read(cls, root: Path) -> PromptsInfo:
        """Of a folder.

        Raises:
            ValueError: no manifest, one of another format, or one that does not describe a set.
        """
        record = read_manifest(root, FORMAT)
        try:
            known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
            known["parts"] = {
                name: PartInfo(tuple(map(int, part["shape"])), part["dtype"])
                for name, part in record["parts"].items()
            }
            known["shards"] = tuple(
                PromptsShard(s["file"], s["part"], s["rows"], s["bytes"], s["sha256"])
                for s in record["shards"]
            )
            info = cls(**known)
            info.check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(root / 'manifest.json')!r} does not describe a set of prompts ({error}): "
                "make the set again"
            ) from error
        return info

    def check(self) -> None:
        """ValueError for values that contradict each other."""
        if self.text not in get_args(Text) or not self.parts or self.count < 1:
            raise ValueError(f"text {self.text!r}, {len(self.parts)} parts, {self.count} prompts")
        for name, part in self.parts.items():
            rows = sum(shard.rows for shard in self.shards if shard.part == name)
            if part.dtype not in STORED_AS or min(part.shape, default=1) < 1:
                raise ValueError(f"part {name!r} of shape {part.shape}, dtype {part.dtype!r}")
            if rows != self.count:
                raise ValueError(f"{self.count} prompts, {rows} rows of part {name!r}")


class PromptsStore:
    """A set of prompts, mapped and read row by row; safe to read from several threads.

    Args:
        root: folder of the manifest.

    Attributes:
        info: what the manifest says.
        dtypes: of each part as it is given out.

    Raises:
        ValueError: files that are missing, cut off, or other than the manifest says.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.info = root, PromptsInfo.read(root)
        check_sizes(root, read_manifest(root, FORMAT))
        self._check_empty_prompt()
        self.dtypes = {name: getattr(torch, p.dtype) for name, p in self.info.parts.items()}
        self._parts = {name: self._map(name) for name in self.info.parts}

    def _check_empty_prompt(self) -> None:
        """ValueError unless the first row is the empty prompt's, as guidance will ask for it."""
        try:
            with open(self.root / PROMPTS, encoding="utf-8") as lines:
                first = json.loads(lines.readline())
            row, text = first["row"], first["text"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.root / PROMPTS} cannot be read: {error}") from error
        if (row, text) != (EMPTY_ROW, ""):
            raise ValueError(
                f"{self.root / PROMPTS} must begin with the empty prompt as row {EMPTY_ROW}, got "
                f"row {row}, {text!r:.60}: make the set again"
            )

    def _map(self, name: str) -> _MappedPart:
        part = self.info.parts[name]
        shards = [shard for shard in self.info.shards if shard.part == name]
        return _MappedPart([(self.root / shard.file, shard.rows) for shard in shards], part)

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """Copies of the parts of some prompts.

        Args:
            rows: (B,) int64 in [0, count).

        Returns:
            by name, (B, ...) each.

        Raises:
            ValueError: rows of another kind or out of range.
        """
        out = {
            name: torch.empty(len(rows), *part.shape, dtype=self.dtypes[name])
            for name, part in self.info.parts.items()
        }
        self.fill(out, rows)
        return out

    def fill(self, out: Mapping[str, Tensor], rows: Tensor) -> None:
        """As `take`, into given memory: (B, ...) contiguous tensors on the CPU, one for each part.

        Raises:
            ValueError: as `take`; memory of another shape or dtype.
        """
        self._check_rows(rows)
        for name, part in self.info.parts.items():
            given, shape = out.get(name), (len(rows), *part.shape)
            fits = given is not None and tuple(given.shape) == shape and given.is_contiguous()
            if not fits or given.dtype != self.dtypes[name]:
                found = None if given is None else (tuple(given.shape), given.dtype)
                raise ValueError(
                    f"memory of part {name!r} must be contiguous {shape} {self.dtypes[name]}, got "
                    f"{found}"
                )
            self._parts[name].fill(given, rows)

    def willneed(self, rows: Tensor) -> None:
        """Have the system read rows that will be asked for, without waiting for them."""
        self._check_rows(rows)
        for part in self._parts.values():
            part.willneed(rows)

    def identity(self) -> list[bytes]:
        """What tells this set from others, for a fingerprint; not where it lies."""
        record = self.info.to_record()
        record["shards"] = [[s.part, s.rows, s.sha256] for s in self.info.shards]
        return [json.dumps(record, sort_keys=True).encode()]

    def _check_rows(self, rows: Tensor) -> None:
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows must be (B,) int64, got {tuple(rows.shape)} {rows.dtype}")
        count = self.info.count
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise ValueError(
                f"rows must lie in [0, {count}), got {int(rows.min())} to {int(rows.max())}"
            )


class _MappedPart:
    """The shards of one part, mapped for random reading as those of latents are.

    Args:
        files: path and rows of each.
        part: what a row is.

    Raises:
        ValueError: a file that is not as it should be.
    """

    def __init__(self, files: list[tuple[Path, int]], part: PartInfo) -> None:
        import numpy as np

        self._row_bytes = part.bytes
        self._starts = np.cumsum([0, *(rows for _, rows in files[:-1])])
        self._maps: list[mmap.mmap] = []
        self._offsets: list[int] = []
        for file, rows in files:
            array = load_npy(file)
            shape, stored = (rows, *part.shape), STORED_AS[part.dtype]
            if array.shape != shape or array.dtype.name != stored:
                raise ValueError(
                    f"{str(file)!r} must be {shape} {stored}, as the manifest says, got "
                    f"{array.shape} {array.dtype}: copy it again"
                )
            self._offsets.append(array.offset)
            with open(file, "rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)
            self._maps.append(mapped)

    def fill(self, out: Tensor, rows: Tensor) -> None:
        """Copy rows into (B, ...) contiguous memory."""
        import numpy as np

        target = out.view(torch.uint8) if out.dim() == 1 else out.flatten(1).view(torch.uint8)
        for place, (shard, start) in zip(target.numpy(), self._addresses(rows), strict=True):
            place[:] = np.frombuffer(self._maps[shard], np.uint8, self._row_bytes, start)

    def willneed(self, rows: Tensor) -> None:
        """As `PromptsStore.willneed`."""
        for shard, start in self._addresses(rows):
            page = start % mmap.PAGESIZE
            self._maps[shard].madvise(mmap.MADV_WILLNEED, start - page, self._row_bytes + page)

    def _addresses(self, rows: Tensor) -> Iterable[tuple[int, int]]:
        """(shard, byte) of each row."""
        import numpy as np

        row: np.ndarray = rows.numpy()
        shard = np.searchsorted(self._starts, row, side="right") - 1
        local = row - self._starts[shard]
        return [
            (number, self._offsets[number] + inside * self._row_bytes)
            for number, inside in zip(shard.tolist(), local.tolist(), strict=True)
        ]
