"""Table of the published networks, and `build` that makes one by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from mixflow_fast.messages import did_you_mean
from mixflow_fast.models.ditdh import DiTDH
from mixflow_fast.models.network import ModelArgument
from mixflow_fast.models.sit import SiT
from mixflow_fast.models.transformer import Transformer
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

MODELS: dict[str, Callable[..., Transformer]] = {
    f"SiT-{size}/{patch}": partial(SiT, patch_size=patch, **sizes)
    for size, sizes in SIT_SIZES.items()
    for patch in (2, 4, 8)
} | {f"DiTDH-{size}": partial(DiTDH, **sizes) for size, sizes in DITDH_SIZES.items()}


def build(name: str, **kwargs: ModelArgument | tuple[int, int]) -> Transformer:
    """A published model by name.

    Args:
        name: `SiT-{S,B,L,XL}/{2,4,8}` (`z_dims=[...]` makes it REPA's) or `DiTDH-{S,B,L,XL}`.
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
    """ "S", "B", "L" or "XL" by width, depth and heads; None for another size."""
    sizes = SIT_SIZES if class_name == "SiT" else DITDH_SIZES
    keys = ("hidden_size", "depth", "num_heads")
    own = [_flat(kwargs[key]) for key in keys]
    return next((n for n, s in sizes.items() if [_flat(s[key]) for key in keys] == own), None)


def describe_model(class_name: ClassName, kwargs: Mapping[str, object]) -> str:
    """A network in words: its published name if it has one, and the resolution."""
    size = published_size(class_name, kwargs)
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


def _flat(value: object) -> tuple[object, ...]:
    """A size of a SiT, or the two of a DiT-DH, in one form."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)
