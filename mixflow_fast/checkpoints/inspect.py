"""What is in a checkpoint: whose it is, which network, and whether the weights fit it.

`inspect_file` reads without executing anything in the file and returns an `Inspection`;
`cli.inspect.as_text` words it for people, `as_json` for programs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mixflow_fast.models import build
from mixflow_fast.models.registry import describe_model
from mixflow_fast.models.weights.damage import first_damaged, is_finite, not_finite
from mixflow_fast.models.weights.files import WeightsFile, tensors_in
from mixflow_fast.models.weights.foreign import describe_unknown
from mixflow_fast.models.weights.loading import (
    NetworkSpec,
    compare,
    on_meta,
    spec_of_any_heads,
)
from mixflow_fast.models.weights.naming import ClassName, depth, kind_of
from mixflow_fast.models.weights.source_record import PREFIX
from mixflow_fast.models.weights.sources import record_of, source_state
from mixflow_fast.models.weights.state_dicts import StateDict

_OPTIMIZERS = ("opt", "optimizer")
# What RAE's first release records beside `args`.
_FURTHER_SETTINGS = ("training_cfg", "cli_overrides", "config_path")
Json = str | int | float | bool | list["Json"] | dict[str, "Json"] | None


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """An optimizer's state among the top-level entries of a file."""

    name: str
    kind: Literal["optimizer"] = "optimizer"
    parameters: int
    used: bool = False


@dataclass(frozen=True, kw_only=True)
class StateDictRow:
    """A state dict among the top-level entries of a file."""

    name: str
    kind: Literal["state dict"] = "state dict"
    tensors: int
    values: int
    dtypes: list[str]


@dataclass(frozen=True, kw_only=True)
class SettingsRow:
    """A dict without tensors among the top-level entries of a file."""

    name: str
    kind: Literal["settings"] = "settings"
    entries: int


@dataclass(frozen=True, kw_only=True)
class ValueRow:
    """A single value among the top-level entries of a file."""

    name: str
    kind: Literal["value"] = "value"
    value: Json


Row = OptimizerRow | StateDictRow | SettingsRow | ValueRow


@dataclass(kw_only=True)
class Inspection:
    """The findings; names of tensors are without wrapper prefixes, legacy names renamed.

    Attributes:
        path, size_bytes, format, layout: the file.
        contents: one row per top-level entry.
        weights: the container that was looked at ("" for a bare state dict).
        kind: "SiT", "REPA SiT", "DiT-DH", "SongUNet" or "unknown".
        model: a description of the network.
        class_name, kwargs: what builds it.
        clock_from: what the clock is known from.
        misshaped: name -> [shape in the file, shape expected].
        source: the mixed source beside the network, in words; None where there is none.
        non_finite: container and name.
    """

    path: str
    size_bytes: int
    format: str
    layout: str
    contents: list[Row]
    weights: str
    kind: str = "unknown"
    model: str = "unknown"
    class_name: ClassName | None = None
    kwargs: Mapping[str, object] = field(default_factory=dict)
    tokens: int | None = None
    clock: str | None = None
    clock_from: str | None = None
    prediction: str | None = None
    source: str | None = None
    parameters: int = 0
    trainable: int | None = None
    dtypes: list[str] = field(default_factory=list)
    steps: int | None = None
    epoch: int | None = None
    args: dict[str, Json] = field(default_factory=dict)
    against: str | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    non_finite: list[str] = field(default_factory=list)
    damaged: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Known network, every name and shape, finite values, right checksums."""
        wrong = (self.missing, self.unexpected, self.misshaped, self.non_finite, self.damaged)
        return self.against is not None and not any(wrong)


def inspect_file(
    path: str | os.PathLike[str], key: str = "ema", against: str | None = None
) -> Inspection:
    """Read a checkpoint and compare it with the network it seems to belong to.

    Args:
        path: a .pt or .safetensors file, or a run folder.
        key: "ema" or "model".
        against: a name that `models.build` knows; None: the network that the shapes tell.

    Raises:
        ValueError: the file cannot be read, holds no weights, or `against` is unknown.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = WeightsFile.open(path)
        chosen = file.choose(key)
        state = file.tensors(chosen)
    held = file.state_dicts() or [chosen]
    # Of a bare file each entry is a tensor: all of them are one row.
    entries = file.entries if held[0].place else {"": file.entries}
    found = Inspection(
        path=str(file.path),
        size_bytes=file.size_bytes,
        format=file.format,
        layout=_layout(file, held),
        contents=[_row(name, value) for name, value in entries.items()],
        weights=chosen.place,
        args=_recorded_settings(file),
        parameters=sum(tensor.numel() for tensor in state.values()),
        dtypes=_dtypes(state.values()),
        steps=file.steps,
        epoch=file.number("epoch"),
        non_finite=_non_finite(held, str(file.path)),
        damaged=next(filter(None, map(first_damaged, file.parts)), None),
        notes=[str(warning.message) for warning in caught],
    )
    if any(str(name).startswith("decoder_blocks.") for name in chosen.values(found.path)):
        found.notes.append("legacy REPA names decoder_blocks.* were read as blocks.*")
    _find_network(found, file, state)
    _compare_with(found, state, against)
    _find_source(found, file, key)
    _add_notes(found, file.entries)
    return found


