"""The network's input where a predictor makes the noise end; formulas stand in `reference.py`."""

from mixflow_fast.kernels.mixed_source.reference import mix_and_interpolate_reference

__all__ = ["mix_and_interpolate_reference"]
