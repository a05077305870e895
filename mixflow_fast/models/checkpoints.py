"""Official weight files: read safely, convert where the layouts differ, write compatible ones.

A file we write holds {"model", "ema", "args", "steps"} with float32 CPU tensors, no wrapper
prefixes and no pickled classes, so SiT's, REPA's and RAE's samplers find the `ema` they look for,
and `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from mixflow_fast.models.sit import SiT

_WRAPPERS = ("module.", "_orig_mod.")
_CONTAINER_KEYS = ("ema", "model", "state_dict")
_HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16}
_HEAD_KEYS = ("final_layer.linear.weight", "final_layer.linear.bias")


def load_weights(
    path: str | os.PathLike[str], key: str = "ema", encoder_depth: int | None = None
) -> dict[str, Tensor]:
    """Read one state dict from an official .pt or .safetensors file, on the CPU.

    Nothing in the file is executed: pickles go through `weights_only=True`, with the
    `argparse.Namespace` of the official training checkpoints as the only class allowed.

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
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights file not found: {path}: check the path or download the file")
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict, got {type(content).__name__}")
    state = _select(content, key, path)
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        what = f"not tensors: {_few(map(str, wrong))}" if wrong else "no entries at all"
        raise ValueError(f"{path} must hold a state dict of tensors, got {what}")
    # The clone detaches the tensors from the mapped file and from storages larger than they are.
    state = {name: tensor.detach().clone() for name, tensor in _unwrap(state, str(path)).items()}
    return _rename_legacy_repa(state, encoder_depth, path)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path, device="cpu")
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = zipfile.is_zipfile(path)  # only this layout of torch.save can be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(
            f"cannot read weights from {path}: {type(error).__name__}: {_first_line(error)}: the "
            "file is damaged, not a weights file, or holds classes that are not safe to load; "
            "download it again, or re-save its state dict alone with torch.save"
        ) from error


