"""Evaluation: distances between sample sets, and the reports that show them."""

from mixflow_fast.evaluation.frechet import (
    FEATURES,
    frechet_distance,
    moments,
    pooled_pixels,
    random_conv_features,
)

__all__ = [
    "FEATURES",
    "frechet_distance",
    "moments",
    "pooled_pixels",
    "random_conv_features",
]
