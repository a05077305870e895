"""mixflow_fast: post-training of flow-matching diffusion transformers with MixFlow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixflow_fast.kernels.interpolate import Moments
    from mixflow_fast.objective.mixflow import Interpolation, MixFlow, mixflow_loss

# `kernels/` stands beside this package in a checkout and inside it in a wheel.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

__all__ = ["Interpolation", "MixFlow", "Moments", "mixflow_loss", "__version__"]


def __getattr__(name: str) -> object:
    """The public names, when one is asked for: with them comes torch, a second or more."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mixflow_fast.kernels.interpolate import Moments
    from mixflow_fast.objective.mixflow import Interpolation, MixFlow, mixflow_loss

    names = (Interpolation, MixFlow, Moments, mixflow_loss)
    globals().update({found.__name__: found for found in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
