"""How a network of diffusers is built, without its weights: read from a folder, kept in our files.

FOLDER/transformer/config.json     the class and its arguments      (or FOLDER/config.json)
FOLDER/vae/config.json             shift and scale of the latents, where it is there
FOLDER/transformer/*.safetensors   weights, in one file or in several with an index
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mixflow_fast.files import existing_path
from mixflow_fast.messages import shorten
from mixflow_fast.models.text_to_image.adapter import LatentMap
from mixflow_fast.models.text_to_image.loading import (
    ADAPTERS,
    adapter_class,
    adapter_of,
    check_adapter,
    network_class,
    read_config,
    transformer_folder,
    warn_if_distilled,
)
from mixflow_fast.models.text_to_image.network import TextToImage

_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """A text-to-image network without its weights.

    Attributes:
        class_name: diffusers' class.
        config: its arguments, as its config.json has them.
        adapter: "my_file.py:MyAdapter", or None for the class's own.
        latents: map between the autoencoder's latents and x1; None: the adapter's own.
    """

    class_name: str
    config: Mapping[str, object]
    adapter: str | None = None
    latents: LatentMap | None = None

    @classmethod
    def read(
        cls, folder: str | os.PathLike[str], adapter: str | None = None, warns: bool = False
    ) -> TransformerSpec:
        """What a local folder of diffusers says; no weights are read.

        Args:
            folder: a pipeline's, or the transformer's alone.
            adapter: a user's own class, or None.
            warns: whether to warn of a distilled model.

        Raises:
            ValueError: no such folder, a class that is refused.
        """
        path = existing_path(folder, "model.folder")
        config = read_config(transformer_folder(path) / "config.json")
        class_name = str(config.get("_class_name"))
        if adapter is None:
            adapter_of(class_name)
            if warns:
                warn_if_distilled(class_name, config, path.absolute().name)
        vae = path / "vae" / "config.json"
        latents = LatentMap.of_vae(read_config(vae)) if adapter is None and vae.is_file() else None
        # Private entries are the class, the version that wrote them and where they were read.
        own = {name: value for name, value in config.items() if not name.startswith("_")}
        return cls(class_name=class_name, config=own, adapter=adapter, latents=latents)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> TransformerSpec:
        """The inverse of `to_config`.

        Raises:
            ValueError: entries that are missing or of another kind.
        """
        class_name, own = config.get("class"), config.get("transformer")
        adapter, latents = config.get("adapter"), config.get("latents")
        if not isinstance(class_name, str) or not isinstance(own, dict):
            raise ValueError(
                "the record of a text-to-image network must hold class and transformer, got "
                f"{', '.join(config) or 'nothing'}"
            )
        made = None
        if isinstance(latents, dict):
            shift, scale = (_numbers(latents.get(name)) for name in ("shift", "scale"))
            made = LatentMap(shift, scale)
        adapter = adapter if isinstance(adapter, str) else None
        return cls(class_name=class_name, config=own, adapter=adapter, latents=made)

    def to_config(self) -> dict[str, object]:
        """As `TextToImage.config`: what JSON can hold."""
        latents = None
        if self.latents is not None:
            latents = {"shift": self.latents.shift, "scale": self.latents.scale}
        return {
            "class": self.class_name,
            "transformer": json.loads(json.dumps(self.config)),
            "adapter": self.adapter,
            "latents": latents,
        }

    def on_meta(self) -> TextToImage:
        """The network without storage, not even for its buffers.

        Raises:
            ValueError: diffusers is not installed or has no such class; arguments that it refuses.
        """
        return self._around(self._network())

    def without_weights(self) -> TextToImage:
        """The network whose state has no storage, for a file to give it; the rest is as built.

        A buffer that is in no file has its values. (Such a thing is rare, and a table of positions,
        which files do hold, takes ten seconds to make.)

        Raises:
            ValueError: as `on_meta`.
        """
        network = self._network()
        if _lacks_values(network):
            network = self._with_buffers()
        return self._around(network)

    def fill(self, network: TextToImage, folder: str | os.PathLike[str]) -> None:
        """Set a network on the CPU to a folder's weights, in its own dtype, tensor by tensor.

        Raises:
            ValueError: weights that are not there, damaged, not finite, or of another network.
        """
        where = transformer_folder(existing_path(folder, "model.folder"))
        own = network.transformer.state_dict()
        left = dict(own)
        for file, name, value in _tensors(where):
            if name not in own or own[name].shape != value.shape:
                expected = tuple(own[name].shape) if name in own else "no such tensor"
                raise ValueError(
                    f"{file} does not fit {self.class_name} of {where / 'config.json'}: {name} is "
                    f"{tuple(value.shape)}, expected {expected}"
                )
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{file}: {name} holds numbers that are not finite")
            own[name].copy_(value)
            left.pop(name, None)
        trained = {name for name, _ in network.transformer.named_parameters()}
        if missing := [name for name in left if name in trained]:
            raise ValueError(
                f"{where} lacks {len(missing)} tensors of {self.class_name}: {shorten(missing)}"
            )
        if left:  # tables that the class makes by itself
            made = self._with_buffers().state_dict()
            for name, value in left.items():
                value.copy_(made[name])

    def _network(self) -> nn.Module:
        with torch.device("meta"):
            return self._build()

    def _with_buffers(self) -> nn.Module:
        try:
            from accelerate import init_empty_weights
        except ImportError as error:
            raise ValueError(
                f'{self.class_name} needs accelerate ({error}): pip install "mixflow_fast[text]"'
            ) from None
        with init_empty_weights(include_buffers=False):
            return self._build()

    def _build(self) -> nn.Module:
        made = network_class(self.class_name)
        try:
            return made.from_config(dict(self.config))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.class_name} cannot be built from its configuration: {error}"
            ) from None

    def _around(self, network: nn.Module) -> TextToImage:
        """The network behind its adapter, as training wants it."""
        if self.adapter is not None:
            adapter = check_adapter(adapter_class(self.adapter)(network))
        else:
            adapter_of(self.class_name)
            adapter = ADAPTERS[self.class_name](network, self.latents)
        return TextToImage(adapter, self.to_config())


def _lacks_values(network: nn.Module) -> bool:
    """Whether a network on meta has tensors that its state dict does not hold."""
    return any(
        module._non_persistent_buffers_set
        or any(isinstance(value, Tensor) for value in vars(module).values())
        for module in network.modules()
    )


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """File, name and value of each tensor of a transformer's folder."""
    from safetensors import SafetensorError, safe_open

    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    yield file, name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}): copy it again") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        names = read_config(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index} must hold a weight_map: copy the folder again")
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    raise ValueError(
        f"{folder} holds no {_WEIGHTS} (nor its index): download the model's transformer in "
        "diffusers' layout, not a variant such as fp16 alone"
    )


def _numbers(value: object) -> float | tuple[float, ...]:
    return tuple(value) if isinstance(value, list | tuple) else value
