"""Checkpoints and networks: build the one that a file holds, copy a state dict into one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixflow_fast.messages import shorten
from mixflow_fast.models.ditdh import DiTDH
from mixflow_fast.models.sit import SiT
from mixflow_fast.models.transformer import Transformer
from mixflow_fast.models.weights.files import read_content, read_metadata, state_of
from mixflow_fast.models.weights.naming import fit_head, infer_kwargs, kind_of

CLASSES: dict[str, type[Transformer]] = {"SiT": SiT, "DiTDH": DiTDH}


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
    state = fit_head(state, own)
    missing, unexpected, shapes = compare(state, own)
    misshaped = [f"{name} {have} instead of {want}" for name, (have, want) in shapes.items()]
    if misshaped or (strict and (missing or unexpected)):
        parts = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        listing = "; ".join(
            f"{len(names)} {what}: {shorten(names)}" for what, names in parts if names
        )
        raise ValueError(
            f"state dict does not fit {type(model).__name__}: {listing}. Build the model for these "
            "weights (load_model, or infer_kwargs(state))"
            + ("" if misshaped else ", or pass strict=False to load what fits")
        )
    on_meta = any(tensor.is_meta for tensor in own.values())
    fitting = {name: tensor for name, tensor in state.items() if name in own}
    if on_meta:
        fitting = {n: tensor.to(own[n].dtype, copy=True) for n, tensor in fitting.items()}
    model.load_state_dict(fitting, strict=False, assign=on_meta)
    return missing, unexpected


def compare(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[list[str], list[str], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """What a state dict has too little, too much and in another shape than a model's `own`.

    Returns:
        (missing names, unexpected names, name -> (shape in `state`, shape in `own`)).
    """
    return (
        [name for name in own if name not in state],
        [name for name in state if name not in own],
        {
            name: (tuple(state[name].shape), tuple(tensor.shape))
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        },
    )


def read_model_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How the network in a file that this engine wrote is built: the class's arguments, its clock.

    "prediction" is there too. Empty for other files, which do not say.

    Raises:
        ValueError: the file cannot be read, or what it says of itself is damaged.
    """
    metadata = read_metadata(path)
    if metadata:
        return recorded_config(metadata, path)
    content = read_content(path)
    args = content.get("args") if isinstance(content, Mapping) else None
    return recorded_config(args, path) if isinstance(args, Mapping) else {}


def recorded_config(args: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """`read_model_config` of what a file holds under `args`, or of a .safetensors header."""
    kwargs = args.get("kwargs", args.get("model"))
    if not isinstance(kwargs, str) or not kwargs.startswith("{"):
        return {}  # an official file: its args.model is a name
    try:
        recorded = json.loads(kwargs) | {"clock": args.get("clock")}
        run = json.loads(args["config"]) if isinstance(args.get("config"), str) else {}
        prediction = args.get("prediction") or run.get("objective", {}).get("prediction")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"what {path} says of its network is damaged ({error}): write the file again"
        ) from None
    return recorded | {"prediction": prediction or "velocity"}


def official_settings(content: Any) -> dict[str, Any]:
    """What an official training checkpoint's `args` say that its shapes do not.

    "prediction" ("velocity", "noise" or "score"; REPA writes "v") and "encoder_depth", where there.
    """
    args = content.get("args") if isinstance(content, Mapping) else None
    args = args if isinstance(args, Mapping) else {}
    out: dict[str, Any] = {}
    prediction = {"v": "velocity"}.get(args.get("prediction"), args.get("prediction"))
    if prediction in ("velocity", "noise", "score"):
        out["prediction"] = prediction
    if type(args.get("encoder_depth")) is int:
        out["encoder_depth"] = args["encoder_depth"]
    return out


def on_meta(class_name: str, kwargs: Mapping[str, Any]) -> Transformer:
    """A network without storage, for its names and shapes or to be loaded into.

    Raises:
        ValueError: arguments that the class does not take.
    """
    try:
        with torch.device("meta"):
            return CLASSES[class_name](**kwargs)
    except TypeError as error:
        raise ValueError(
            f"{class_name} cannot be built from the recorded arguments: {error}"
        ) from None


def load_model(
    path: str | os.PathLike[str],
    key: str = "ema",
    num_heads: int | tuple[int, int] | None = None,
    encoder_depth: int | None = None,
    clock: str | None = None,
) -> Transformer:
    """Build the network that a checkpoint holds and load its weights, in float32 on the CPU.

    The class follows from the names of the weights. A file that this engine wrote says how its
    network was built; of an official one the shapes do (`infer_kwargs`).

    Args:
        path: a .pt or .safetensors file.
        key: "ema" or "model".
        num_heads, encoder_depth: where the shapes cannot tell.
        clock: overrides the recorded clock, or the one that the class implies.

    Returns:
        a `SiT` or `DiTDH` in eval mode; `prediction` is set on it.

    Raises:
        ValueError: whatever `load_weights`, `infer_kwargs` and `load_into` refuse.
    """
    content = read_content(path)
    state = state_of(content, key, path)
    kwargs, said = read_model_config(path), official_settings(content)
    prediction = kwargs.pop("prediction", said.get("prediction", "velocity"))
    if kwargs:
        class_name = "DiTDH" if "s_embedder.proj.weight" in state else "SiT"
    else:
        if encoder_depth is None and kind_of(state) == "REPA SiT":
            encoder_depth = said.get("encoder_depth")
        class_name, kwargs = infer_kwargs(state, num_heads, encoder_depth)
    if clock is not None:
        kwargs["clock"] = clock
    model = on_meta(class_name, kwargs)
    load_into(model, state)  # copies, so that nothing hangs on the mapped file
    model.prediction = prediction
    return model.eval()
