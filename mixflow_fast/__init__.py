"""mixflow_fast: post-training of flow-matching diffusion transformers with MixFlow."""

from pathlib import Path

# `kernels/` stands beside this package in a checkout and inside it in a wheel.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.objective.mixflow import Interpolation, MixFlow, mixflow_loss

__all__ = ["Interpolation", "MixFlow", "Moments", "mixflow_loss", "__version__"]
