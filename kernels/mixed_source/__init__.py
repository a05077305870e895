"""The network's input where a predictor makes the noise end; formulas stand in `op.py`."""

from mixflow_fast.kernels.mixed_source.op import mix_and_interpolate
from mixflow_fast.kernels.mixed_source.reference import mix_and_interpolate_reference

__all__ = ["mix_and_interpolate", "mix_and_interpolate_reference"]
