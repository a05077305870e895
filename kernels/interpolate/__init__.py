"""The network's input: times, noise and interpolation in one launch; formulas stand in `op.py`."""

from mixflow_fast.kernels.interpolate.op import interpolate
from mixflow_fast.kernels.interpolate.reference import (
    Moments,
    draw_times,
    interpolate_reference,
    sample_moments,
)
from mixflow_fast.kernels.layout import to_tokens

__all__ = [
    "Moments",
    "draw_times",
    "interpolate",
    "interpolate_reference",
    "sample_moments",
    "to_tokens",
]
