"""Weight files, opened once and read safely, written whole or not at all.

A file of ours holds {"model", "ema", "args", "steps"}, and "source" and "source_ema" where the
noise end of its training was a mixed source, with float32 CPU tensors, no wrapper prefixes
and no pickled classes, so SiT's, REPA's and RAE's samplers find the `ema` they look for, and
`torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import json
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
from mixflow_fast.models.weights import places
from mixflow_fast.models.weights.damage import describe_not_finite, first_damaged, wrong_checksums
from mixflow_fast.models.weights.diffusers_dit import (
    from_diffusers,
    is_diffusers_dit,
    read_record,
)
from mixflow_fast.models.weights.foreign import ZERO_SHARD, entries_that_are, unreadable
from mixflow_fast.models.weights.metadata import Metadata, OfficialArgs, Scalar, count
from mixflow_fast.models.weights.naming import rename_legacy_repa
from mixflow_fast.models.weights.safe_unpickling import harmless_globals, plain
from mixflow_fast.models.weights.source_record import split
from mixflow_fast.models.weights.state_dicts import (
    StateDict,
    choose,
    find_state_dicts,
    unwrapped,
)

Format = Literal["safetensors", "torch.save"]
_STEPS_KEYS = ("steps", "train_steps", "step", "global_step", "global_steps")


@dataclass(frozen=True)
class WeightsFile:
    """A .pt or .safetensors file, opened once.

    Attributes:
        path: the file; of weights in several parts their index.
        parts: the files that were read.
        format: how it is stored.
        entries: top-level entries; tensors on the CPU and mapped from the file.
        header: strings in the header of a .safetensors file.
    """

    path: Path
    parts: tuple[Path, ...]
    format: Format
    entries: Mapping[str, object]
    header: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> WeightsFile:
        """Read a file, or the weights in a folder (see `places`), without executing anything in it.

        What counts is the content and not the name. Pickles go through `weights_only=True` with the
        names of `safe_unpickling` allowed; namespaces and the like become plain dicts.

        Raises:
            ValueError: missing, damaged, foreign or unsafe file, or one that holds no dict.
        """
        path = places.weights_file(path)
        files = places.parts(path)
        entries: dict[str, object] = {}
        header: dict[str, str] = {}
        form: Format = "torch.save"
        for file in files:
            form, content, metadata = _read(file)
            entries, header = {**entries, **content}, header | metadata
        if is_diffusers_dit(entries) and (record := read_record(path.parent)):
            entries, header = _read_back(path, entries, record)
        return cls(path, tuple(files), form, entries, header)

    @property
    def size_bytes(self) -> int:
        """Size of all parts."""
        return sum(file.stat().st_size for file in self.parts)

    def state_dicts(self) -> list[StateDict]:
        """State dicts of a training checkpoint; empty for a bare state dict."""
        return find_state_dicts(self.entries)

    def choose(self, key: str = "ema") -> StateDict:
        """The state dict under `key`; see `load_weights`."""
        found = self.state_dicts()
        if not found:
            return StateDict("", self.entries)
        chosen, note = choose(found, key, self.path)
        if note:
            warn(note, stacklevel=4)
        return chosen

    def state(self, key: str = "ema", encoder_depth: int | None = None) -> dict[str, Tensor]:
        """The state dict under `key`, mapped from the file and not checked; see `load_weights`."""
        return self.tensors(self.choose(key), encoder_depth)

    def tensors(self, chosen: StateDict, encoder_depth: int | None = None) -> dict[str, Tensor]:
        """A state dict of the file by official names.

        Raises:
            ValueError: not all of its values are tensors, or they are without numbers.
        """
        values = chosen.values(str(self.path))
        state = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if len(state) < len(values) or not state:
            if (what := entries_that_are(chosen.raw)) is not None:
                raise ValueError(f"{self.path} is {what}")
            wrong = shorten(name for name in values if name not in state)
            what = f"not tensors: {wrong}" if wrong else "no entries at all"
            raise ValueError(f"{self.path} must hold a state dict of tensors, got {what}")
        if not any(tensor.numel() for tensor in state.values()):
            raise ValueError(f"{self.path} has names without values: it is {ZERO_SHARD}")
        return rename_legacy_repa(state, encoder_depth, self.path)

    def check_values(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Refuse weights that are not what was written, or that no network can compute with.

        Args:
            key: as `state` was asked for.
            state: what it gave; reads all of it, once.

        Raises:
            ValueError: a wrong checksum, or values that are not finite; it names the tensor and
                says whether the file's other weights are whole.
        """
        under = f" (under {key!r})" if self.state_dicts() else ""
        problem = self._problem(state, under)
        if not problem:
            return
        found = [state for state in self.state_dicts() if state.is_readable]
        others = [state for state in found if state.is_ema != (key == "ema")]
        other = "model" if key == "ema" else "ema"
        ways = "choose another checkpoint"
        if others and not self._problem(self.tensors(others[0])):
            ways = (
                f"its {other!r} weights are whole: take them with --weights {other} (for "
                f"train.init, write them first: mixflow-fast export {self.path} --weights {other} "
                "--to official --out FILE.pt), or choose another checkpoint"
            )
        raise ValueError(f"{self.path}: {problem}: {ways}")

    def _problem(self, state: Mapping[str, Tensor], under: str = "") -> str:
        if bad := wrong_checksums(self.parts, state):
            more = f", nor are {len(bad) - 1} more of {len(state)} tensors" * (len(bad) > 1)
            return f"{bad[0]}{under} is not what was written (wrong checksum){more}"
        return describe_not_finite(state, under)

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
        path: a training checkpoint (`model`, `ema`, ...), a bare state dict, a folder with one.
        key: which weights of a training checkpoint to take: "ema", "model", or a key of the file.
            If "ema" is not there, what is there is taken with a warning; any other missing key is
            an error. A bare state dict is returned whatever the key.
        encoder_depth: block number at which the legacy REPA names `decoder_blocks.{j}` start;
            None counts the `blocks` in the file.

    Returns:
        name -> tensor in storage dtype, without what `module.`, `_orig_mod.` and the like put into
        names, and, of a network that is known, without a prefix that all its names have.

    Raises:
        ValueError: missing, unreadable, damaged or unsafe file; no weights in it; values that are
            not finite.
    """
    file = WeightsFile.open(path)
    state = file.state(key, encoder_depth)
    file.check_values(key, state)
    # The clone detaches the tensors from the mapped file and from storages larger than they are.
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _read_back(
    path: Path, entries: Mapping[str, Tensor], record: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Official names and the record of the network of `export --to diffusers`."""
    try:
        kwargs = {**record["kwargs"], "z_dims": None}  # REPA's projectors are not exported
        state = from_diffusers(entries, kwargs)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is an export to diffusers that cannot be read back ({error}): give "
            f"{record.get('source')}, which it was written from"
        ) from None
    warn(
        f"{path}: read back from diffusers' layout: the same function to rounding; "
        "t_embedder.mlp.0.weight is in another basis than it was",
        stacklevel=3,
    )
    return state, {n: str(v) for n, v in record.items()} | {"kwargs": json.dumps(kwargs)}


