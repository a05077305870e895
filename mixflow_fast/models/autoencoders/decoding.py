"""From latents to 8-bit pictures: a decoder from a local folder, and the rule that rounds.

With x in [-1, 1] and y = (x + 1) / 2 in [0, 1], the rules of published code are

    round       floor(clamp(127.5 x + 128, 0, 255))    SiT, LightningDiT, EDM's pixels
    floor       floor(255 clamp(y, 0, 1))              REPA, RAE, ADM's sampler
    round_even  round(255 clamp(y, 0, 1))              diffusers; exact halves to the even number

"floor" is half a grey level darker on average, which distances of feature moments see; so the rule
is a part of every protocol.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from mixflow_fast.files import user_path
from mixflow_fast.models.autoencoders.rae_decoder import RAEDecoder
from mixflow_fast.models.autoencoders.sdvae import SDVAEDecoder
from mixflow_fast.models.dinov2 import Precision

Quantisation = Literal["round", "floor", "round_even"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)
_RAE_WEIGHTS = ("model.pt", "model.safetensors")
# Images in one call. On a CPU few: a chunk is filled up, and there each image takes seconds.
_CHUNKS = {"sdvae": 32, "rae": 64}
_LARGE_SIDE, _LARGE_CHUNK, _CPU_CHUNK = 512, 8, 4


def quantise(x: Tensor, rule: Quantisation = "round", low: float = -1.0) -> Tensor:
    """8-bit values of images, of the same shape, on their device.

    Args:
        x: floating, from `low` (black) to 1 (white); values outside are clamped.
        rule: see above.
        low: -1 or 0.

    Returns:
        uint8.

    Raises:
        ValueError: an unknown rule, another `low`, not floating, or NaN or infinity in x.
    """
    if rule not in QUANTISATIONS:
        raise ValueError(f"quantisation must be one of {', '.join(QUANTISATIONS)}, got {rule!r}")
    if low not in (-1.0, 0.0) or not x.is_floating_point():
        raise ValueError(f"x must be floating with low = -1 or 0, got {x.dtype} and low = {low}")
    if not bool(x.isfinite().all()):
        raise ValueError("pictures must be finite, got NaN or infinity in what was decoded")
    x = x.float()
    if rule == "round":
        # In x and not in y: both are exact in the official code's own terms only.
        scaled = 127.5 * x + 128.0 if low else 255.0 * x + 0.5
        return scaled.clamp(0.0, 255.0).to(torch.uint8)
    y = (x + 1.0) / 2.0 if low else x
    scaled = 255.0 * y.clamp(0.0, 1.0)
    return (scaled.round() if rule == "round_even" else scaled).to(torch.uint8)


class LatentDecoder(Protocol):
    """What decodes latents to floating images: `SDVAEDecoder`, `RAEDecoder`."""

    kind: str
    low: float
    channels: int
    upsampling: int
    precision: Precision
    model: nn.Module

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) float32 around [low, 1]."""
        ...

    def record(self) -> dict[str, str] | dict[str, str | float]:
        """What identifies it in a protocol."""
        ...

    def to(self, device: str | torch.device) -> LatentDecoder:
        """Take it to a device; returns itself."""
        ...


