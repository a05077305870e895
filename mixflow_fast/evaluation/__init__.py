"""Evaluation: sets of samples, their protocols, features of them, numbers and their errors."""

from mixflow_fast.evaluation.features.extractor import Extractor, Features, extract
from mixflow_fast.evaluation.frechet import (
    FEATURES,
    frechet_distance,
    moments,
    pooled_pixels,
    random_conv_features,
)
from mixflow_fast.evaluation.protocol import Protocol, check_comparable
from mixflow_fast.evaluation.sample_sets import SampleSet, SetPlan, read_set, write_set
from mixflow_fast.evaluation.uncertainty import Estimate, difference

__all__ = [
    "FEATURES",
    "Estimate",
    "Extractor",
    "Features",
    "Protocol",
    "SampleSet",
    "SetPlan",
    "check_comparable",
    "difference",
    "extract",
    "frechet_distance",
    "moments",
    "pooled_pixels",
    "random_conv_features",
    "read_set",
    "write_set",
]
