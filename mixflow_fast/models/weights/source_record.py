"""The mixed source that stands beside a network: its names, and how it is built again from a file.

In a run the predictor is the submodule `source` of the network, so that optimizer, averages and
checkpoints carry it under `source.*`. A weights file keeps it apart, under "source" and
"source_ema": what stands under "model" and "ema" has official names alone. How it is built stands
in the file's settings under `SETTINGS`, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import torch
from torch import nn

from mixflow_fast.flow.source import Kappa, MixedSource, SourceMode
from mixflow_fast.models.source_predictor import SourceTable, SourceUNet

PredictorClass = Literal["SourceUNet", "SourceTable"]
PREDICTORS: Mapping[PredictorClass, type[nn.Module]] = {
    "SourceUNet": SourceUNet,
    "SourceTable": SourceTable,
}
# What the predictor's names begin with in the state dict of a network that carries it.
PREFIX = "source."
# Where a weights file says how the source is built.
SETTINGS = "source_settings"
# Settings of the predictor that decide how it begins and not what it is.
_BEGINNINGS = ("zero_init",)
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """A mixed source without its weights.

    Attributes:
        predictor: class of the network that makes mean and log-variance of kappa.
        kwargs: its constructor arguments.
        kappa, mode, w, lam, beta: as `MixedSource`.
        sample_w: weight of q when samples are generated; None draws it as in training.
    """

    predictor: PredictorClass
    kwargs: Mapping[str, object]
    kappa: Kappa
    mode: SourceMode
    w: str | float
    lam: float | None
    beta: float | None
    sample_w: float | None

    def build_predictor(self, device: str | torch.device = "cpu") -> nn.Module:
        """The predictor with random initial weights, of torch's default generator."""
        with torch.device(device):
            return PREDICTORS[self.predictor](**self.kwargs)

    def source(self, predictor: nn.Module, dropout: float = 0.0) -> MixedSource:
        """The source around a predictor; `dropout` is that of training."""
        options = {"kappa": self.kappa, "mode": self.mode, "w": self.w, "dropout": dropout}
        return MixedSource(predictor, **options, lam=self.lam, beta=self.beta)

    def describe(self) -> str:
        """The source in words, without the weight of its KL."""
        count = sum(parameter.numel() for parameter in self.build_predictor("meta").parameters())
        return (
            f"mixed, kappa {self.kappa}, mode {self.mode}, w {self.w}, {self.predictor} of "
            f"{count:,} parameters"
        )

    def differences(self, other: SourceRecord) -> list[str]:
        """What makes another source's weights unfit for this one, "NAME here instead of there"."""
        own, theirs = (
            {"predictor": r.predictor, "kappa": r.kappa, **r.kwargs} for r in (self, other)
        )
        return [
            f"{name} {own.get(name)} instead of {theirs.get(name)}"
            for name in [*own, *(n for n in theirs if n not in own)]
            if name not in _BEGINNINGS and own.get(name) != theirs.get(name)
        ]

    def to_json(self) -> str:
        """The text that a file keeps under `SETTINGS`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, path: object) -> SourceRecord:
        """The record that `to_json` wrote; what a later release added to it is refused.

        Raises:
            ValueError: it cannot be read; names `path`, the file.
        """
        try:
            record = cls(**json.loads(text))
            record.source(record.build_predictor("meta"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"what {path} says of its source is damaged, or of another release ({error}): "
                "write the file again"
            ) from None
        return record


def split(state: Mapping[str, _Value]) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """A state dict by names as (the network's, the predictor's without their prefix)."""
    network = {name: value for name, value in state.items() if not name.startswith(PREFIX)}
    source = {n.removeprefix(PREFIX): v for n, v in state.items() if n.startswith(PREFIX)}
    return network, source


def predictor_of(network: nn.Module) -> nn.Module | None:
    """The predictor that a network carries; None where its source is N(0, I)."""
    return getattr(network, "source", None)
