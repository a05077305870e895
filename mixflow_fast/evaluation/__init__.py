"""Evaluation: distances between sample sets, and the reports that show them."""

from mixflow_fast.evaluation.frechet import (
    FEATURES,
    frechet_distance,
    moments,
    pooled_pixels,
    random_conv_features,
)
from mixflow_fast.evaluation.report import evidence_markdown, render_demo_report, write_json

__all__ = [
    "FEATURES",
    "evidence_markdown",
    "frechet_distance",
    "moments",
    "pooled_pixels",
    "random_conv_features",
    "render_demo_report",
    "write_json",
]
