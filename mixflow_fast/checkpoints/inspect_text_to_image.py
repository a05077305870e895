"""What a text-to-image file is: which network, whose names, an adapter, a pipeline's folder.

By names and shapes alone: no value is read, so files of any size take moments. Names and shapes
are compared with diffusers' own class, built without storage.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from mixflow_fast.checkpoints.inspect import Json
from mixflow_fast.files import existing_path
from mixflow_fast.messages import size_text
from mixflow_fast.models.weights.naming import TEXT_TO_IMAGE_PREFIX, kind_of
from mixflow_fast.models.weights.tensor_headers import TensorHeaders, read_headers
from mixflow_fast.models.weights.text_to_image_names import (
    LoraWeights,
    Shapes,
    TextToImageNetwork,
    lora_weights,
    text_to_image_network,
)

_PIPELINE = "model_index.json"
# What configurations of these classes hold that shapes do not tell.
_FROM_CONFIG = ("sample_size", "axes_dims_rope", "axes_dims", "axes_lens", "rope_theta", "t_scale")
_OBJECTIVE = ("gamma", "timesteps", "shift")


@dataclass(kw_only=True)
class TextToImageInspection:
    """The findings.

    Attributes:
        path, size_bytes, format, layout: the file; `layout` is in words.
        model: the network, or what an adapter fits, in words.
        class_name, config: diffusers' class and the arguments that shapes tell.
        parameters, table: numbers in the file, and in the table of positions beside them.
        tensors, dtypes, prefix, steps: of the file.
        pipeline: class of the pipeline that the folder holds; None for a transformer alone.
        components: folder -> class and size, of a pipeline.
        ranks, modules, targets: of an adapter.
        recorded: what stands beside the tensors, and how a run was trained.
        against: what names and shapes were compared with; None where there was nothing.
        missing, unexpected, misshaped: the differences; shapes are [in the file, expected].
        damaged: what shows that the file is not whole.
    """

    path: str
    size_bytes: int
    format: str
    layout: str
    model: str
    class_name: str | None = None
    config: Mapping[str, Json] = field(default_factory=dict)
    parameters: int
    table: int = 0
    tensors: int
    dtypes: list[str]
    prefix: str = ""
    steps: int | None = None
    pipeline: str | None = None
    components: dict[str, str] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    modules: int = 0
    targets: list[str] = field(default_factory=list)
    recorded: dict[str, str] = field(default_factory=dict)
    against: str | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    damaged: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Compared with something, every name and shape right, and the file whole."""
        wrong = (self.missing, self.unexpected, self.misshaped, self.damaged)
        return self.against is not None and not any(wrong)


def inspect_text_to_image(
    path: str | os.PathLike[str], key: str = "ema"
) -> TextToImageInspection | None:
    """What a text-to-image network, adapter or pipeline is; None where the file is none of them.

    Args:
        path: a weights file, the folder of a run, a transformer or a pipeline.
        key: "ema" or "model", of a run.

    Raises:
        ValueError: the file cannot be read.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        headers = read_headers(path, key)
    network, lora = text_to_image_network(headers.shapes), lora_weights(headers.shapes)
    if network is None and lora is None:
        network = _recorded_network(headers)
    if network is not None:
        found = _of_network(headers, network)
    elif lora is not None:
        found = _of_lora(headers, lora)
    else:
        return None
    found.recorded |= _recorded(headers.header)
    _add_pipeline(found, existing_path(path, "checkpoint"))
    found.notes += [str(warning.message) for warning in caught]
    if found.damaged:
        found.notes.append("the file is not whole: copy or download it again")
    return found


def _recorded_network(headers: TensorHeaders) -> TextToImageNetwork | None:
    """The network of a run with a user's own adapter, of a class that only its record names."""
    if kind_of(headers.shapes) != "text-to-image":
        return None
    try:
        record = json.loads(headers.header.get("model", "{}"))
    except ValueError:
        return None
    class_name, config = record.get("class"), record.get("transformer")
    if not isinstance(class_name, str) or not isinstance(config, dict):
        return None
    prefix = TEXT_TO_IMAGE_PREFIX
    return TextToImageNetwork(
        name=f"by its record {class_name}",
        class_name=class_name,
        config=config,
        naming="diffusers",
        prefix=prefix,
        shapes={name.removeprefix(prefix): shape for name, shape in headers.shapes.items()},
        others=(),
    )


def _found(
    headers: TensorHeaders, layout: str, model: str, parameters: int
) -> TextToImageInspection:
    return TextToImageInspection(
        path=str(headers.path),
        size_bytes=headers.size_bytes,
        format=headers.format,
        layout=layout,
        model=model,
        parameters=parameters,
        tensors=len(headers.shapes),
        dtypes=sorted(set(headers.dtypes.values())),
        steps=headers.steps,
        damaged=headers.damaged,
    )