def _non_finite(held: Iterable[StateDict], path: str) -> list[str]:
    return [
        f"{found.name}: {name}" if found.name else name
        for found in held
        for name, tensor in found.values(path).items()
        if isinstance(tensor, Tensor) and not is_finite(tensor)
    ]


def _layout(file: WeightsFile, held: Sequence[StateDict]) -> str:
    names = set(file.entries)
    if "timestep" in file.header:
        return "mixflow-fast export, a folder of diffusers"
    if "kwargs" in file.header:
        return "mixflow-fast export"
    if not held[0].place:
        return "bare state dict" if len(file.parts) == 1 else "state dict in parts"
    args = file.entries.get("args")
    if isinstance(args, dict) and str(args.get("model", "")).startswith("{"):
        return "mixflow-fast weights"
    # REPA's before SiT's, all of whose entries it has.
    for needed, name in (
        ({"training_cfg", "train_steps"}, "RAE training checkpoint (first release)"),
        ({"optimizer", "epoch"}, "RAE training checkpoint"),
        ({"opt", "args", "steps"}, "REPA training checkpoint"),
        ({"opt", "args"}, "SiT training checkpoint"),
    ):
        if needed <= names:
            return name
    return "state dicts by name"


def _row(name: str, value: object) -> Row:
    """One top-level entry of the file."""
    if name in _OPTIMIZERS and isinstance(value, Mapping):
        states = value.get("state")
        count = len(states) if isinstance(states, Mapping) else 0
        return OptimizerRow(name=name, parameters=count)
    tensors = list(tensors_in(value))
    if tensors and isinstance(value, Mapping):
        return StateDictRow(
            name=name,
            tensors=len(tensors),
            values=sum(tensor.numel() for tensor in tensors),
            dtypes=_dtypes(tensors),
        )
    if isinstance(value, Mapping):
        return SettingsRow(name=name, entries=len(value))
    return ValueRow(name=name, value=_jsonable(value))


