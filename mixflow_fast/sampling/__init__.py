"""Samples from a network: solvers, guidance, draws."""

from mixflow_fast.sampling.guidance import model_velocity
from mixflow_fast.sampling.samples import SampleResult, draw_labels, sample
from mixflow_fast.sampling.solvers import integrate, time_grid

__all__ = [
    "SampleResult",
    "draw_labels",
    "integrate",
    "model_velocity",
    "sample",
    "time_grid",
]