def _of_network(headers: TensorHeaders, network: TextToImageNetwork) -> TextToImageInspection:
    layout = "diffusers' names" if network.naming == "diffusers" else "names of the original code"
    if len(headers.parts) > 1:
        layout += f", in {len(headers.parts)} parts"
    if headers.place:
        layout = f"mixflow-fast weights under {headers.place!r}, {layout}"
    found = _found(headers, layout, network.name, network.parameters)
    found.class_name, found.config, found.table = network.class_name, network.config, network.table
    found.prefix = network.prefix
    if network.others:
        found.notes.append(
            f"{len(network.others)} more tensors are no part of the transformer (text encoders, an "
            f"autoencoder): {_beginnings(network.others)}"
        )
    if "dev" in network.name or "schnell" in network.name:
        found.notes.append(
            "both released FLUX.1 are distilled: the velocity loss takes the distilled guidance or "
            "steps away again"
        )
    if network.naming == "original":
        found.notes.append(
            f"training reads diffusers' folders. To make one: diffusers.{network.class_name}."
            f"from_single_file({str(headers.path)!r}, config=FOLDER, subfolder='transformer', "
            "local_files_only=True).save_pretrained(OUT), with FOLDER a local pipeline of this "
            "model; then model.folder=OUT"
        )
        return found
    config = _config_beside(headers.path, network)
    if config is None:
        if not headers.place:
            found.notes.append(
                "there is no config.json beside it, which model.folder needs: lay the file into "
                "the folder transformer/ of this model, as diffusion_pytorch_model.safetensors"
            )
    elif not headers.place:
        found.notes.append(f"to train it: model.folder={_model_folder(headers.path)}")
    _compare(found, network, config or {})
    return found


def _beginnings(names: tuple[str, ...]) -> str:
    return ", ".join(sorted({name.partition(".")[0] for name in names}))


def _model_folder(path: Path) -> Path:
    """The folder of the pipeline around a transformer's, where there is one."""
    folder = path.parent
    whole = folder.name == "transformer" and (folder.parent / _PIPELINE).is_file()
    return folder.parent if whole else folder


def _config_beside(path: Path, network: TextToImageNetwork) -> dict[str, object] | None:
    """config.json of the class beside a file; None where there is none."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(config, dict) and config.get("_class_name") == network.class_name
    return config if same else None


def _compare(
    found: TextToImageInspection, network: TextToImageNetwork, config: Mapping[str, object]
) -> None:
    """Hold names and shapes against diffusers' class without storage."""
    try:
        import diffusers
    except ImportError:
        found.notes.append(
            "names and shapes were not compared with the class, because diffusers is not "
            'installed: pip install "mixflow_fast[text]"'
        )
        return
    more = {name: config[name] for name in _FROM_CONFIG if name in config}
    if network.config.get("pos_embed_max_size") == 0:
        found.missing.append("pos_embed.pos_embed")
        return
    with torch.device("meta"):
        model = getattr(diffusers, network.class_name)(**network.config, **more)
    own: Shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found.against = network.class_name
    found.missing = [name for name in own if name not in network.shapes]
    found.unexpected = [name for name in network.shapes if name not in own]
    found.misshaped = {
        name: [network.shapes[name], shape]
        for name, shape in own.items()
        if network.shapes.get(name, shape) != shape
    }
    for name, said in network.config.items():
        recorded = config.get(name, said)
        if (tuple(recorded) if isinstance(recorded, list) else recorded) != said:
            found.notes.append(f"config.json says {name} {recorded!r}, and the shapes say {said!r}")


def _of_lora(headers: TensorHeaders, lora: LoraWeights) -> TextToImageInspection:
    found = _found(headers, "an adapter (LoRA)", f"a LoRA for {lora.fits}", lora.parameters)
    found.ranks, found.modules, found.targets = list(lora.ranks), lora.modules, list(lora.targets)
    found.prefix = lora.prefix
    if lora.alone:
        found.missing = [f"the other factor of {name}, or its shape" for name in lora.alone]
    found.against = "its own pairs of factors"
    if len(lora.ranks) > 1:
        found.notes.append("several ranks: some programs read files of one rank alone")
    if lora.scaled:
        found.notes.append(
            f"{lora.scaled} modules have an alpha of their own, which not every program reads"
        )
    if "base_model.model." in lora.prefix:
        found.notes.append(
            "base_model.model. before the names is peft's own layout, which interfaces such as "
            "ComfyUI do not read"
        )
    found.notes.append(
        "an adapter is the difference to a network: pipeline.load_lora_weights(FILE) adds it to "
        "the one that it was trained on"
    )
    return found


def _recorded(header: Mapping[str, str]) -> dict[str, str]:
    """Short strings beside the tensors, and what a run's configuration says of its objective."""
    # Headers have no order of their own.
    names = sorted(name for name in header if name not in ("format", "steps"))
    short = {name: header[name] for name in names if not header[name].startswith(("{", "["))}
    try:
        objective = json.loads(header.get("config", "{}")).get("objective", {})
    except (ValueError, AttributeError):
        objective = {}
    return short | {name: str(objective[name]) for name in _OBJECTIVE if name in objective}


def _add_pipeline(found: TextToImageInspection, path: Path) -> None:
    """What the folder of a pipeline holds beside its transformer."""
    if not path.is_dir() or not (path / _PIPELINE).is_file():
        return
    try:
        index = json.loads((path / _PIPELINE).read_text(encoding="utf-8"))
        parts = {n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path / _PIPELINE} cannot be read ({error}): download it again"
        ) from None
    found.pipeline = str(index.get("_class_name"))
    for name, (_, class_name) in parts.items():
        folder = path / name
        if class_name is None:
            found.components[name] = "none"
        elif not folder.is_dir():
            found.components[name] = f"{class_name}, not there"
            found.notes.append(
                f"{name} is named by {_PIPELINE} and not there: the pipeline does not load without "
                f"{name}=None"
            )
        else:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            found.components[name] = f"{class_name}, {size_text(size)}"


def as_json(found: TextToImageInspection) -> dict[str, Json]:
    """The findings as JSON-able values, `fits` among them."""
    return {"fits": found.fits} | asdict(found)
