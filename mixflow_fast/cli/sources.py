"""Where the samples of a checkpoint begin, for the commands that sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixflow_fast.models.weights.sources import StoredSource
    from mixflow_fast.sampling.source import SampleSource

_TRAINING = "train"


def add_source_option(command: argparse.ArgumentParser) -> None:
    """`--source-w`."""
    command.add_argument(
        "--source-w",
        type=_weight,
        metavar="W",
        help="weight in 0 .. 1 of the learned source where samples begin, for a network trained "
        "with source.kappa=class or noise; train: drawn as in training (default: the run's "
        "source.sample_w)",
    )


def _weight(text: str) -> float | str:
    if text == _TRAINING:
        return text
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0.0 <= found <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in 0 .. 1 or train, got {text!r}")
    return found


def chosen_source(
    stored: StoredSource | None, w: float | str | None, path: Path
) -> SampleSource | None:
    """Where the samples of a checkpoint begin; None is N(0, I).

    Args:
        stored: the source in its file.
        w: of the option.
        path: of the checkpoint, for messages.

    Raises:
        ValueError: a weight that has no effect.
    """
    from mixflow_fast.sampling.source import sample_source

    source = None if stored is None else stored.source
    if w is not None and (reason := why_normal(stored)):
        raise ValueError(f"--source-w has no effect for {path}: {reason}; leave it out")
    if w is None and stored is not None and not stored.source.needs_data:
        w = stored.sample_w
    return sample_source(source, None if w == _TRAINING else w)


def why_normal(stored: StoredSource | None) -> str:
    """Why the samples of a network begin at N(0, I); "" where they do not."""
    if stored is None:
        return "it was trained without a mixed source, so its samples begin at N(0, I)"
    if stored.source.needs_data:
        return (
            f"its source sees the data (kappa {stored.source.kappa}), which are not known when "
            "samples are made, so they begin at N(0, I)"
        )
    return ""


def describe_start(stored: StoredSource | None, source: SampleSource | None) -> str:
    """A line on where samples begin; "" for a network without a source, of which nothing is said.

    Args:
        stored: the source in the network's file.
        source: what samples begin at.
    """
    if source is not None:
        return f"source: {source.describe()}"
    return "" if stored is None else f"source: N(0, I): {why_normal(stored)}"
