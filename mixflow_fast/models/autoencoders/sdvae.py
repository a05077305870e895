"""Stable Diffusion's autoencoder (Rombach et al., arXiv 2112.10752), of diffusers.

    mean, logvar = encode(image / 127.5 - 1)        logvar clamped to [-30, 20]
    x1 = scale (mean + exp(logvar / 2) eps),  eps ~ N(0, I),  scale = 0.18215
    image = decode(x1 / scale)                      around [-1, 1]

Weights are read from a local folder, and nothing is ever downloaded. Float32 with PyTorch's own
choice of TF32, as the encodings of SiT and REPA were made. Never in tiles: their seams change the
latents.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mixflow_fast.files import existing_path, sha256
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.messages import error_line
from mixflow_fast.models.dinov2 import PRECISIONS, Precision
from mixflow_fast.models.execution import Execution, runner
from mixflow_fast.models.weights.damage import refuse_not_finite

CLASS = "AutoencoderKL"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_DOWNLOAD = (
    "download one first, for example `hf download stabilityai/sd-vae-ft-mse config.json "
    f"{WEIGHTS} --local-dir sd-vae-ft-mse`, and give that folder (SiT's latents are of "
    "sd-vae-ft-ema, REPA's of sd-vae-ft-mse; nothing is downloaded here)"
)


@dataclass(frozen=True)
class SDVAEFiles:
    """What the config.json of an autoencoder says; the weights are not read.

    Attributes:
        path: folder of config.json and diffusion_pytorch_model.safetensors.
        latent_channels: C of a latent.
        downsampling: pixels along the side of a place of the latent, 8 for Stable Diffusion's.
        scale: factor of the latents.
    """

    path: Path
    latent_channels: int
    downsampling: int
    scale: float

    @classmethod
    def read(cls, path: str | os.PathLike[str], name: str = "encoder.path") -> SDVAEFiles:
        """Read the config.json of a folder.

        Args:
            path: as a user gave it.
            name: what it is called there, for errors.

        Raises:
            ValueError: no such folder, no weights in it, or another class than AutoencoderKL.
        """
        try:
            folder = existing_path(path, name)
        except ValueError as error:
            raise ValueError(f"{error}; {_DOWNLOAD}") from None
        file = folder / "config.json"
        if not file.is_file():
            inside = (folder / "vae" / "config.json").is_file()
            way_out = f"give {str(folder / 'vae')!r}" if inside else _DOWNLOAD
            what = "holds no config.json" if folder.is_dir() else "is not a folder"
            raise ValueError(f"{name} {str(path)!r} {what}: {way_out}")
        try:
            config = json.loads(file.read_text())
            kind = config.get("_class_name")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(file)!r} must be the config.json of an {CLASS} of diffusers, got {error!r}"
            ) from error
        if kind != CLASS:
            raise ValueError(
                f"{str(file)!r} has the _class_name {kind!r}, expected {CLASS!r}: {_DOWNLOAD}"
            )
        if not (folder / WEIGHTS).is_file():
            pickle = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
            why = " (a .bin or .ckpt is a pickle, which is not read)" if pickle else ""
            raise ValueError(f"{str(path)!r} holds no {WEIGHTS}{why}: {_DOWNLOAD}")
        if config.get("shift_factor") or config.get("latents_mean"):
            raise ValueError(
                f"{str(file)!r} shifts its latents (shift_factor or latents_mean), which is not "
                f"done here: {_DOWNLOAD}"
            )
        blocks = config.get("block_out_channels", (64,))
        # diffusers' own defaults, which sd-vae-ft-* leave out.
        channels, scale = config.get("latent_channels", 4), config.get("scaling_factor", 0.18215)
        return cls(folder, channels, 2 ** (len(blocks) - 1), scale)

    def shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of size x size pixels; ValueError if none fits."""
        if size < 1 or size % self.downsampling:
            raise ValueError(
                f"images of {size} x {size} pixels have no latent of {str(self.path)!r}: their "
                f"side must be a multiple of {self.downsampling}"
            )
        side = size // self.downsampling
        return self.latent_channels, side, side


