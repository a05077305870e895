"""Samples from a network: solvers, guidance, draws."""

from mixflow_fast.sampling.samples import (
    SampleResult,
    draw_labels,
    integrate,
    model_velocity,
    sample,
    time_grid,
)

__all__ = [
    "SampleResult",
    "draw_labels",
    "integrate",
    "model_velocity",
    "sample",
    "time_grid",
]
