"""Weight files, opened once and read safely, written whole or not at all.

A file of ours holds {"model", "ema", "args", "steps"} with float32 CPU tensors, no wrapper prefixes
and no pickled classes, so SiT's, REPA's and RAE's samplers find the `ema` they look for, and
`torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from warnings import warn

import torch
from torch import Tensor

from mixflow_fast.files import replacing
from mixflow_fast.messages import shorten
from mixflow_fast.models.weights.metadata import Metadata, OfficialArgs, Scalar, count
from mixflow_fast.models.weights.naming import rename_legacy_repa
from mixflow_fast.models.weights.safe_unpickling import harmless_globals, plain

_WRAPPERS = ("module.", "_orig_mod.")
_CONTAINER_KEYS = ("ema", "model", "state_dict")
_STEPS_KEYS = ("steps", "train_steps", "step")


@dataclass(frozen=True)
class WeightsFile:
    """A .pt or .safetensors file, opened once.

    Attributes:
        path: the file.
        format: how it is stored.
        entries: top-level entries; tensors on the CPU and mapped from the file.
        header: strings in the header of a .safetensors file.
    """

    path: Path
    format: Literal["safetensors", "torch.save"]
    entries: Mapping[str, object]
    header: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> WeightsFile:
        """Read a file without executing anything in it.

        Pickles go through `weights_only=True` with the names of `safe_unpickling` allowed;
        namespaces and the like become plain dicts.

        Raises:
            ValueError: missing, damaged, foreign or unsafe file, or one that holds no dict.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"weights file not found: {path}: check the path or download the file")
        try:
            if is_safetensors(path):
                from safetensors import safe_open

                with safe_open(path, "pt", device="cpu") as file:
                    # By offset, as `safetensors.torch.load_file` reads; older releases by name.
                    names = getattr(file, "offset_keys", file.keys)
                    entries = {name: file.get_tensor(name) for name in names()}
                    return cls(path, "safetensors", entries, file.metadata() or {})
            with harmless_globals():
                mapped = zipfile.is_zipfile(path)  # only this layout of torch.save can be mapped
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            content = plain(content)
        except Exception as error:  # a broken pickle can raise anything
            raise ValueError(f"cannot read weights from {path}: {_why(path, error)}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} must hold a dict, got {type(content).__name__}")
        return cls(path, "torch.save", content)

    def containers(self) -> dict[str, Mapping[str, object]]:
        """State dicts of a training checkpoint by name; empty for a bare state dict."""
        found = {name: self.entries.get(name) for name in _CONTAINER_KEYS}
        return {name: value for name, value in found.items() if isinstance(value, Mapping)}

    def state(self, key: str = "ema", encoder_depth: int | None = None) -> dict[str, Tensor]:
        """The state dict under `key`, mapped from the file; see `load_weights`."""
        state = self._select(key)
        wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if wrong or not state:
            what = f"not tensors: {shorten(map(str, wrong))}" if wrong else "no entries at all"
            raise ValueError(f"{self.path} must hold a state dict of tensors, got {what}")
        return rename_legacy_repa(_unwrap(state, str(self.path)), encoder_depth, self.path)

    def _select(self, key: str) -> Mapping[str, object]:
        found = self.containers()
        if isinstance(chosen := self.entries.get(key), Mapping):
            return chosen
        if not found:
            return self.entries
        fallback = [name for name in found if name != "ema"]
        if key != "ema" or not fallback:
            raise ValueError(
                f"{self.path} has no weights under {key!r}, got {list(found)}: choose one of these"
            )
        warn(f"{self.path} has no 'ema' weights: took {fallback[0]!r}", stacklevel=4)
        return found[fallback[0]]

    @property
    def args(self) -> Mapping[str, object]:
        """What the file records of its making: its header, or else its entry `args`."""
        args = self.header or self.entries.get("args")
        return args if isinstance(args, Mapping) else {}

    @property
    def metadata(self) -> Metadata | None:
        """The record of a file that this engine wrote; None for others.

        Raises:
            ValueError: the record is damaged.
        """
        if not Metadata.is_in(self.args):
            return None
        return Metadata.from_record(self.args, self.path).at(self.steps)

    def model_config(self) -> dict[str, object]:
        """Arguments, clock and prediction of the network; empty where the file does not say it."""
        metadata = self.metadata
        return {} if metadata is None else metadata.model_config()

    @property
    def official(self) -> OfficialArgs:
        """Settings of an official training checkpoint; the defaults where it records none."""
        args = self.entries.get("args")
        return OfficialArgs.from_args(args if isinstance(args, Mapping) else {})

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps under any of its official names; None where not recorded."""
        return self.number(*_STEPS_KEYS)

    def number(self, *names: str) -> int | None:
        """Value of the first of the named entries that is a whole number; None if there is none."""
        found = (count(self.entries.get(name, self.header.get(name))) for name in names)
        return next((value for value in found if value is not None), None)


def load_weights(
    path: str | os.PathLike[str], key: str = "ema", encoder_depth: int | None = None
) -> dict[str, Tensor]:
    """Read one state dict from an official .pt or .safetensors file, on the CPU.

    Nothing in the file is executed: see `WeightsFile.open`.

    Args:
        path: a training checkpoint (`model`, `ema`, ...) or a bare state dict.
        key: which weights of a training checkpoint to take. If "ema" is not there, `model` or
            `state_dict` is taken with a warning; any other missing key is an error. A bare state
            dict is returned whatever the key.
        encoder_depth: block number at which the legacy REPA names `decoder_blocks.{j}` start;
            None counts the `blocks` in the file.

    Returns:
        name -> tensor in storage dtype, without `module.` and `_orig_mod.` prefixes.

    Raises:
        ValueError: missing, unreadable or unsafe file; no weights in it.
    """
    state = WeightsFile.open(path).state(key, encoder_depth)
    # The clone detaches the tensors from the mapped file and from storages larger than they are.
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def is_safetensors(path: Path) -> bool:
    """Whether a file is in the safetensors format, by its name or its first bytes."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        head = file.read(9)
    # A length that fits in the file, then a JSON object.
    return len(head) == 9 and head[8:] == b"{" and 0 < int.from_bytes(head[:8], "little") < 2**32