class Decoder:
    """Latents in, 8-bit pictures out, in chunks of one size and never in tiles.

    The last chunk is filled up, so that the bits of a picture depend neither on how many there are
    nor on their neighbours.

    Args:
        network: what decodes.
        quantisation: the rule that rounds.
        chunk: pictures in one call; None: 32 for an SD-VAE (8 from 512 pixels on), 64 for RAE, 4 on
            a CPU.
    """

    def __init__(
        self,
        network: LatentDecoder,
        quantisation: Quantisation = "round",
        chunk: int | None = None,
    ) -> None:
        if quantisation not in QUANTISATIONS:
            raise ValueError(
                f"quantisation must be one of {', '.join(QUANTISATIONS)}, got {quantisation!r}"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        self.network, self.quantisation, self._chunk = network, quantisation, chunk

    def to(self, device: str | torch.device) -> Decoder:
        """Take it to a device; returns itself."""
        self.network.to(device)
        return self

    def size(self, side: int) -> int:
        """Side in pixels of the picture of a latent of this side."""
        return side * self.network.upsampling

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse latents of a shape (C, h, w) that it cannot decode, before any is made.

        Raises:
            ValueError: says which it takes.
        """
        fixed = getattr(self.network, "shape", (self.network.channels, *shape[1:]))
        if tuple(shape) != tuple(fixed):
            raise ValueError(
                f"the decoder takes latents of {tuple(fixed)}, the network makes {tuple(shape)}: "
                "give the decoder of the autoencoder that its training latents were made by"
            )

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures of latents.

        Args:
            latents: (B, C, h, w) floating, on any device.

        Returns:
            (B, 3, H, W) uint8 on the decoder's device.

        Raises:
            ValueError: latents of another shape, or pictures that are not finite.
        """
        device = next(self.network.model.parameters()).device
        chunk = self._chunk or self._usual_chunk(latents.shape[-1], device)
        side = latents.shape[-2:]
        out = torch.empty(
            (len(latents), 3, *(self.size(n) for n in side)), dtype=torch.uint8, device=device
        )
        for start in range(0, len(latents), chunk):
            rows = latents[start : start + chunk].to(device)
            filled = torch.cat([rows, rows[-1:].expand(chunk - len(rows), *rows.shape[1:])])
            images = self.network.decode(filled)[: len(rows)]
            out[start : start + chunk] = quantise(images, self.quantisation, self.network.low)
        return out

    def record(self) -> dict[str, str] | dict[str, str | float]:
        """What identifies the decoder in a protocol; the rule that rounds is named apart."""
        return self.network.record()

    def _usual_chunk(self, side: int, device: torch.device) -> int:
        if device.type == "cpu":
            return _CPU_CHUNK
        large = self.network.kind == "sdvae" and self.size(side) >= _LARGE_SIDE
        return _LARGE_CHUNK if large else _CHUNKS[self.network.kind]


def load_decoder(
    folder: str | os.PathLike[str],
    *,
    stats: str | os.PathLike[str] | None = None,
    scale: float | None = None,
    precision: Precision = "fp32",
    quantisation: Quantisation = "round",
    name: str = "--decoder",
) -> Decoder:
    """The decoder of a local folder; nothing is downloaded.

    Args:
        folder: of a diffusers `AutoencoderKL` (SD-VAE); or of a decoder of RAE: config.json, and
            the official file as model.pt or model.safetensors.
        stats: RAE's `stat.pt`, by which its latents were normalised.
        scale: what latents of an SD-VAE were multiplied by; None: its file's scaling_factor.
        precision: of an SD-VAE; RAE's decoder works in float32.
        quantisation: see `quantise`.
        name: what `folder` is called where it was given, for errors.

    Raises:
        ValueError: no decoder in the folder, damaged files, or an option of the other kind.
    """
    path = user_path(folder)
    weights = next((path / file for file in _RAE_WEIGHTS if (path / file).is_file()), None)
    if weights is None or _class_name(path) is not None:
        if stats is not None:
            raise ValueError(
                f"statistics belong to RAE's latents, and {name} {str(folder)!r} is no decoder of "
                f"RAE (config.json beside {' or '.join(_RAE_WEIGHTS)}): leave them out"
            )
        return Decoder(
            SDVAEDecoder(folder, precision=precision, scale=scale, name=name), quantisation
        )
    for given, option in ((scale is not None, "a scale"), (precision != "fp32", "bf16")):
        if given:
            raise ValueError(f"{name} {str(folder)!r} is a decoder of RAE, for which there is no "
                             f"{option.removeprefix('a ')}: leave it out")  # fmt: skip
    return Decoder(RAEDecoder(weights, path / "config.json", stats=stats), quantisation)


def _class_name(folder: Path) -> object:
    """What a config.json of diffusers' calls its class; None for one of transformers'."""
    try:
        return json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
