"""Where the samples of a checkpoint begin, for the commands that sample."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mixflow_fast.models.weights.files import WeightsFile
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


def refuse_text_to_image(file: WeightsFile, weights: str, path: Path, command: str) -> None:
    """Refuse a text-to-image network where a command has no prompts to tell it.

    Args:
        file: the checkpoint's.
        weights: which of its weights.
        path: as the user named it.
        command: that is refused.
    """
    from mixflow_fast.models.weights.naming import kind_of

    if kind_of(file.state(weights)) == "text-to-image":
        raise ValueError(
            f"{path} is a text-to-image network, and `mixflow-fast {command}` has no prompts to "
            f"tell it: `mixflow-fast sample {path} --prompts ... --out FOLDER` makes its pictures, "
            "and train.validate_every measures its loss, of slowed inputs, too"
        )


def chosen_source(stored: StoredSource | None, w: float | str | None) -> SampleSource | None:
    """Where the samples of a checkpoint begin; None is N(0, I).

    Args:
        stored: the source in its file.
        w: of the option, see `refuse_unused`; it changes nothing where samples begin at N(0, I).
    """
    from mixflow_fast.sampling.source import SampleSource

    if stored is None or why_normal(stored):
        return None
    if w is None:
        w = stored.sample_w
    return SampleSource(stored.source, None if w == _TRAINING else w)


def refuse_unused(w: float | str | None, stored: Mapping[str, StoredSource | None]) -> None:
    """Refuse `--source-w` where it has no effect on any checkpoint, with the reasons.

    Args:
        w: of the option.
        stored: name of a checkpoint -> the source in its file.
    """
    reasons = {name: why_normal(source) for name, source in stored.items()}
    if w is not None and all(reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"--source-w has no effect: {why}. Leave it out")


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
