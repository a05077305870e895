"""Mixed sources in weights files: what a network that was trained with one is sampled from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mixflow_fast.flow.source import MixedSource
from mixflow_fast.models.weights.damage import describe_not_finite, wrong_checksums
from mixflow_fast.models.weights.files import WeightsFile
from mixflow_fast.models.weights.loading import compare
from mixflow_fast.models.weights.source_record import SETTINGS, SourceRecord


@dataclass(frozen=True)
class StoredSource:
    """The source of a weights file, ready to be sampled from.

    Attributes:
        source: with its predictor in float32 on the CPU, in eval mode, without gradients.
        sample_w: the recipe's weight of q for samples; None draws it as in training. It has no
            effect where kappa contains the data: samples then begin at N(0, I).
        record: how it is built.
    """

    source: MixedSource
    sample_w: float | None
    record: SourceRecord


def load_source(path: str | os.PathLike[str], key: str = "ema") -> StoredSource | None:
    """The source that a network was trained with; None where that is N(0, I).

    Args:
        path: a weights file, or the folder of a run or checkpoint, as `load_model` takes it.
        key: "ema" or "model".

    Raises:
        ValueError: a file that cannot be read, or a source in it that is damaged, not finite or
            without its settings.
    """
    return source_of(WeightsFile.open(path), key)


def source_of(file: WeightsFile, key: str = "ema") -> StoredSource | None:
    """`load_source` of a file that is open already."""
    record = record_of(file)
    if record is None:
        return None
    predictor = record.build_predictor()
    state = source_state(file, key)
    check_source(file, state, record)
    predictor.load_state_dict(state)
    source = record.source(predictor.eval().requires_grad_(False))
    return StoredSource(source, record.sample_w, record)


def record_of(file: WeightsFile) -> SourceRecord | None:
    """How the source in a file is built; None in a file without one.

    Raises:
        ValueError: there is a source, and nothing or nonsense about how it is built.
    """
    text = file.args.get(SETTINGS)
    if isinstance(text, str):
        return SourceRecord.from_json(text, file.path)
    if source_state(file) and file.metadata is not None:  # another trainer's may be anything
        raise ValueError(
            f"{file.path} holds a source and does not say how it is built ({SETTINGS} under "
            "`args`): write the file again, with `mixflow-fast consolidate` of the run"
        )
    return None


def source_state(file: WeightsFile, key: str = "ema") -> dict[str, Tensor]:
    """The predictor's weights in a file, mapped and not checked; {} without any.

    Args:
        file: where to look.
        key: "ema" or "model".
    """
    names = ("source_ema", "source") if key == "ema" else ("source",)
    found = next((file.entries[name] for name in names if name in file.entries), None)
    return dict(found) if isinstance(found, Mapping) else {}


def check_source(file: WeightsFile, state: Mapping[str, Tensor], record: SourceRecord) -> None:
    """Refuse weights that are not the predictor's, or not what was written.

    Raises:
        ValueError: names, shapes, checksums or values are wrong; it names the file and a tensor.
    """
    own = record.build_predictor("meta").state_dict()
    missing, unexpected, shapes = compare(state, own)
    odd = [*missing, *unexpected, *shapes]
    problem = ""
    if odd:
        problem = f"{odd[0]} of its source does not fit {record.predictor}"
    elif bad := wrong_checksums(file.parts, state):
        problem = f"{bad[0]} of its source is not what was written (wrong checksum)"
    elif text := describe_not_finite(state, " of its source"):
        problem = text
    if problem:
        raise ValueError(f"{file.path}: {problem}: choose another checkpoint")
