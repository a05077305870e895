"""Checkpoints and networks: build the one that a file holds, copy a state dict into one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mixflow_fast.messages import shorten
from mixflow_fast.models.ditdh import DiTDH
from mixflow_fast.models.network import Network
from mixflow_fast.models.sit import SiT
from mixflow_fast.models.songunet import SongUNet
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.models.text_to_image.spec import TransformerSpec, with_storage
from mixflow_fast.models.weights.files import WeightsFile
from mixflow_fast.models.weights.foreign import describe_unknown, network_that_is
from mixflow_fast.models.weights.infer import infer_kwargs, infer_sit_kwargs
from mixflow_fast.models.weights.naming import (
    ClassName,
    class_of,
    fit_head,
    kind_of,
    with_velocity_head,
)

CLASSES: dict[ClassName, type[Network]] = {
    "SiT": SiT,
    "DiTDH": DiTDH,
    "SongUNet": SongUNet,
    "TextToImage": TextToImage,
}


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
    own = model.saved_state() if isinstance(model, Network) else model.state_dict()
    state = fit_head(state, own)
    missing, unexpected, shapes = compare(state, own)
    misshaped = [f"{name} {have} instead of {want}" for name, (have, want) in shapes.items()]
    # Everything is compared before anything is copied: an error leaves the model as it was.
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
        # Assigned as they are, they could be views into a mapped file or another's storage.
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


def read_model_config(path: str | os.PathLike[str]) -> dict[str, object]:
    """How the network in a file that this engine wrote is built: the class's arguments, its clock.

    "prediction" is there too. Empty for other files, which do not say.

    Raises:
        ValueError: the file cannot be read, or what it says of itself is damaged.
    """
    return WeightsFile.open(path).model_config()


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """The network that a file's weights belong to.

    Attributes:
        class_name: the class that computes it.
        kwargs: constructor arguments, the clock excepted.
        clock: as recorded in the file; None leaves it to the class.
        prediction: what its output is.
        path: interpolation path of its training; None where the file does not say it.
    """

    class_name: ClassName
    kwargs: Mapping[str, object]
    clock: str | None
    prediction: str
    path: str | None

    def on_meta(self, clock: str | None = None) -> Network:
        """The network without storage; `clock` overrides its own."""
        return on_meta(self.class_name, {**self.kwargs, "clock": clock or self.clock})


def network_spec(
    file: WeightsFile,
    state: Mapping[str, Tensor],
    num_heads: int | tuple[int, int] | None = None,
    encoder_depth: int | None = None,
) -> NetworkSpec:
    """Which network a state dict of a file belongs to.

    A file that this engine wrote says it; of an official one the shapes do (`infer_kwargs`), and
    its `args` where REPA's projectors start.

    Args:
        file: where `state` was read.
        state: name -> tensor; only names and shapes are looked at.
        num_heads, encoder_depth: where neither file nor shapes tell.

    Raises:
        ValueError: as `infer_kwargs`; weights of no known network, with what they are; a damaged
            record.
    """
    recorded = file.metadata
    if kind_of(state) == "text-to-image" and recorded is None:  # the names alone do not tell it
        raise ValueError(describe_unknown(file.path, state))
    # Of a file of our own that lacks something, what it lacks says more.
    if kind_of(state) is None and (recorded is None or network_that_is(state)):
        raise ValueError(describe_unknown(file.path, state))
    if recorded is not None:
        # The names decide: a record of an early version does not name the class.
        return NetworkSpec(
            class_name=class_of(state),
            kwargs=recorded.kwargs,
            clock=recorded.clock,
            prediction=recorded.prediction,
            path=recorded.path,
        )
    official = file.official
    if encoder_depth is None and kind_of(state) == "REPA SiT":
        encoder_depth = official.encoder_depth
    class_name, kwargs = infer_kwargs(state, num_heads, encoder_depth)
    return NetworkSpec(
        class_name=class_name,
        kwargs=kwargs,
        clock=None,
        prediction=official.prediction,
        path=official.path,
    )


def spec_of_any_heads(
    file: WeightsFile, state: Mapping[str, Tensor], encoder_depth: int | None = None
) -> NetworkSpec:
    """As `network_spec`, with num_heads None where neither file nor shapes tell them."""
    try:
        return network_spec(file, state, encoder_depth=encoder_depth)
    except ValueError as error:
        if "num_heads" not in str(error):
            raise
    one = (1, 1) if kind_of(state) == "DiT-DH" else 1
    spec = network_spec(file, state, one, encoder_depth)
    return replace(spec, kwargs={**spec.kwargs, "num_heads": None})


def on_meta(class_name: ClassName, kwargs: Mapping[str, object]) -> Network:
    """A network without storage, for its names and shapes or to be loaded into.

    Raises:
        ValueError: arguments that the class does not take.
    """
    if class_name == "TextToImage":
        return TransformerSpec.from_config(kwargs).without_weights()
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
    base: str | os.PathLike[str] | None = None,
) -> Network:
    """Build the network that a checkpoint holds and load its weights, in float32 on the CPU.

    The class follows from the names of the weights. A file that this engine wrote says how its
    network was built; of an official one the shapes do (`infer_kwargs`).

    Args:
        path: a .pt or .safetensors file, or the folder of a run or checkpoint.
        key: "ema" or "model".
        num_heads, encoder_depth: where the shapes cannot tell.
        clock: overrides the recorded clock, or the one that the class implies.
        base: of a run of LoRA the folder of the network that its adapters stand beside; None: the
            `model.folder` that the run had.

    Returns:
        a `SiT`, `DiTDH`, `SongUNet` or `TextToImage` in eval mode; `prediction` and `path` are set
        on it.

    Raises:
        ValueError: whatever `load_weights`, `infer_kwargs` and `load_into` refuse; another base.
    """
    return model_of(WeightsFile.open(path), key, num_heads, encoder_depth, clock, base)


def model_of(
    file: WeightsFile,
    key: str = "ema",
    num_heads: int | tuple[int, int] | None = None,
    encoder_depth: int | None = None,
    clock: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Network:
    """`load_model` of a file that is open already, whose record the caller has read."""
    state = file.state(key)
    spec = network_spec(file, state, num_heads, encoder_depth)
    model = spec.on_meta(clock)
    file.check_values(key, state)
    if isinstance(model, TextToImage) and model.has_adapters:
        model = _beside_base(model, file, base)
    load_into(model, state)  # copies, so that nothing hangs on the mapped file
    model.prediction, model.path = spec.prediction, spec.path
    return model.eval()


def _beside_base(
    model: TextToImage, file: WeightsFile, base: str | os.PathLike[str] | None
) -> TextToImage:
    """The network with the weights that its adapters stand beside; the adapters have no values."""
    if base is None:
        run = json.loads((file.metadata and file.metadata.config) or "{}")
        base = run.get("model", {}).get("folder")
    if base is None or not Path(base).expanduser().is_dir():
        raise ValueError(
            f"{file.path} holds adapters (LoRA) alone, and the folder of the network beside them, "
            f"{base or 'which it does not name'}, is not there: put it back, or give it to "
            "load_model as base=FOLDER"
        )
    model = with_storage(model)
    TransformerSpec.from_config(model.config).fill_base(model, base)
    return model


def export_official_sit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with a head of velocity channels only, as SiT's samplers demand of `--ckpt`.

    Head row r = (pixel of the patch) * 2 C + channel is kept where channel < C. A head without
    sigma channels stays as it is.

    Raises:
        ValueError: if this is not the state dict of a SiT.
    """
    infer_sit_kwargs(state, num_heads=1)
    return with_velocity_head(state)
