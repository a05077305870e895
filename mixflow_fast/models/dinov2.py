"""A frozen DINOv2 of transformers from a local folder: preprocessed images -> patch tokens.

REPA's teacher (`teacher.py`) and RAE's encoder (`autoencoders/rae.py`) are made of it; what they do
to images before and to tokens after it is theirs. Nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from mixflow_fast.files import existing_path
from mixflow_fast.models.execution import Execution, runner
from mixflow_fast.models.weights.damage import refuse_not_finite

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
Precision = Literal["bf16", "fp32"]
PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Positions = Literal["repa", "model"]
POSITIONS = get_args(Positions)
PositionRule = Literal["timm", "hub"]


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, H) in [0, 1] -> (image - mean) / std, with ImageNet's statistics."""
    # Numbers, not tensors: a tensor made here would be copied from pageable memory each time.
    statistics = zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
    planes = [(images[:, i] - mean) / std for i, (mean, std) in enumerate(statistics)]
    return torch.stack(planes, dim=1)


def resize(images: Tensor, resolution: int) -> Tensor:
    """(B, 3, H, H) -> (B, 3, R, R): bicubic, not antialiased, not clamped."""
    size = (resolution, resolution)
    return F.interpolate(images, size, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class Owner:
    """Whose DINOv2 it is: what errors call it.

    Attributes:
        name: "teacher" or "encoder", which is also its section of the configuration.
        download: what to get where the files are not there.
    """

    name: str
    download: str


@dataclass(frozen=True)
class Dinov2Files:
    """What the config.json of a DINOv2 says; the weights are not read, transformers not loaded.

    Attributes:
        path: folder of config.json and model.safetensors.
        owner: what errors call it.
        model_type: a key of `CLASSES`.
        hidden_size: channels of a token.
        patch_size: side in pixels.
        prefix_tokens: class and register tokens, which come before those of the patches.
    """

    path: Path
    owner: Owner
    model_type: str
    hidden_size: int
    patch_size: int
    prefix_tokens: int

    @classmethod
    def read(cls, path: str | os.PathLike[str], owner: Owner) -> Dinov2Files:
        """Read the config.json in a folder.

        Raises:
            ValueError: no such folder, no weights in it, or not a DINOv2.
        """
        try:
            folder = existing_path(path, f"{owner.name}.path")
        except ValueError as error:
            raise ValueError(f"{error}; {owner.download}") from None
        file = folder / "config.json"
        if not file.is_file():
            what = "holds no config.json" if folder.is_dir() else "is not a folder"
            raise ValueError(f"the {owner.name}'s path {str(path)!r} {what}: {owner.download}")
        if not any(folder.glob("model*.safetensors")):
            raise ValueError(f"{str(path)!r} holds no model.safetensors: {owner.download}")
        try:
            config = json.loads(file.read_text())
            kind, hidden, patch = config["model_type"], config["hidden_size"], config["patch_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(file)!r} must be the config.json of a DINOv2 in transformers' format, got "
                f"{error!r}"
            ) from error
        if kind not in CLASSES:
            raise ValueError(
                f"{str(file)!r} has the model_type {kind!r}, expected {' or '.join(CLASSES)}: "
                f"{owner.download}"
            )
        registers = config.get("num_register_tokens", 4) if "registers" in kind else 0
        return cls(folder, owner, kind, hidden, patch, 1 + registers)


class Dinov2:
    """The frozen network: preprocessed images in, patch tokens after the final LayerNorm out.

    Args:
        files: which one.
        precision: "fp32" or "bf16", of the weights and activations.
        affine_norm: whether the final LayerNorm scales and shifts; without, its weight and bias in
            the file are not used.
        positions: side of the grid that the position table is resampled to once, in float32; None
            leaves it to transformers in each call, which for DINOv2 without registers does not
            antialias.
        rule: how it is resampled, see `resample_positions`.

    Attributes:
        model: the network, in eval mode, without gradients, on the CPU at first.
        dtype: of weights, activations and tokens.

    Raises:
        ValueError: missing or damaged weights, transformers not installed.
    """

    def __init__(
        self,
        files: Dinov2Files,
        precision: Precision,
        *,
        affine_norm: bool = True,
        positions: int | None = None,
        rule: PositionRule = "timm",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
        self._prefix = files.prefix_tokens
        model = _load(files, affine_norm)
        if positions is not None:
            table = model.embeddings.position_embeddings
            resampled = resample_positions(table.detach().float(), positions, rule)
            model.embeddings.position_embeddings = nn.Parameter(resampled)
        self.dtype = PRECISIONS[precision]
        self.model: nn.Module = model.eval().requires_grad_(False).to(self.dtype)
        self._compiled = runner(_hidden_states, Execution(mode="compile"), ())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Tokens of a batch, without a graph; on CUDA devices by torch.compile.

        Args:
            x: (B, 3, R, R) floating, resized and normalised, on the network's device.

        Returns:
            (B, N, hidden_size) in the network's precision: no class and register tokens.
        """
        return self._tokens(x)[:, self._prefix :]

    @torch.no_grad()
    def class_token(self, x: Tensor) -> Tensor:
        """(B, hidden_size): as `__call__`, of the class token."""
        return self._tokens(x)[:, 0]

    def _tokens(self, x: Tensor) -> Tensor:
        forward = self._compiled if x.device.type == "cuda" else _hidden_states
        # The bits must not depend on a caller's autocast.
        with torch.autocast(x.device.type, enabled=False):
            return forward(self.model, x.to(self.dtype))


def _hidden_states(model: nn.Module, x: Tensor) -> Tensor:
    return model(pixel_values=x).last_hidden_state


def resample_positions(table: Tensor, side: int, rule: PositionRule = "timm") -> Tensor:
    """(1, 1 + n n, D) -> (1, 1 + side side, D), bicubic; the class entry stays.

    timm antialiases. "hub" is DINOv2's own code, as torch.hub gives it: no antialiasing, and the
    scale is (side + 0.1) / n, against rounding in the size that comes out.
    """
    # The class token has a position of its own, outside of the grid.
    first, grid = table[:, :1], table[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return table
    planes = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    if rule == "hub":
        scale = (side + 0.1) / old
        planes = F.interpolate(planes, scale_factor=(scale, scale), mode="bicubic")
    else:
        planes = F.interpolate(planes, (side, side), mode="bicubic", antialias=True)
    return torch.cat([first, planes.flatten(2).transpose(1, 2)], dim=1)


def _load(files: Dinov2Files, affine_norm: bool) -> nn.Module:
    """The network with every weight from the folder; ValueError if one is not there."""
    owner = files.owner
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f'an online {owner.name} needs transformers ({error}): pip install "mixflow_fast[repa]"'
        ) from None
    # The class by its own name: the Auto classes would import the image processors, and with them
    # torchvision.
    cls = getattr(transformers, CLASSES[files.model_type])
    try:
        with quiet_transformers():
            model, report = cls.from_pretrained(
                str(files.path),
                local_files_only=True,
                use_safetensors=True,  # never a pickle that lies beside them
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load the {owner.name} {str(files.path)!r}: {error}") from error
    # transformers fills what is missing with random numbers and goes on. The mask token is of
    # DINOv2's own training.
    unused = ("mask_token", *(() if affine_norm else ("layernorm.weight", "layernorm.bias")))
    lacking = {*report["missing_keys"], *map(str, report["mismatched_keys"])}
    missing = sorted(key for key in lacking if not key.endswith(unused))
    if missing:
        raise ValueError(
            f"{str(files.path)!r} lacks {len(missing)} of the {owner.name}'s weights, the first is "
            f"{missing[0]}: {owner.download}"
        )
    if not affine_norm:
        without_affine_norm(model)
    model = model.float()
    refuse_not_finite(dict(model.named_parameters()), files.path, owner.download)
    return model


def without_affine_norm(model: nn.Module) -> None:
    """Take weight and bias from the final LayerNorm of a DINOv2, in place."""
    norm = model.layernorm
    model.layernorm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without its progress bars and its reports, as it was afterwards."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