def _select(content: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = [name for name in (key, *_CONTAINER_KEYS) if isinstance(content.get(name), Mapping)]
    if not found or key in found:
        return content[key] if found else content
    fallback = [name for name in found if name != "ema"]
    if key != "ema" or not fallback:
        raise ValueError(f"{path} has no weights under {key!r}, got {found}: choose one of these")
    warn(f"{path} has no 'ema' weights: took {fallback[0]!r}", stacklevel=3)
    return content[fallback[0]]


def _unwrap(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name in out:
            raise ValueError(f"{source} holds {name} twice, with and without a wrapper prefix")
        out[name] = tensor
    return out


def _rename_legacy_repa(
    state: dict[str, Tensor], encoder_depth: int | None, path: Path
) -> dict[str, Tensor]:
    if not any(name.startswith("decoder_blocks.") for name in state):
        return state
    offset = _depth(state) if encoder_depth is None else encoder_depth
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("decoder_blocks."):
            _, number, rest = name.split(".", 2)
            name = f"blocks.{int(number) + offset}.{rest}"
        if name in out:
            raise ValueError(
                f"encoder_depth must be the number of encoder blocks in {path} = {_depth(state)}, "
                f"got {offset}: {name} would be there twice"
            )
        out[name] = tensor
    return out


def _depth(state: Iterable[str]) -> int:
    return 1 + max((int(n.split(".")[1]) for n in state if n.startswith("blocks.")), default=-1)


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
) -> tuple[list[str], list[str]]:
    """Copy a state dict into a model; sigma channels of the head are dropped or zero-filled to fit.

    A model on the meta device receives copies of the tensors (in its own dtype) as its storage.

    A state dict does not say in which clock it was trained: the caller chooses `model.clock`.

    Args:
        model: any module with the official names.
        state: name -> tensor.
        strict: False tolerates missing and unexpected names, never a wrong shape.

    Returns:
        (missing, unexpected) names; both empty when strict.

    Raises:
        ValueError: one message that lists what is missing, unexpected and mis-shaped. The model is
            then unchanged.
    """
    own = model.state_dict()
    state = _fit_head(state, own)
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if misshaped or (strict and (missing or unexpected)):
        parts = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        listing = "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in parts if names)
        raise ValueError(
            f"state dict does not fit {type(model).__name__}: {listing}. Build the model for these "
            "weights (SiT(**infer_sit_kwargs(state)))"
            + ("" if misshaped else ", or pass strict=False to load what fits")
        )
    on_meta = any(tensor.is_meta for tensor in own.values())
    fitting = {name: tensor for name, tensor in state.items() if name in own}
    if on_meta:
        fitting = {n: tensor.to(own[n].dtype, copy=True) for n, tensor in fitting.items()}
    model.load_state_dict(fitting, strict=False, assign=on_meta)
    return missing, unexpected


def _fit_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop or zero-fill the sigma rows of the head where that alone makes its shape right."""
    out = dict(state)
    if not all(name in own and name in state for name in (*_HEAD_KEYS, "x_embedder.proj.weight")):
        return out
    have, want = state[_HEAD_KEYS[0]].shape, own[_HEAD_KEYS[0]].shape
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    rows = patch * patch * channels
    if have[1:] == want[1:] and (have[0], want[0]) == (2 * rows, rows):
        out |= {name: _drop_sigma(state[name], channels) for name in _HEAD_KEYS}
    elif have[1:] == want[1:] and (have[0], want[0]) == (rows, 2 * rows):
        out |= {name: _add_sigma(state[name], channels) for name in _HEAD_KEYS}
    return out


def _drop_sigma(rows: Tensor, channels: int) -> Tensor:
    return rows.unflatten(0, (-1, 2, channels))[:, 0].flatten(0, 1).clone()


def _add_sigma(rows: Tensor, channels: int) -> Tensor:
    velocity = rows.unflatten(0, (-1, channels))
    return torch.cat([velocity, torch.zeros_like(velocity)], dim=1).flatten(0, 1)


def export_official_sit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with a head of velocity channels only, as SiT's samplers demand of `--ckpt`.

    Head row r = (pixel of the patch) * 2 C + channel is kept where channel < C. A head without
    sigma channels stays as it is.

    Raises:
        ValueError: if this is not the state dict of a SiT.
    """
    kwargs = infer_sit_kwargs(state, num_heads=1)
    out = dict(state)
    if kwargs["learn_sigma"]:
        out |= {name: _drop_sigma(state[name], kwargs["in_channels"]) for name in _HEAD_KEYS}
    return out


def infer_sit_kwargs(
    state: Mapping[str, Tensor], num_heads: int | None = None, encoder_depth: int | None = None
) -> dict[str, Any]:
    """Constructor arguments of the SiT (or REPA SiT) that a state dict belongs to, by its shapes.

    Not in the shapes: `num_heads`, known for the published widths (384, 768, 1024, 1152) and where
    q and k norms give the head width; `encoder_depth`, left to the default 8 unless given;
    the clock, which follows from the projectors (`SiT(clock=...)` overrides it); whether the last
    row of the label table is the null class, as in every official file and taken for granted.

    Raises:
        ValueError: if names or shapes are not those of a SiT, or `num_heads` must be given.
    """
    needed = (
        *("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"),
        *("blocks.0.mlp.fc1.weight", *_HEAD_KEYS),
    )
    absent = [name for name in needed if name not in state]
    if absent or "s_embedder.proj.weight" in state:
        what = "the s_embedder of a DiT-DH" if not absent else f"no {_few(absent)}"
        raise ValueError(f"state must be the state dict of a SiT, got one with {what}")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens, head_rows = state["pos_embed"].shape[1], state[_HEAD_KEYS[0]].shape[0]
    side, rows = math.isqrt(tokens), patch * patch * channels
    if side * side != tokens:
        raise ValueError(f"pos_embed must hold a square number of tokens, got {tokens}")
    if head_rows not in (rows, 2 * rows):
        raise ValueError(
            f"final_layer.linear.weight must have {rows} or, with sigma channels, {2 * rows} rows "
            f"for {channels} channels and patch {patch}, got {head_rows}"
        )
    q_norm = state.get("blocks.0.attn.q_norm.weight")
    if num_heads is None:
        num_heads = _HEADS_OF_WIDTH.get(width) if q_norm is None else width // q_norm.shape[0]
    if num_heads is None:
        raise ValueError(
            f"num_heads cannot be read from the weights of width {width}, known widths: "
            f"{sorted(_HEADS_OF_WIDTH)}: pass num_heads="
        )
    kwargs: dict[str, Any] = {
        "input_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": _depth(state),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": head_rows == 2 * rows,
        "qk_norm": q_norm is not None,
    }
    z_dims: list[int] = []
    while (last := state.get(f"projectors.{len(z_dims)}.4.weight")) is not None:
        z_dims.append(last.shape[0])
    if z_dims:
        kwargs |= {"z_dims": z_dims, "projector_dim": state["projectors.0.0.weight"].shape[0]}
        kwargs |= {} if encoder_depth is None else {"encoder_depth": encoder_depth}
    return kwargs


def save_weights(
    path: str | os.PathLike[str],
    model_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
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
    path = Path(path)
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
    model, ema = _portable(model_state, "model_state"), _portable(ema_state, "ema_state")
    odd = [n for n in model.keys() | ema.keys() if n not in model or n not in ema]
    odd += [n for n in model.keys() & ema.keys() if model[n].shape != ema[n].shape]
    if odd or not model:
        what = f"a difference in {_few(sorted(odd))}" if odd else "no tensors"
        raise ValueError(
            f"model_state and ema_state must hold the same names and shapes, got {what}: pass two "
            "full state dicts of one model"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            torch.save({"model": model, "ema": ema, "args": args, "steps": steps}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def _portable(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    out = {}
    for name, tensor in _unwrap(state, what).items():
        if tensor.is_meta:
            raise ValueError(f"{what} holds {name} on the meta device, without values: load it")
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # A copy even where nothing changes: torch.save would write the whole storage of a view.
        copy = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        out[name] = copy
    return out


def _few(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def read_model_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How the network in a file that this engine wrote is built: `SiT`'s arguments, its clock.

    "prediction" is there too. Empty for other files, which do not say.
    """
    content = _read(Path(path))
    args = content.get("args") if isinstance(content, Mapping) else None
    if not isinstance(args, Mapping) or not isinstance(args.get("model"), str):
        return {}
    recorded = json.loads(args["model"]) | {"clock": args.get("clock")}
    run = json.loads(args["config"]) if isinstance(args.get("config"), str) else {}
    return recorded | {"prediction": run.get("objective", {}).get("prediction", "velocity")}


def load_model(
    path: str | os.PathLike[str],
    key: str = "ema",
    num_heads: int | None = None,
    encoder_depth: int | None = None,
    clock: str | None = None,
) -> SiT:
    """Build the SiT that a checkpoint holds and load its weights, in float32 on the CPU.

    A file that this engine wrote says how its network was built; of an official one the shapes do
    (`infer_sit_kwargs`).

    Args:
        path: a .pt or .safetensors file.
        key: "ema" or "model".
        num_heads, encoder_depth: where the shapes cannot tell.
        clock: overrides the recorded clock, or the one that the class implies.

    Raises:
        ValueError: whatever `load_weights`, `infer_sit_kwargs` and `load_into` refuse.
    """
    state = load_weights(path, key)
    kwargs = read_model_config(path)
    prediction = kwargs.pop("prediction", "velocity")
    kwargs = kwargs or infer_sit_kwargs(state, num_heads, encoder_depth)
    if clock is not None:
        kwargs["clock"] = clock
    with torch.device("meta"):
        model = SiT(**kwargs)
    load_into(model, state)
    model.prediction = prediction
    return model.eval()
