"""What is in a checkpoint: whose it is, which network, and whether the weights fit it.

`inspect_file` reads without executing anything in the file and returns an `Inspection`;
`inspection_text.as_text` words it for people, `as_json` for programs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixflow_fast.checkpoints.run_folder import weights_file
from mixflow_fast.models import DITDH_SIZES, SIT_SIZES, build, infer_kwargs
from mixflow_fast.models.weights.files import (
    first_damaged,
    is_finite,
    is_safetensors,
    read_content,
    read_metadata,
    state_of,
    tensors_in,
    weights_keys,
)
from mixflow_fast.models.weights.loading import compare, official_settings, on_meta, recorded_config
from mixflow_fast.models.weights.naming import depth, kind_of

_OPTIMIZERS = ("opt", "optimizer")


@dataclass(kw_only=True)
class Inspection:
    """The findings; names of tensors are without wrapper prefixes, legacy names renamed.

    path, size_bytes, format, layout: the file. contents: one row per top-level entry. weights: the
    container that was looked at ("" for a bare state dict). kind: "SiT", "REPA SiT", "DiT-DH" or
    "unknown". model: its name in words. class_name, kwargs: what builds it. clock_from: who says
    so. misshaped: name -> [shape in the file, shape expected]. non_finite: container and name.
    """

    path: str
    size_bytes: int
    format: str
    layout: str
    contents: list[dict[str, Any]]
    weights: str
    kind: str = "unknown"
    model: str = "unknown"
    class_name: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    clock: str | None = None
    clock_from: str | None = None
    prediction: str | None = None
    parameters: int = 0
    trainable: int | None = None
    dtypes: list[str] = field(default_factory=list)
    steps: int | None = None
    epoch: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
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
    """Read a checkpoint and hold it against the network it seems to belong to.

    Args:
        path: a .pt or .safetensors file, or a run folder.
        key: "ema" or "model".
        against: a name that `models.build` knows; None: the network that the shapes tell.

    Raises:
        ValueError: the file cannot be read, holds no weights, or `against` is unknown.
    """
    path = weights_file(path)
    content, metadata = read_content(path), read_metadata(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = state_of(content, key, path)
    containers = {name: content[name] for name in weights_keys(content)} or {"": content}
    found = Inspection(
        path=str(path),
        size_bytes=path.stat().st_size,
        format="safetensors" if is_safetensors(path) else "torch.save",
        layout=_layout(content, metadata),
        contents=[_row(name, value) for name, value in content.items()] if "" not in containers
        else [_row("", content)],
        weights=next((name for name, held in containers.items() if _holds(held, state)), ""),
        args=_jsonable(_args(content, metadata)),
        parameters=sum(tensor.numel() for tensor in state.values()),
        dtypes=_dtypes(state.values()),
        damaged=first_damaged(path),
        notes=[str(warning.message) for warning in caught],
    )  # fmt: skip
    for name in ("training_cfg", "cli_overrides", "config_path"):
        if content.get(name) and not isinstance(content[name], Tensor):
            found.args[name] = _jsonable(content[name])
    found.steps = _number(content, metadata, "steps", "train_steps", "step")
    found.epoch = _number(content, metadata, "epoch")
    found.non_finite = [
        f"{container}: {name}" if container else name
        for container, held in containers.items()
        for name, tensor in held.items()
        if isinstance(tensor, Tensor) and not is_finite(tensor)
    ]
    if any("decoder_blocks." in name for held in containers.values() for name in held):
        found.notes.append("legacy REPA names decoder_blocks.* were read as blocks.*")
    _find_network(found, state, recorded_config(_args(content, metadata), path), content)
    _compare_with(found, state, against)
    _add_notes(found, content)
    return found


def _holds(container: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    first = next(iter(state.values()))
    return any(tensor is first for tensor in container.values())


def _layout(content: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    names = set(content)
    if "kwargs" in metadata:
        return "mixflow-fast export"
    if not weights_keys(content):
        return "bare state dict"
    args = content.get("args")
    if isinstance(args, dict) and str(args.get("model", "")).startswith("{"):
        return "mixflow-fast weights"
    for needed, name in (
        ({"training_cfg", "train_steps"}, "RAE training checkpoint (first release)"),
        ({"optimizer", "epoch"}, "RAE training checkpoint"),
        ({"opt", "args", "steps"}, "REPA training checkpoint"),
        ({"opt", "args"}, "SiT training checkpoint"),
    ):
        if needed <= names:
            return name
    return "state dicts by name"


def _row(name: str, value: Any) -> dict[str, Any]:
    """One top-level entry of the file."""
    row: dict[str, Any] = {"name": name}
    if name in _OPTIMIZERS and isinstance(value, Mapping):
        states = value.get("state")
        count = len(states) if isinstance(states, Mapping) else 0
        return row | {"kind": "optimizer", "parameters": count, "used": False}
    tensors = list(tensors_in(value))
    if tensors and isinstance(value, Mapping):
        return row | {
            "kind": "state dict",
            "tensors": len(tensors),
            "values": sum(tensor.numel() for tensor in tensors),
            "dtypes": _dtypes(tensors),
        }
    if isinstance(value, Mapping):
        return row | {"kind": "settings", "entries": len(value)}
    return row | {"kind": "value", "value": _jsonable(value)}


def _dtypes(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def _number(content: Mapping[str, Any], metadata: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        value = content.get(name, metadata.get(name))
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and value.isdigit():
            return int(value)
    return None


def _args(content: Mapping[str, Any], metadata: Mapping[str, str]) -> Mapping[str, Any]:
    args = metadata or content.get("args")
    return args if isinstance(args, Mapping) else {}


def _find_network(
    found: Inspection, state: dict[str, Tensor], recorded: dict[str, Any], content: Any
) -> None:
    found.kind = kind_of(state) or "unknown"
    if found.kind == "unknown":
        found.notes.append("the names are those of no network that this engine knows")
        return
    said = official_settings(content)
    prediction = recorded.pop("prediction", said.get("prediction", "velocity"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if recorded:
                class_name = "DiTDH" if found.kind == "DiT-DH" else "SiT"
                kwargs = {name: value for name, value in recorded.items() if name != "clock"}
            else:
                class_name, kwargs = _infer(found, state, said.get("encoder_depth"))
            model = on_meta(class_name, kwargs)
        except ValueError as error:
            found.notes.append(f"no network can be built for these shapes: {error}")
            return
    found.class_name, found.kwargs = class_name, kwargs
    found.notes += [str(warning.message) for warning in caught]
    found.clock = recorded.get("clock") or model.clock
    found.clock_from = "recorded in the file" if recorded.get("clock") else "implied by the class"
    found.prediction = prediction
    found.tokens = (model.input_size // model.patch_size) ** 2
    found.model = model_name(found.class_name, found.kwargs)
    found.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if found.kind == "SiT" and not model.learn_sigma and not recorded.get("clock"):
        found.notes.append(
            "a SiT without sigma channels and projectors may be REPA's, whose clock is noise_at_1: "
            "`sample` and `export` take --clock"
        )


def _infer(
    found: Inspection, state: dict[str, Tensor], projected: int | None
) -> tuple[str, dict[str, Any]]:
    if found.kind != "REPA SiT":
        projected = None
    elif projected is None:  # REPA's default, 8, where the network is deep enough
        projected = min(8, depth(state))
    try:
        return infer_kwargs(state, encoder_depth=projected)
    except ValueError as error:
        if "num_heads" not in str(error):
            raise
        found.notes.append(
            "the number of heads cannot be read from these shapes: load_model needs num_heads=; "
            "names and shapes do not depend on it"
        )
        heads = (1, 1) if found.kind == "DiT-DH" else 1
        return infer_kwargs(state, heads, projected)


def model_name(class_name: str, kwargs: Mapping[str, Any]) -> str:
    """A network in words: its published name if it has one, and the resolution."""
    sizes = SIT_SIZES if class_name == "SiT" else DITDH_SIZES
    keys = ("hidden_size", "depth", "num_heads")
    own = [_flat(kwargs[key]) for key in keys]
    size = next((n for n, s in sizes.items() if [_flat(s[key]) for key in keys] == own), None)
    if size is None:
        shape = "width {}, depth {}".format(*("+".join(map(str, part)) for part in own[:2]))
        name = f"{'DiT-DH' if class_name == 'DiTDH' else 'SiT'} of {shape}"
    else:
        name = f"SiT-{size}/{kwargs['patch_size']}" if class_name == "SiT" else f"DiTDH-{size}"
    if kwargs.get("z_dims"):
        name = f"REPA {name}"
    side, channels = kwargs["input_size"], kwargs["in_channels"]
    # Pixels per latent cell: of Stable Diffusion's autoencoder, and of RAE's decoders.
    cell = {("SiT", 4): 8, ("SiT", 3): 1, ("SiT", 1): 1, ("DiTDH", 768): 16}.get(
        (class_name, channels)
    )
    return f"{name}, {side * cell} px" if cell else f"{name}, latents {channels}x{side}x{side}"


def _flat(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _compare_with(found: Inspection, state: dict[str, Tensor], against: str | None) -> None:
    if against is not None:
        own = found.kwargs
        other = "DiTDH" if against.startswith("DiTDH") else "SiT"
        names = ("input_size", "in_channels", "num_classes", "class_dropout_prob", "learn_sigma")
        names += ("z_dims", "projector_dim", "encoder_depth", "qk_norm")
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


def _add_notes(found: Inspection, content: Mapping[str, Any]) -> None:
    """Notes about what is in the file and not used, and what is not in it."""
    for row in found.contents:
        if row["kind"] != "optimizer":
            continue
        note = f"{row['name']!r} (optimizer state) is not read by mixflow-fast"
        if found.class_name is not None:
            parameters = list(on_meta(found.class_name, found.kwargs).parameters())
            frozen = sum(not p.requires_grad for p in parameters)
            if found.class_name == "DiTDH" and frozen and row["parameters"] == len(parameters):
                note += (
                    f"; it holds {frozen} parameters more than are trainable here: RAE's main "
                    "branch trains pos_embed and t_embedder.W too (train_embeddings=True)"
                )
        found.notes.append(note)
    if "scheduler" in content:
        found.notes.append("'scheduler' is not read by mixflow-fast")
    if found.damaged:
        found.notes.append(
            "checksums are wrong in a file that is damaged, or was saved with them switched off"
        )


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)[:200]


def as_json(found: Inspection) -> dict[str, Any]:
    """The findings as JSON-able values, `fits` among them."""
    return {"fits": found.fits} | asdict(found)
