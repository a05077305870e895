"""mixflow_fast: post-training of flow-matching diffusion transformers with MixFlow."""

from __future__ import annotations

import os.path

TYPE_CHECKING = False  # typing's own would cost the command line more than all the rest of this
if TYPE_CHECKING:
    from mixflow_fast.kernels.interpolate import Moments
    from mixflow_fast.objective.mixflow import Interpolation, MixFlow, mixflow_loss

# `kernels/` stands beside this package in a checkout and inside it in a wheel.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

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
