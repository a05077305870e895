"""Samples from a network: solvers, grids, guidance, remedies, presets, draws."""

from mixflow_fast.sampling.grids import sigma_grid, time_grid
from mixflow_fast.sampling.guidance import Guidance, guided_velocity, model_velocity
from mixflow_fast.sampling.prepared import PreparedSampling
from mixflow_fast.sampling.remedies import Remedy, parse_remedy
from mixflow_fast.sampling.sampler import Sampler
from mixflow_fast.sampling.samples import SampleResult, draw_labels, sample
from mixflow_fast.sampling.solvers import integrate
from mixflow_fast.sampling.source import SampleSource, sample_source, sampling_noise
from mixflow_fast.sampling.text_to_image import sample_latents

__all__ = [
    "Guidance",
    "PreparedSampling",
    "Remedy",
    "SampleResult",
    "SampleSource",
    "Sampler",
    "draw_labels",
    "guided_velocity",
    "integrate",
    "model_velocity",
    "parse_remedy",
    "sample",
    "sample_source",
    "sampling_noise",
    "sample_latents",
    "sigma_grid",
    "time_grid",
]
