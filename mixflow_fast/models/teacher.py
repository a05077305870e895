"""The frozen encoder whose patch tokens REPA aligns with (Yu et al., arXiv 2410.06940): DINOv2.

    image / 255 -> (image - mean) / std -> bicubic to (R, R), no antialiasing -> DINOv2
        -> last hidden state after the final LayerNorm, without class and register tokens

The order is REPA's: normalised first, resized after, so that nothing is rounded to bytes or clamped
in between. The side R gives one patch of the teacher per token of the model: 224 for 256 pixels,
448 for 512. Weights are read from a local folder and nothing is ever downloaded.
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
from mixflow_fast.models.weights.damage import refuse_not_finite

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
Precision = Literal["bf16", "fp32"]
PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Positions = Literal["repa", "model"]
POSITIONS = get_args(Positions)
_DOWNLOAD = (
    "download one first, for example `hf download facebook/dinov2-base config.json "
    "model.safetensors --local-dir dinov2-base`, and give that folder (768 channels, REPA's "
    "default; nothing is downloaded here)"
)


def preprocess(images: Tensor, resolution: int) -> Tensor:
    """REPA's preprocessing of the teacher's images.

        F.interpolate((image / 255 - mean) / std, (R, R), mode="bicubic")

    Args:
        images: (B, 3, H, H) uint8, or floating in [-1, 1] as a model of pixels sees them.
        resolution: R.

    Returns:
        (B, 3, R, R) float32 (float64 for float64 images).

    Raises:
        ValueError: another shape or an integer dtype other than uint8.
    """
    square = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
    if not square or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "images must be (B, 3, H, H), uint8 or floating in [-1, 1], got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    x = images.to(dtype)
    x = x / 255.0 if images.dtype == torch.uint8 else (x + 1.0) / 2.0
    # Numbers, not tensors: a tensor made here would be copied from pageable memory each time.
    statistics = zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
    planes = [(x[:, i] - mean) / std for i, (mean, std) in enumerate(statistics)]
    size = (resolution, resolution)
    return F.interpolate(torch.stack(planes, dim=1), size, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class TeacherFiles:
    """What the config.json of a teacher says; the weights are not read, transformers not loaded.

    Attributes:
        path: folder of config.json and model.safetensors.
        model_type: a key of `CLASSES`.
        hidden_size: channels of a token.
        patch_size: side in pixels.
        prefix_tokens: class and register tokens, which come before those of the patches.
    """

    path: Path
    model_type: str
    hidden_size: int
    patch_size: int
    prefix_tokens: int

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TeacherFiles:
        """Read the config.json of a teacher.

        Raises:
            ValueError: no such folder, no weights in it, or not a DINOv2.
        """
        try:
            folder = existing_path(path, "teacher.path")
        except ValueError as error:
            raise ValueError(f"{error}; {_DOWNLOAD}") from None
        file = folder / "config.json"
        if not file.is_file():
            what = "holds no config.json" if folder.is_dir() else "is not a folder"
            raise ValueError(f"the teacher's path {str(path)!r} {what}: {_DOWNLOAD}")
        if not any(folder.glob("model*.safetensors")):
            raise ValueError(f"{str(path)!r} holds no model.safetensors: {_DOWNLOAD}")
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
                f"{_DOWNLOAD}"
            )
        registers = config.get("num_register_tokens", 4) if "registers" in kind else 0
        return cls(folder, kind, hidden, patch, 1 + registers)

    def resolution(self, side: int, resolution: int | None = None) -> int:
        """Pixels that give side x side tokens; `resolution` is checked if given.

        Raises:
            ValueError: `resolution` gives another number of tokens.
        """
        expected = side * self.patch_size
        if resolution is None:
            return expected
        if resolution < 1 or resolution // self.patch_size != side:
            tokens = max(resolution // self.patch_size, 0) ** 2
            raise ValueError(
                f"the teacher's resolution {resolution} gives {tokens} tokens of "
                f"{self.patch_size} x {self.patch_size} pixels, the model has {side * side}: set "
                f"teacher.resolution={expected}, or null for just that"
            )
        return resolution


class Teacher:
    """A frozen DINOv2 from a local folder: images in, normalised patch tokens out.

    It is no `nn.Module`, so that no module can take it for a part of itself: it has no place in
    the optimizer, the EMA, DeepSpeed or a checkpoint.

    Args:
        path: folder with config.json and model.safetensors, as transformers saves a `Dinov2Model`
            or `Dinov2WithRegistersModel`.
        side: tokens along the side of the model's grid; the features have side * side.
        resolution: side in pixels of what the teacher sees; None is side * patch size, which is
            REPA's (224 for 16 x 16, 448 for 32 x 32).
        precision: "fp32" or "bf16", of the weights and activations.
        positions: how the position table becomes side x side: "repa" resamples it once, in
            float32, bicubic with antialiasing (timm's function, which REPA calls); "model" leaves
            it to transformers, which for DINOv2 without registers does not antialias.
        device: where it stays.

    Attributes:
        hidden_size: channels of the features.
        tokens: side * side.
        model: the encoder, in eval mode, without gradients.

    Raises:
        ValueError: missing or foreign files, missing weights, sizes that do not fit, transformers
            not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        side: int,
        *,
        resolution: int | None = None,
        precision: Precision = "fp32",
        positions: Positions = "repa",
        device: str | torch.device = "cpu",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}")
        config = TeacherFiles.read(path)
        self.resolution = config.resolution(side, resolution)
        self.hidden_size, self.tokens = config.hidden_size, side * side
        self._prefix = config.prefix_tokens
        model = _load(config)
        if positions == "repa":
            table = model.embeddings.position_embeddings
            resampled = resample_positions(table.detach().float(), side)
            model.embeddings.position_embeddings = nn.Parameter(resampled)
        self._dtype = PRECISIONS[precision]
        self.model: nn.Module = model.eval().requires_grad_(False).to(device, self._dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: (B, 3, H, H) uint8, or floating in [-1, 1], on the teacher's device.

        Returns:
            (B, tokens, hidden_size) in the teacher's precision, without a graph.

        Raises:
            ValueError: as `preprocess`.
        """
        x = preprocess(images, self.resolution).to(self._dtype)
        # The bits must not depend on a caller's autocast.
        with torch.autocast(x.device.type, enabled=False):
            hidden = self.model(pixel_values=x).last_hidden_state
        return hidden[:, self._prefix :]


def resample_positions(table: Tensor, side: int) -> Tensor:
    """(1, 1 + n n, D) -> (1, 1 + side side, D): bicubic, antialiased; the class entry stays."""
    # The class token has a position of its own, outside of the grid.
    first, grid = table[:, :1], table[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return table
    planes = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, (side, side), mode="bicubic", antialias=True)
    return torch.cat([first, planes.flatten(2).transpose(1, 2)], dim=1)


def _load(config: TeacherFiles) -> nn.Module:
    """The encoder with every weight from the folder; ValueError if one is not there."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f'an online teacher needs transformers ({error}): pip install "mixflow_fast[repa]"'
        ) from None
    # The class by its own name: the Auto classes would import the image processors, and with them
    # torchvision.
    cls = getattr(transformers, CLASSES[config.model_type])
    try:
        with _quiet():
            model, report = cls.from_pretrained(
                str(config.path),
                local_files_only=True,
                use_safetensors=True,  # never a pickle that lies beside them
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load the teacher {str(config.path)!r}: {error}") from error
    # transformers fills what is missing with random numbers and goes on. The mask token is of the
    # teacher's own training.
    lacking = {*report["missing_keys"], *map(str, report["mismatched_keys"])}
    missing = sorted(key for key in lacking if not key.endswith("mask_token"))
    if missing:
        raise ValueError(
            f"{str(config.path)!r} lacks {len(missing)} of the teacher's weights, the first is "
            f"{missing[0]}: {_DOWNLOAD}"
        )
    model = model.float()
    refuse_not_finite(dict(model.named_parameters()), config.path, _DOWNLOAD)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bar and its report, as it was afterwards."""
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
