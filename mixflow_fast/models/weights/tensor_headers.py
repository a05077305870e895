"""Names, shapes and dtypes of the tensors in a weights file, without reading a value.

A .safetensors file begins with a length and a JSON object, which is read alone: 16 GB take
milliseconds. Files of torch.save are mapped, and their tensors' pages are left where they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mixflow_fast.models.weights import places
from mixflow_fast.models.weights.files import WeightsFile, is_safetensors

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class TensorHeaders:
    """What a file says of its tensors.

    Attributes:
        path: the file; of weights in several parts their index.
        parts: the files that hold them.
        format: how they are stored.
        shapes, dtypes: by name, dtypes in torch's words.
        place: the entry of a training checkpoint that they stand under; "" for a bare state dict.
        header: strings beside the tensors: a .safetensors file's, or the record of our own.
        steps: optimizer steps; None where the file does not say them.
        damaged: what shows that a file is not whole; "" where nothing does.
    """

    path: Path
    parts: tuple[Path, ...]
    format: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    place: str = ""
    header: Mapping[str, str] = field(default_factory=dict)
    steps: int | None = None
    damaged: str = ""

    @property
    def size_bytes(self) -> int:
        """Size of all parts."""
        return sum(part.stat().st_size for part in self.parts)


def read_headers(path: str | os.PathLike[str], key: str = "ema") -> TensorHeaders:
    """Names, shapes and dtypes in a file, or in the weights of a folder (see `places`).

    Args:
        path: a .safetensors file, one of torch.save, or a folder of a run, a transformer or a
            pipeline.
        key: "ema" or "model", of a training checkpoint.

    Raises:
        ValueError: as `WeightsFile.open`.
    """
    found = places.weights_file(path)
    parts = tuple(places.parts(found))
    if all(is_safetensors(part) for part in parts):
        return _of_safetensors(found, parts)
    file = WeightsFile.open(found)
    chosen = file.choose(key)
    state = file.tensors(chosen)
    return TensorHeaders(
        path=file.path,
        parts=file.parts,
        format=file.format,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in state.items()},
        place=chosen.place,
        header={str(n): str(v) for n, v in file.args.items() if isinstance(v, str | int | float)},
        steps=file.steps,
    )


def _of_safetensors(path: Path, parts: tuple[Path, ...]) -> TensorHeaders:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    header: dict[str, str] = {}
    damaged = ""
    for part in parts:
        with open(part, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length)
        try:
            entries = json.loads(text)
            header |= entries.pop("__metadata__", None) or {}
            shapes |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
            dtypes |= {n: _DTYPES.get(e["dtype"], e["dtype"]) for n, e in entries.items()}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{part} begins as a .safetensors file and its list of tensors cannot be read "
                f"({error}): download it again"
            ) from None
        expected, there = 8 + length + end, part.stat().st_size
        if there != expected:
            damaged = f"{part.name} has {there:,} bytes and should have {expected:,}"
    steps = header.get("steps", "")
    return TensorHeaders(
        path=path,
        parts=parts,
        format="safetensors",
        shapes=shapes,
        dtypes=dtypes,
        header=header,
        steps=int(steps) if steps.isdigit() else None,
        damaged=damaged,
    )
