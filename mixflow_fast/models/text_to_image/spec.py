"""How a network of diffusers is built, without its weights: read from a folder, kept in our files.

FOLDER/transformer/config.json     the class and its arguments      (or FOLDER/config.json)
FOLDER/vae/config.json             shift and scale of the latents, where it is there
FOLDER/transformer/*.safetensors   weights, in one file or in several with an index
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
from mixflow_fast.models.text_to_image.lora import (
    LoraSpec,
    add_lora,
    base_name,
    is_adapter,
    lora_spec,
)
from mixflow_fast.models.text_to_image.network import TextToImage

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Numbers at each end of a tensor that tell it from others.
_SAMPLED = 256


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """A text-to-image network without its weights.

    Attributes:
        class_name: diffusers' class.
        config: its arguments, as its config.json has them.
        adapter: "my_file.py:MyAdapter", or None for the class's own.
        latents: map between the autoencoder's latents and x1; None: the adapter's own.
        lora: adapters that are trained beside it; None: all of it is.
    """

    class_name: str
    config: Mapping[str, object]
    adapter: str | None = None
    latents: LatentMap | None = None
    lora: LoraSpec | None = None

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
        lora = config.get("lora")
        return cls(
            class_name=class_name,
            config=own,
            adapter=adapter,
            latents=made,
            lora=LoraSpec.from_config(lora) if isinstance(lora, dict) else None,
        )

    def with_lora(
        self,
        folder: str | os.PathLike[str],
        rank: int,
        alpha: float | None = None,
        targets: tuple[str, ...] | None = None,
    ) -> TransformerSpec:
        """The same network with adapters beside its weights, which are those of a folder.

        Args:
            folder: as `read`.
            rank, alpha, targets: as `lora_spec`.

        Raises:
            ValueError: as `lora_spec` and `base_digest`.
        """
        made = lora_spec(self._network(), rank, alpha, targets)
        return replace(self, lora=replace(made, base=base_digest(folder)))

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
            "lora": None if self.lora is None else self.lora.to_config(),
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

        Adapters beside them stay as they are.

        Raises:
            ValueError: weights that are not there, damaged, not finite, or of another network.
        """
        where = transformer_folder(existing_path(folder, "model.folder"))
        state = network.transformer.state_dict()
        own = {base_name(name): t for name, t in state.items() if not is_adapter(name)}
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
        parameters = {base_name(name) for name, _ in network.transformer.named_parameters()}
        if missing := [name for name in left if name in parameters]:
            raise ValueError(
                f"{where} lacks {len(missing)} tensors of {self.class_name}: {shorten(missing)}"
            )
        if left:  # tables that the class makes by itself
            made = self._with_buffers().state_dict()
            for name, value in left.items():
                value.copy_(made[name])

    def fill_base(self, network: TextToImage, folder: str | os.PathLike[str]) -> None:
        """`fill`, of the network that adapters were trained beside.

        Raises:
            ValueError: as `fill`; a folder of another network.
        """
        own = base_digest(folder)
        if self.lora is not None and self.lora.base not in (None, own):
            raise ValueError(
                f"{folder} holds another network (hash {own}) than the one that the adapters were "
                f"trained beside ({self.lora.base}): give the folder that the run had as "
                "model.folder"
            )
        self.fill(network, folder)

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
        if self.lora is not None:
            # On meta, whatever buffers are: their values come with the others'.
            add_lora(network, self.lora)
        if self.adapter is not None:
            adapter = check_adapter(adapter_class(self.adapter)(network))
        else:
            adapter_of(self.class_name)
            adapter = ADAPTERS[self.class_name](network, self.latents)
        return TextToImage(adapter, self.to_config())


def with_storage(network: TextToImage, frozen: torch.dtype = torch.float32) -> TextToImage:
    """A network on the CPU; tensors that had no storage have undefined values.

    Args:
        network: of `TransformerSpec.without_weights`.
        frozen: dtype of what adapters stand beside; all else that is floating is float32.
    """

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if not tensor.is_floating_point():  # a table of positions
            return torch.empty_like(tensor, device="cpu")
        dtype = frozen if network.has_adapters and not tensor.requires_grad else torch.float32
        return torch.empty_like(tensor, device="cpu", dtype=dtype)

    # Not `to_empty`, which would take the values of buffers that no file holds.
    return network._apply(made)


def base_digest(folder: str | os.PathLike[str]) -> str:
    """A hash of a folder's transformer: its configuration, and each tensor's name, dtype, shape and
    the numbers at both of its ends. Reads little of the files, and does not see how they are cut.

    Raises:
        ValueError: files that are not there or cannot be read.
    """
    where = transformer_folder(existing_path(folder, "model.folder"))
    config = read_config(where / "config.json")
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    facts = [json.dumps([config.get("_class_name"), own], sort_keys=True)]
    for _, name, value in _tensors(where):  # mapped: what is not looked at is not read
        flat = value.reshape(-1)
        ends = torch.cat([flat[:_SAMPLED], flat[-_SAMPLED:]])
        numbers = ends.view(torch.uint8).numpy().tobytes()
        seen = hashlib.sha256(numbers).hexdigest()
        facts.append(f"{name} {value.dtype} {tuple(value.shape)} {seen}")
    text = "\n".join([facts[0], *sorted(facts[1:])])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
                for name in opened.keys():
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
