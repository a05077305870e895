"""Files of an `AutoencoderKL` of diffusers in a local folder: configuration, weights, hashes.

Nothing is ever downloaded, and no weight is made up: diffusers fills what is lacking with random
numbers and goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from torch import nn

from mixflow_fast.files import existing_path, sha256
from mixflow_fast.messages import error_line
from mixflow_fast.models.text_to_image.adapter import LatentMap
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
        shift: what is taken from them first; 0 for Stable Diffusion 1 and 2, 0.0609 for 3.
    """

    path: Path
    latent_channels: int
    downsampling: int
    scale: float
    shift: float = 0.0

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
        if config.get("latents_mean"):
            raise ValueError(
                f"{str(file)!r} has statistics of each channel (latents_mean), which are not "
                f"applied here: {_DOWNLOAD}"
            )
        # diffusers' own defaults, which sd-vae-ft-* leave out.
        channels, blocks = config.get("latent_channels", 4), config.get("block_out_channels", (64,))
        try:
            latents = LatentMap.of_vae({"scaling_factor": 0.18215} | config)
        except ValueError as error:
            raise ValueError(f"{str(file)!r} is not read: {error}") from None
        return cls(folder, channels, 2 ** (len(blocks) - 1), latents.scale, latents.shift)

    @property
    def latents(self) -> LatentMap:
        """Between latents and what a network trains on."""
        return LatentMap(self.shift, self.scale)

    def shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image; ValueError if none fits.

        Args:
            height, width: pixels; width None: as the height.
        """
        width = height if width is None else width
        if min(height, width) < 1 or height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images of {width} x {height} pixels have no latent of {str(self.path)!r}: their "
                f"sides must be multiples of {self.downsampling}"
            )
        return self.latent_channels, height // self.downsampling, width // self.downsampling

    def record(self) -> dict[str, str]:
        """What identifies the encoder: class, hashes of its two files, version of diffusers.

        Raises:
            ValueError: diffusers is not installed.
        """
        return {
            "class": CLASS,
            "config_sha256": sha256(self.path / "config.json"),
            "weights_sha256": sha256(self.path / WEIGHTS),
            "library": f"diffusers {_diffusers().__version__}",
        }


def load_autoencoder(files: SDVAEFiles) -> nn.Module:
    """The autoencoder with every weight from the folder, in float32."""
    autoencoder = _diffusers().AutoencoderKL
    try:
        # It is filled with random numbers first, which must not be those that the caller draws.
        with quiet_diffusers(), torch.random.fork_rng(devices=[]):
            model, report = autoencoder.from_pretrained(
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


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            f"Stable Diffusion's autoencoder needs diffusers ({error}): "
            'pip install "mixflow_fast[vae]"'
        ) from None
    return diffusers


def _check_complete(report: Mapping[str, object], path: Path) -> None:
    """ValueError if weights are lacking: diffusers fills them with random numbers and goes on."""
    lacking = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if lacking:
        raise ValueError(
            f"{str(path)!r} lacks {len(lacking)} of the autoencoder's weights, the first is "
            f"{lacking[0]}: {_DOWNLOAD}"
        )


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """diffusers without its remarks on weights and types, as it was afterwards."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
