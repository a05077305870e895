"""Which adapter a network gets: by its class, or a user's own class by `file.py:Class`.

Networks that do not predict a velocity are refused by name, because nothing else tells: a network
that predicts noise has the same shapes, trains, and samples noise.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mixflow_fast.files import existing_path
from mixflow_fast.messages import did_you_mean, error_line
from mixflow_fast.models.text_to_image.adapter import (
    Adapter,
    Condition,
    DiffusersAdapter,
    LatentMap,
)
from mixflow_fast.models.text_to_image.flux import FluxAdapter
from mixflow_fast.models.text_to_image.lora import load_lora
from mixflow_fast.models.text_to_image.sd3 import SD3Adapter
from mixflow_fast.models.text_to_image.z_image import ZImageAdapter

ADAPTERS: dict[str, type[DiffusersAdapter]] = {
    "SD3Transformer2DModel": SD3Adapter,
    "FluxTransformer2DModel": FluxAdapter,
    "ZImageTransformer2DModel": ZImageAdapter,
}
# diffusers' classes whose pipelines take what they predict for noise, or for the v of a diffusion.
_NOISE = (
    "PixArtTransformer2DModel",
    "DiTTransformer2DModel",
    "HunyuanDiT2DModel",
    "UNet2DModel",
    "UNet2DConditionModel",
)
# Parts of the names of models that were distilled to few steps.
_DISTILLED = ("schnell", "turbo")
_PIPELINE = "model_index.json"
_OWN = (
    "bring one: a class with the members of mixflow_fast.models.text_to_image.Adapter, as "
    "adapter='my_file.py:MyAdapter', and hold it against its pipeline with check_against_pipeline"
)


def adapter_for(
    network: nn.Module,
    latents: LatentMap | None = None,
    empty_prompt: Condition | None = None,
    name: str = "",
) -> DiffusersAdapter:
    """The adapter of a network of diffusers, by its class.

    Args:
        network: `SD3Transformer2DModel`, `FluxTransformer2DModel` or `ZImageTransformer2DModel`.
        latents, empty_prompt: as `DiffusersAdapter`.
        name: of the model, as its folder's: a distilled one is known by it, and warned of.

    Raises:
        ValueError: a class that predicts noise, or one without an adapter here.
    """
    class_name = type(network).__name__
    adapter = adapter_of(class_name)
    warn_if_distilled(class_name, network.config, name)
    return adapter(network, latents, empty_prompt)


def adapter_of(class_name: str) -> type[DiffusersAdapter]:
    """The adapter's class for a class of networks; ValueError for one that is refused."""
    if class_name in _NOISE:
        raise ValueError(
            f"{class_name} predicts noise (or the v of a diffusion with a schedule of its own) and "
            "no velocity of the straight path from data to noise: it is not a flow-matching "
            "network, and slowed interpolation would train it to something else. Take one of "
            f"{', '.join(ADAPTERS)}"
        )
    if class_name not in ADAPTERS:
        raise ValueError(
            f"there is no adapter for {class_name}, only for {', '.join(ADAPTERS)}"
            f"{did_you_mean(class_name, ADAPTERS)}; {_OWN}"
        )
    return ADAPTERS[class_name]


def warn_if_distilled(class_name: str, config: Mapping[str, object], name: str) -> None:
    """Warn of a model that was distilled, by its name or what its configuration shows."""
    why = next((f"{part} in its name" for part in _DISTILLED if part in name.lower()), None)
    if why is None and class_name == "FluxTransformer2DModel":
        # Both released FLUX.1 are distilled, and this field tells them apart.
        guided = config.get("guidance_embeds")
        why = f"guidance_embeds={guided}, as FLUX.1-{'dev' if guided else 'schnell'} has"
    if why is not None:
        warnings.warn(
            f"{name or class_name} seems to be distilled ({why}): the velocity loss trains the "
            "average velocity of data at noise, which takes the distilled steps or guidance away "
            "again. Start from the model that was not distilled; if yours is not, go on",
            stacklevel=3,
        )


def adapter_class(where: str) -> type:
    """A user's own adapter class. The file is run, as any Python program of the user's.

    Args:
        where: "my_file.py:MyAdapter".

    Raises:
        ValueError: another form, no such file or class, or a file that raises.
    """
    file, colon, name = where.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"adapter must be 'file.py:Class', got {where!r}")
    path = existing_path(file, "adapter")
    spec = importlib.util.spec_from_file_location(f"mixflow_fast_adapter_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by its name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"adapter {file!r} cannot be run: {error_line(error)}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"adapter {file!r} has no class {name!r}{did_you_mean(name, classes)}")
    return found