class SDVAE:
    """A frozen `AutoencoderKL` from a local folder: uint8 images in, `Moments` of latents out.

    Args:
        path: folder with config.json and diffusion_pytorch_model.safetensors.
        size: side of the images in pixels.
        precision: "fp32", or "bf16" of weights and activations: about 1% off in the mean.
        name: what `path` is called where it was given, for errors.

    Attributes:
        shape: (C, h, w) of a latent.
        scale: factor of the latents, which the moments carry and which is not applied.
        model: the network without its decoder, in eval mode, without gradients, channels last.

    Raises:
        ValueError: missing, foreign or damaged files, a size that does not fit, diffusers not
            installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        precision: Precision = "fp32",
        name: str = "encoder.path",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
        self.files = SDVAEFiles.read(path, name)
        self.shape, self.scale = self.files.shape(size), self.files.scale
        self.precision: Precision = precision
        model = _load(self.files)
        # What decodes is no part of encoding: it would take 200 MB of the device.
        model.decoder = model.post_quant_conv = None
        self._dtype = PRECISIONS[precision]
        model = model.eval().requires_grad_(False)
        with _quiet():
            self.model: nn.Module = model.to(self._dtype, memory_format=torch.channels_last)
        self._compiled = runner(_mean_and_std, Execution(mode="compile"), ())

    def to(self, device: str | torch.device) -> SDVAE:
        """Take it to a device; returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Moments:
        """Moments of the latents of a batch, without a graph; on CUDA devices by torch.compile.

        Args:
            images: (B, 3, H, H) uint8 on the device of the weights.

        Returns:
            mean and std, (B, C, H / 8, H / 8) float32 each, and `scale`.

        Raises:
            ValueError: another shape or dtype.
        """
        side = self.shape[1] * self.files.downsampling
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"images must be uint8 (B, 3, {side}, {side}), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        x = images.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1.0
        forward = self._compiled if x.device.type == "cuda" else _mean_and_std
        # The bits must not depend on a caller's autocast.
        with torch.autocast(x.device.type, enabled=False):
            mean, std = forward(self.model, x.to(self._dtype))
        return Moments(mean, std, self.scale)

    def record(self) -> dict[str, str]:
        """What identifies the encoder: class, hashes of its two files, version of diffusers."""
        import diffusers

        return {
            "class": CLASS,
            "config_sha256": sha256(self.files.path / "config.json"),
            "weights_sha256": sha256(self.files.path / WEIGHTS),
            "library": f"diffusers {diffusers.__version__}",
        }


class SDVAEDecoder:
    """The other half of a frozen `AutoencoderKL`: latents in, images around [-1, 1] out.

    Args:
        path: folder with config.json and diffusion_pytorch_model.safetensors.
        precision: "fp32", or "bf16" of weights and activations.
        scale: what the latents were multiplied by; None: the file's scaling_factor.
        name: what `path` is called where it was given, for errors.

    Attributes:
        kind: "sdvae", of a protocol.
        low: what black is, of images that reach to 1.
        channels: C of a latent; its sides are free.
        upsampling: pixels along the side of a place of the latent.
        scale: as above.
        model: the network without its encoder, in eval mode, without gradients, channels last.

    Raises:
        ValueError: missing, foreign or damaged files, a scale that is not positive, diffusers not
            installed.
    """

    kind, low = "sdvae", -1.0

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        precision: Precision = "fp32",
        scale: float | None = None,
        name: str = "--decoder",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
        self.files = SDVAEFiles.read(path, name)
        self.scale = self.files.scale if scale is None else scale
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of latents must be a number > 0, got {scale!r}")
        self.channels, self.upsampling = self.files.latent_channels, self.files.downsampling
        self.precision: Precision = precision
        model = _load(self.files)
        model.encoder = model.quant_conv = None
        self._dtype = PRECISIONS[precision]
        model = model.eval().requires_grad_(False)
        with _quiet():
            self.model: nn.Module = model.to(self._dtype, memory_format=torch.channels_last)

    def to(self, device: str | torch.device) -> SDVAEDecoder:
        """Take it to a device; returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents as a network makes them, at their `scale`.

        Args:
            latents: (B, C, h, w) floating, on the device of the weights.

        Returns:
            (B, 3, 8 h, 8 w) float32 in NCHW, around [-1, 1], not clamped.

        Raises:
            ValueError: another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents must be (B, {self.channels}, h, w) for {str(self.files.path)!r}, got "
                f"{tuple(latents.shape)}"
            )
        z = (latents.float() / self.scale).to(self._dtype, memory_format=torch.channels_last)
        with torch.autocast(z.device.type, enabled=False):
            return self.model.decode(z).sample.float().contiguous()

    def record(self) -> dict[str, str | float]:
        """Of a protocol: kind, SHA-256 of the weights, scale."""
        return {
            "kind": self.kind,
            "sha256": sha256(self.files.path / WEIGHTS),
            "scale": self.scale,
        }


def _mean_and_std(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 in NCHW."""
    posterior = model.encode(x).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return mean.contiguous(), torch.exp(0.5 * logvar).contiguous()


def _load(files: SDVAEFiles) -> nn.Module:
    """The autoencoder with every weight from the folder, in float32."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            f"Stable Diffusion's autoencoder needs diffusers ({error}): pip install diffusers"
        ) from None
    try:
        # It is filled with random numbers first, which must not be those that the caller draws.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, report = AutoencoderKL.from_pretrained(
                str(files.path),
                local_files_only=True,
                use_safetensors=True,  # never a pickle that lies beside them
                low_cpu_mem_usage=False,  # which would leave missing weights without memory
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load the autoencoder {str(files.path)!r}: {error_line(error)}"
        ) from error
    _check_complete(report, files.path)
    model = model.float()
    refuse_not_finite(dict(model.named_parameters()), files.path, _DOWNLOAD)
    return model


def _check_complete(report: Mapping[str, object], path: Path) -> None:
    """ValueError if weights are lacking: diffusers fills them with random numbers and goes on."""
    lacking = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if lacking:
        raise ValueError(
            f"{str(path)!r} lacks {len(lacking)} of the autoencoder's weights, the first is "
            f"{lacking[0]}: {_DOWNLOAD}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """diffusers without its remarks on weights and types, as it was afterwards."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
