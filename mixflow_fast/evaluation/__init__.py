"""Evaluation: features of sample sets, numbers of them and their errors, validation losses."""

from mixflow_fast.evaluation.features.extractor import Extractor, Features, extract
from mixflow_fast.evaluation.frechet import (
    FEATURES,
    frechet_distance,
    moments,
    pooled_pixels,
    random_conv_features,
)
from mixflow_fast.evaluation.uncertainty import Estimate, difference

__all__ = [
    "FEATURES",
    "Estimate",
    "Extractor",
    "Features",
    "difference",
    "extract",
    "frechet_distance",
    "moments",
    "pooled_pixels",
    "random_conv_features",
]