def _read(path: Path) -> tuple[Format, Mapping[str, object], Mapping[str, str]]:
    """Format, top-level entries and header of a file."""
    try:
        if is_safetensors(path):
            from safetensors import safe_open

            with safe_open(path, "pt", device="cpu") as file:
                # By offset, as `safetensors.torch.load_file` reads; older releases by name.
                names = getattr(file, "offset_keys", file.keys)
                entries = {name: file.get_tensor(name) for name in names()}
                return "safetensors", entries, file.metadata() or {}
        mapped = zipfile.is_zipfile(path)  # only this layout of torch.save can be mapped
        if mapped and (member := first_damaged(path, tensors=False)) is not None:
            raise ValueError(f"{member} in it has a wrong checksum")
        content = plain(_unpickled(path, mapped))
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"cannot read weights from {path}: {unreadable(path, error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} must hold a dict, got {type(content).__name__}: save a network's state dict"
        )
    return "torch.save", content, {}


def _unpickled(path: Path, mapped: bool) -> object:
    with harmless_globals():
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        # torch goes by the name alone and would not read it as what it is; it maps no open file.
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def is_safetensors(path: Path) -> bool:
    """Whether a file is in the safetensors format, by its first bytes whatever its name."""
    with open(path, "rb") as file:
        head = file.read(9)
    # A length that fits in the file, then a JSON object.
    return len(head) == 9 and head[8:] == b"{" and 0 < int.from_bytes(head[:8], "little") < 2**32


def portable(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Contiguous float32 copies on the CPU (integers as they are), without wrapper prefixes.

    Raises:
        ValueError: a tensor without values, or the same name twice.
    """
    out = {}
    for name, tensor in unwrapped(state, what).items():
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

    A mixed source, whose names begin with `source.`, goes under "source" and "source_ema", so that
    the others hold official names alone. The file is written beside `path`, flushed to the disk and
    renamed over it.

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
    (model, source), (ema, source_ema) = split(model), split(ema)
    beside = {"source": source, "source_ema": source_ema} if source else {}
    write_pt(path, {"model": model, "ema": ema, **beside, "args": args, "steps": steps})


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