def _why(path: Path, error: Exception) -> str:
    """One line: what kind of file this is instead, or the reader's own words; what to do."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip()
    if not head:
        return "the file is empty: download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if head[:1] == b"<":
        return "it is a web page, not weights: the download was answered with HTML, repeat it"
    text = str(error).strip()
    for mark in ("Unsupported global: GLOBAL ", "unsupported GLOBAL "):
        if mark in text:
            name = text.split(mark, 1)[1].split()[0]
            return (
                f"it holds {name}, which is not safe to load: an unknown file with such content "
                "can run programs. If it is your own, re-save its weights alone where they were "
                'made: torch.save({"ema": ema.state_dict()}, PATH)'
            )
    first = (text.splitlines() or [""])[0][:200]
    return (
        f"{type(error).__name__}: {first}: the file is damaged, not a weights file, or holds "
        "classes that are not safe to load; download it again, or re-save its state dict alone "
        "with torch.save"
    )


def _unwrap(state: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = str(name)
        # DDP around torch.compile, or the other way round.
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name in out:
            raise ValueError(f"{owner} holds {name} twice, with and without a wrapper prefix")
        out[name] = tensor
    return out


def portable(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Contiguous float32 copies on the CPU (integers as they are), without wrapper prefixes.

    Raises:
        ValueError: a tensor without values, or the same name twice.
    """
    out = {}
    for name, tensor in _unwrap(state, what).items():
        if tensor.is_meta:
            raise ValueError(f"{what} holds {name} on the meta device, without values: load it")
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # A copy even where nothing changes: torch.save would write the whole storage of a view.
        copy = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        out[name] = copy
    return out


def save_weights(
    path: str | os.PathLike[str],
    model_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor],
    metadata: Mapping[str, Scalar],
) -> None:
    """Write {"model", "ema", "args", "steps"} so that an interruption leaves the old file or none.

    The file is written beside `path`, flushed to the disk and renamed over it.

    Args:
        path: the .pt file; its folder is created.
        model_state, ema_state: full state dicts of the same names and shapes; stored as contiguous
            float32 on the CPU (integers as they are) without wrapper prefixes.
        metadata: str, int, float, bool or None by name, stored under `args`; its "steps" (default
            0) is stored under `steps`.

    Raises:
        ValueError: states that differ in names or shapes, meta tensors, metadata of other types.
    """
    args = dict(metadata)
    steps = args.pop("steps", 0)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f'metadata["steps"] must be an int >= 0, got {steps!r}')
    for name, value in args.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | bool | None):
            raise ValueError(
                f"metadata must map str to str, int, float, bool or None, got {name!r}: "
                f"{type(value).__name__}: turn it into a string, for instance as JSON"
            )
    model, ema = portable(model_state, "model_state"), portable(ema_state, "ema_state")
    odd = [n for n in model.keys() | ema.keys() if n not in model or n not in ema]
    odd += [n for n in model.keys() & ema.keys() if model[n].shape != ema[n].shape]
    if odd or not model:
        what = f"a difference in {shorten(sorted(odd))}" if odd else "no tensors"
        raise ValueError(
            f"model_state and ema_state must hold the same names and shapes, got {what}: pass two "
            "full state dicts of one model"
        )
    write_pt(path, {"model": model, "ema": ema, "args": args, "steps": steps})


def write_pt(path: str | os.PathLike[str], content: Mapping[str, object]) -> None:
    """`torch.save` through `replacing`."""
    with replacing(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)


def write_safetensors(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """A .safetensors file with the metadata in its header, through `replacing`."""
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file(dict(state), partial, metadata=dict(metadata))


def first_damaged(path: str | os.PathLike[str]) -> str | None:
    """The first member of a zip-layout .pt file whose checksum is wrong; None if there is none.

    `torch.load` does not look at the checksums. Reads the whole file.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"{type(error).__name__}: {error}"


def tensors_in(value: object) -> Iterable[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; one pass over memory unless the sum overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
