"""The section `source`: what distribution the noise end of the path has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from mixflow_fast.config.section import Fraction, NotNegativeFloat, Positive, Rule, Section
from mixflow_fast.flow.source import Kappa, SourceMode

SourceKind = Literal["standard", "mixed"]
PredictorName = Literal["unet", "table"]
Share = Annotated[float, Rule("in [0, 1]", lambda value: 0 <= value <= 1)]

# What each kind takes beside `kind`; anything else that is set is refused.
SOURCE_FIELDS: Mapping[SourceKind, tuple[str, ...]] = {
    "standard": (),
    "mixed": ("kappa", "mode", "w", "lam", "beta", "predictor", "widths", "layers", "groups",
              "low_resolution", "zero_init", "dropout", "frozen", "sample_w"),
}  # fmt: skip
# Fields that one predictor takes and the other does not.
_OF_PREDICTOR: dict[PredictorName, tuple[str, ...]] = {
    "unet": ("widths", "layers", "groups", "zero_init"),
    "table": ("low_resolution",),
}


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section, name="source"):
    """The noise end of the path: N(0, I), or a Gaussian that is trained with the network and mixed
    with N(0, I) (MixFlow with kappa-FC, arXiv 2604.09181)."""

    kind: SourceKind = "standard"
    """standard is N(0, I); mixed: N(mean, variance) of a predictor, mixed with N(0, I) by a weight
    w for each example. Only mixed takes the other fields."""
    kappa: Kappa = "data"
    """What the predictor sees: the data (samples then begin at N(0, I)), the class, a noise of its
    own, or data and noise."""
    mode: SourceMode = "moments"
    """moments mixes mean and variance and draws once, as published; samples mixes two draws."""
    w: float | str = "uniform"
    """Weight of the predicted Gaussian: uniform in (0, 1), discrete or discrete(N) in k / N, or a
    number; 1 is pure forward coupling (Fast-ODE), 0 is N(0, I)."""
    lam: NotNegativeFloat | None = None
    """Weight of the KL divergence from N(0, I) per dimension (Fast-ODE's unit); this or
    source.beta. Small values bend N(0, I) away from what samples begin at."""
    beta: NotNegativeFloat | None = None
    """Weight of the KL's sum over the D numbers of an example, as published: lam = beta D."""
    predictor: PredictorName = "unet"
    """unet: the published convolutional network; table: a row for each class, at first N(0, I),
    for kappa=class."""
    widths: tuple[Positive, ...] | None = None
    """unet: channels of its levels, each at half the resolution; null: [32, 64, 64, 64]."""
    layers: Positive | None = None
    """unet: blocks of a level on the way down; null: 2."""
    groups: Positive | None = None
    """unet: groups of its norms, of which each width is a multiple; null: 32."""
    low_resolution: Positive | None = None
    """table: side of its rows, which are then upsampled: fewer parameters; null: the data's."""
    zero_init: bool = False
    """unet: begins at N(0, I) exactly; false is PyTorch's initialisation, as published."""
    dropout: Fraction = 0.0
    """Probability that an example has w = 0, whatever w was drawn; independent of
    train.label_dropout, which hides the class from the network alone."""
    frozen: bool = False
    """The source of train.init stays as it is, for slowed interpolation (objective.gamma > 0) on
    top of it; it has no KL then."""
    sample_w: Share | None = None
    """w of samples and previews, for kappa=class and noise; null draws it as in training."""

    def check(self) -> None:
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if self.kind == "standard":
            if changed:
                raise ValueError(
                    f"source.{changed[0]} has no meaning for source.kind=standard, which is N(0, "
                    "I): add source.kind=mixed, or leave it out"
                )
            return
        if self.lam is not None and self.beta is not None:
            raise ValueError(
                f"source.lam = {self.lam} and source.beta = {self.beta} are two units of one "
                "weight (lam = beta D): give one, and source.lam=null or source.beta=null"
            )
        if self.lam is None and self.beta is None and not self.frozen:
            raise ValueError(
                "source.kind=mixed needs the weight of its KL: add source.lam=0.3 (per dimension; "
                "0.03 to 3 are usual), or source.beta as published (lam = beta D)"
            )
        if self.predictor == "table" and self.kappa != "class":
            raise ValueError(
                f"source.predictor=table has a row for each class, got source.kappa={self.kappa}: "
                "set source.kappa=class, or source.predictor=unet"
            )
        others = _OF_PREDICTOR["table" if self.predictor == "unet" else "unet"]
        given = [name for name in others if name in changed]
        if given:
            back = " ".join(f"source.{n}={'false' if n == 'zero_init' else 'null'}" for n in given)
            raise ValueError(
                f"source.{given[0]} has no meaning for source.predictor={self.predictor}: leave it "
                f"out, or take back what a recipe sets with {back}"
            )
        if self.sample_w is not None and self.kappa in ("data", "data+noise"):
            raise ValueError(
                f"source.sample_w has no meaning for source.kappa={self.kappa}: the data are not "
                "known when samples are made, which begin at N(0, I): leave it out"
            )