def check_adapter(adapter: object) -> Adapter:
    """The adapter itself; ValueError where a member of the protocol is missing or no such thing."""
    # First, because a `checkpointable` that reads it would seem to be missing.
    network = getattr(adapter, "network", None)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{type(adapter).__name__}.network must be a torch.nn.Module, got "
            f"{type(network).__name__}"
        )
    members = ("velocity", "encode", "decode", "empty", "checkpointable")
    missing = [member for member in members if not hasattr(adapter, member)]
    if missing:
        raise ValueError(
            f"{type(adapter).__name__} must have {', '.join(members)}, as the protocol "
            f"mixflow_fast.models.text_to_image.Adapter says; missing: {', '.join(missing)}"
        )
    blocks = adapter.checkpointable
    classes = isinstance(blocks, tuple) and all(isinstance(block, type) for block in blocks)
    if not classes or not any(isinstance(m, blocks) for m in network.modules()):
        raise ValueError(
            f"{type(adapter).__name__}.checkpointable must be a tuple of classes of modules in "
            f"the network, got {blocks!r}"
        )
    return adapter


def load_adapter(
    folder: str | os.PathLike[str],
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    empty_prompt: Condition | None = None,
    lora: str | os.PathLike[str] | None = None,
) -> Adapter:
    """A network from a local folder of diffusers, with its adapter. Nothing is downloaded.

    Args:
        folder: a pipeline's, with transformer/ and vae/ in it, or the transformer's alone: then
            the map of the latents is the released model's.
        adapter: "my_file.py:MyAdapter", which is called with the network and nothing else; None:
            by the network's class.
        dtype: of the weights.
        empty_prompt: as `DiffusersAdapter`; a class of your own has its own way to it.
        lora: a file of adapters in diffusers' layout, as `export --to lora` writes it.

    Raises:
        ValueError: no such folder, a class that is refused, diffusers not installed, an empty
            prompt beside a class of your own, adapters that do not fit.
    """
    if adapter is not None and empty_prompt is not None:
        raise ValueError(
            f"empty_prompt has no meaning for the adapter {adapter!r}, whose method `empty` is its "
            "own: leave it out"
        )
    path = existing_path(folder, "folder")
    own = None if adapter is None else adapter_class(adapter)
    where = transformer_folder(path)
    config = read_config(where / "config.json")
    class_name = str(config.get("_class_name"))
    if own is None:
        adapter_of(class_name)  # before gigabytes are read
    made = network_class(class_name)
    network = made.from_pretrained(where, torch_dtype=dtype, local_files_only=True)
    if network.dtype != dtype:
        # Where accelerate is not installed, diffusers loads float32 whatever it is asked for.
        network = network.to(dtype)
    if lora is not None:
        load_lora(network, lora)
        network = network.to(dtype)
    if own is not None:
        return check_adapter(own(network))
    vae = path / "vae" / "config.json"
    latents = LatentMap.of_vae(read_config(vae)) if vae.is_file() else None
    warn_if_distilled(class_name, network.config, path.absolute().name)
    return ADAPTERS[class_name](network, latents, empty_prompt)


def transformer_folder(folder: Path) -> Path:
    """Where a pipeline's folder, or a transformer's own, has the transformer.

    Raises:
        ValueError: a pipeline of another kind of network, or a folder that is neither's.
    """
    inside = folder / "transformer"
    if inside.is_dir():
        return inside
    if (folder / _PIPELINE).is_file():
        raise ValueError(f"{str(folder)!r} is {_other_pipeline(read_config(folder / _PIPELINE))}")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is no folder of diffusers: it holds neither {_PIPELINE} nor "
            "config.json; give a pipeline's folder, or its transformer's"
        )
    return folder


def _other_pipeline(index: Mapping[str, object]) -> str:
    """What a pipeline without transformer/ is."""
    made = index.get("_class_name", "pipeline")
    for name, part in index.items():
        if isinstance(part, list) and part[-1:] and part[-1] in _NOISE:
            return (
                f"a {made}, whose {name} {part[-1]} predicts noise and no velocity of the straight "
                f"path from data to noise: take a pipeline of one of {', '.join(ADAPTERS)}"
            )
    return f"a {made} without transformer/: download the rest of it, or give another pipeline"


def network_class(class_name: str) -> type[nn.Module]:
    """A class of diffusers by its name; ValueError where it is not there."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f'text-to-image networks need diffusers ({error}): pip install "mixflow_fast[text]"'
        ) from error
    found = getattr(diffusers, class_name, None)
    if found is None:
        raise ValueError(
            f"the network is of class {class_name!r}, which diffusers {diffusers.__version__} does "
            "not have: install a newer one"
        )
    return found


def read_config(file: Path) -> Mapping[str, object]:
    """A config.json of diffusers; ValueError where it is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} must be a config.json of diffusers: {error_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} must hold one object, got {type(config).__name__}")
    return config