def _dtypes(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def _recorded_settings(file: WeightsFile) -> dict[str, Json]:
    settings = {str(name): _jsonable(value) for name, value in file.args.items()}
    for name in _FURTHER_SETTINGS:
        value = file.entries.get(name)
        if not isinstance(value, Tensor) and value:
            settings[name] = _jsonable(value)
    return settings


def _find_network(found: Inspection, file: WeightsFile, state: dict[str, Tensor]) -> None:
    recorded = file.metadata  # a damaged record is an error, an unknown network a note
    found.kind = kind_of(state) or "unknown"
    if found.kind == "unknown":
        found.notes.append(describe_unknown(file.path, state))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            spec = _spec(found, file, state)
            model = spec.on_meta()
        except ValueError as error:
            found.notes.append(f"no network can be built for these shapes: {error}")
            return
    found.class_name, found.kwargs = spec.class_name, spec.kwargs
    found.notes += [str(warning.message) for warning in caught]
    found.clock = model.clock
    found.clock_from = "implied by the class"
    if recorded is not None and recorded.clock:
        found.clock_from = "recorded in the file"
    found.prediction = spec.prediction
    found.tokens = model.tokens
    found.model = describe_model(spec.class_name, spec.kwargs)
    found.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if found.kind == "SiT" and not model.learn_sigma and not spec.clock:
        found.notes.append(
            "a SiT without sigma channels and projectors may be REPA's, whose clock is noise_at_1: "
            "`sample` and `export` take --clock"
        )


def _find_source(found: Inspection, file: WeightsFile, key: str) -> None:
    record = record_of(file)
    if record is None:
        return
    weight = f"beta {record.beta:g}" if record.lam is None else f"lambda {record.lam:g}"
    found.source = f"{record.describe()}, {weight}"
    state, own = source_state(file, key), record.build_predictor("meta").state_dict()
    missing, unexpected, shapes = compare(state, own)
    found.missing += [PREFIX + name for name in missing]
    found.unexpected += [PREFIX + name for name in unexpected]
    found.misshaped |= {PREFIX + name: list(pair) for name, pair in shapes.items()}
    found.non_finite += [PREFIX + name for name in not_finite(state)]


def _spec(found: Inspection, file: WeightsFile, state: dict[str, Tensor]) -> NetworkSpec:
    """The network, with heads of one where their number cannot be read and does not matter here."""
    projected = None
    if found.kind == "REPA SiT" and file.official.encoder_depth is None:
        projected = min(8, depth(state))  # REPA's default, where the network is deep enough
    spec = spec_of_any_heads(file, state, projected)
    if spec.kwargs.get("num_heads", 1) is not None:
        return spec
    found.notes.append(
        "the number of heads cannot be read from these shapes: load_model needs num_heads=; names "
        "and shapes do not depend on it"
    )
    one = [1, 1] if found.kind == "DiT-DH" else 1
    return replace(spec, kwargs={**spec.kwargs, "num_heads": one})


def _compare_with(found: Inspection, state: dict[str, Tensor], against: str | None) -> None:
    if against is not None:
        own = found.kwargs
        # "SiT-XL/2", "DiTDH-S" and "SongUNet-64" begin with their classes.
        other = against.partition("-")[0]
        names = ("input_size", "in_channels", "num_classes", "class_dropout_prob", "learn_sigma")
        names += ("z_dims", "projector_dim", "encoder_depth", "qk_norm")
        if other == "SongUNet":
            names = ("in_channels", "out_channels", "activate_w_mode")
        # What the name of a published size leaves open is taken from the file.
        same = {n: own[n] for n in names if n in own} if other == found.class_name else {}
        with torch.device("meta"):
            model = build(against, **same)
        found.against = against
    elif found.class_name is not None:
        model = on_meta(found.class_name, found.kwargs)
        found.against = found.model
    else:
        return
    found.missing, found.unexpected, shapes = compare(state, model.state_dict())
    found.misshaped = {name: list(pair) for name, pair in shapes.items()}


def _add_notes(found: Inspection, entries: Mapping[str, object]) -> None:
    """Notes about what is in the file and not used, and what is not in it."""
    for row in found.contents:
        if not isinstance(row, OptimizerRow):
            continue
        note = f"{row.name!r} (optimizer state) is not read by mixflow-fast"
        if found.class_name is not None:
            parameters = list(on_meta(found.class_name, found.kwargs).parameters())
            frozen = sum(not p.requires_grad for p in parameters)
            if found.class_name == "DiTDH" and frozen and row.parameters == len(parameters):
                note += (
                    f"; it holds {frozen} parameters more than are trainable here: RAE's main "
                    "branch trains pos_embed and t_embedder.W too (train_embeddings=True)"
                )
        found.notes.append(note)
    if "scheduler" in entries:
        found.notes.append("'scheduler' is not read by mixflow-fast")
    if found.damaged:
        found.notes.append("the file is not what was written: copy or download it again")


def _jsonable(value: object) -> Json:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)[:200]


def as_json(found: Inspection) -> dict[str, Json]:
    """The findings as JSON-able values, `fits` among them."""
    return {"fits": found.fits} | asdict(found)
