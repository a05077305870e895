"""Evaluation: sets of samples, their protocols, and distances between them."""

from mixflow_fast.evaluation.frechet import (
    FEATURES,
    frechet_distance,
    moments,
    pooled_pixels,
    random_conv_features,
)
from mixflow_fast.evaluation.protocol import Protocol, check_comparable
from mixflow_fast.evaluation.sample_sets import SampleSet, SetPlan, read_set, write_set

__all__ = [
    "FEATURES",
    "Protocol",
    "SampleSet",
    "SetPlan",
    "check_comparable",
    "frechet_distance",
    "moments",
    "pooled_pixels",
    "random_conv_features",
    "read_set",
    "write_set",
]
