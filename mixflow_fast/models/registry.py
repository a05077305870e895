"""Table of the published networks, and `build` that makes one by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from mixflow_fast.messages import did_you_mean
from mixflow_fast.models.ditdh import DiTDH
from mixflow_fast.models.network import ModelArgument, Network
from mixflow_fast.models.sit import SiT
from mixflow_fast.models.songunet import SongUNet
from mixflow_fast.models.weights.naming import ClassName

SIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

# RAE publishes S and XL; B and L are those encoders under the same head.
DITDH_HEAD: dict[str, int] = {"hidden_size": 2048, "depth": 2, "num_heads": 16}
DITDH_SIZES: dict[str, dict[str, tuple[int, int]]] = {
    size: {key: (value, DITDH_HEAD[key]) for key, value in sizes.items()}
    for size, sizes in SIT_SIZES.items()
}

# Of MixFlow's mixed sources (arXiv 2604.09181). Dropout is that of its CIFAR-10 and FFHQ; AFHQv2
# has 0.25.
SONGUNET_SIZES: dict[str, dict[str, ModelArgument]] = {
    "CIFAR10": {"img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13},
    "64": {"img_resolution": 64, "channel_mult": [1, 2, 2, 2], "dropout": 0.05},
}
_SONGUNET_WIDTHS = {"model_channels": 128, "num_blocks": 4, "attn_resolutions": [16]}

_TRANSFORMERS: dict[str, Callable[..., Network]] = {
    f"SiT-{size}/{patch}": partial(SiT, patch_size=patch, **sizes)
    for size, sizes in SIT_SIZES.items()
    for patch in (2, 4, 8)
} | {f"DiTDH-{size}": partial(DiTDH, **sizes) for size, sizes in DITDH_SIZES.items()}
MODELS: dict[str, Callable[..., Network]] = _TRANSFORMERS | {
    f"SongUNet-{size}": partial(SongUNet, **sizes, **_SONGUNET_WIDTHS)
    for size, sizes in SONGUNET_SIZES.items()
}


def build(name: str, **kwargs: ModelArgument | tuple[int, int]) -> Network:
    """A published model by name.

    Args:
        name: `SiT-{S,B,L,XL}/{2,4,8}` (`z_dims=[...]` makes it REPA's), `DiTDH-{S,B,L,XL}` or
            `SongUNet-{CIFAR10,64}`.
        kwargs: further arguments of the class, or other values than the published ones.

    Raises:
        ValueError: for an unknown name, with the nearest valid one.
    """
    if name not in MODELS:
        raise ValueError(
            f"model name must be one of {', '.join(MODELS)}, got {name!r}"
            f"{did_you_mean(name, MODELS)}"
        )
    return MODELS[name](**kwargs)


def published_size(class_name: ClassName, kwargs: Mapping[str, object]) -> str | None:
    """ "S", "B", "L" or "XL" by width, depth and heads, of a SongUNet "CIFAR10" or "64"; None for
    another size.
    """
    if class_name == "SongUNet":
        keys = ("img_resolution", "channel_mult", *_SONGUNET_WIDTHS)
        own = [_flat(kwargs[key]) for key in keys]
        named = ((n, s | _SONGUNET_WIDTHS) for n, s in SONGUNET_SIZES.items())
        return next((n for n, s in named if [_flat(s[key]) for key in keys] == own), None)
    sizes = SIT_SIZES if class_name == "SiT" else DITDH_SIZES
    keys = ("hidden_size", "depth", "num_heads")
    own = [_flat(kwargs[key]) for key in keys]
    return next((n for n, s in sizes.items() if [_flat(s[key]) for key in keys] == own), None)


def describe_model(class_name: ClassName, kwargs: Mapping[str, object]) -> str:
    """A network in words: its published name if it has one, and the resolution."""
    if class_name == "TextToImage":
        return f"{kwargs.get('class')} of diffusers"
    size = published_size(class_name, kwargs)
    if class_name == "SongUNet":
        return _describe_songunet(size, kwargs)
    if size is None:
        width, blocks = ("+".join(map(str, _flat(kwargs[key]))) for key in ("hidden_size", "depth"))
        name = f"{'DiT-DH' if class_name == 'DiTDH' else 'SiT'} of width {width}, depth {blocks}"
    else:
        name = f"SiT-{size}/{kwargs['patch_size']}" if class_name == "SiT" else f"DiTDH-{size}"
    if kwargs.get("z_dims"):
        name = f"REPA {name}"
    side, channels = kwargs["input_size"], kwargs["in_channels"]
    # Pixels per latent cell: of Stable Diffusion's autoencoder, and of RAE's decoders.
    cell = {("SiT", 4): 8, ("SiT", 3): 1, ("SiT", 1): 1, ("DiTDH", 768): 16}.get(
        (class_name, channels)
    )
    return f"{name}, {side * cell} px" if cell else f"{name}, latents {channels}x{side}x{side}"


def _describe_songunet(size: str | None, kwargs: Mapping[str, object]) -> str:
    width, multipliers = kwargs["model_channels"], _flat(kwargs["channel_mult"])
    widths = ", ".join(str(width * multiplier) for multiplier in multipliers)
    name = f"SongUNet-{size}" if size else f"SongUNet of widths {widths}"
    told = ", told w" if kwargs.get("activate_w_mode") else ""
    side, channels = kwargs["img_resolution"], kwargs["in_channels"]
    what = f"{side} px" if channels in (1, 3) else f"latents {channels}x{side}x{side}"
    return f"{name}{told}, {what}"


def _flat(value: object) -> tuple[object, ...]:
    """A size of a SiT, or the two of a DiT-DH, in one form."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)
