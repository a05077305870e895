"""What a method of the demo must say of itself to be trained, sampled, measured and shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict

from torch import Tensor

from mixflow_fast.config.schema import Config
from mixflow_fast.demo.measure import Measure
from mixflow_fast.reports.demo_result import ArmResult, Cell, DemoResult, Method, Metric
from mixflow_fast.sampling.remedies import Remedy

# Standard normal numbers (B, ...) and labels (B,) -> the states that samples begin at.
Beginning = Callable[[Tensor, Tensor], Tensor]


class Sizes(Protocol):
    """What the settings of every method have."""

    @property
    def data(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def steps(self) -> tuple[int, ...]: ...
    @property
    def picture_steps(self) -> tuple[int, ...]: ...


class NamedArm(Protocol):
    """What the arms of every method have: a name for people, and whether they train."""

    @property
    def label(self) -> str: ...
    @property
    def weights_of(self) -> str | None: ...
    @property
    def folded(self) -> bool: ...


class SourceNumbers(TypedDict):
    """What is measured of one arm of one seed where the noise end may be learned.

    Keys:
        curvature, curvature_se: mean over trajectories, and its standard error.
        solvers: distances by metric and name of a solver.
        rk45_nfe: evaluations of an adaptive solver.
        health: of the source, by name; empty for N(0, I).
    """

    curvature: float
    curvature_se: float
    solvers: dict[Metric, dict[str, Cell]]
    rk45_nfe: int
    health: dict[str, float]


class Evaluation(TypedDict):
    """One arm of one seed, as in its frechet.json: cells by number of steps, by metric."""

    cells: dict[Metric, dict[str, Cell]]
    seconds: float
    source: NotRequired[SourceNumbers]


@dataclass(frozen=True)
class Finished:
    """A finished arm of one seed.

    Attributes:
        folder: its own.
        config: of the training of its weights.
        evaluation: what was measured.
    """

    folder: Path
    config: Config
    evaluation: Evaluation


@dataclass(frozen=True)
class Words:
    """What the page says beside the numbers.

    Attributes:
        title, about: of the demo.
        notes: conditions, below the numbers.
    """

    title: str
    about: str
    notes: Sequence[str]


class Plan(ABC):
    """One method of the demo.

    Attributes:
        method: its name.
        arms: by name; an arm stands after those whose weights it needs.
    """

    method: Method
    arms: Mapping[str, NamedArm]

    @property
    @abstractmethod
    def settings(self) -> Sizes:
        """The sizes, a dataclass; arms of other settings never meet in one folder."""

    @abstractmethod
    def config(self, name: str, seed: int, folder: Path) -> Config:
        """Configuration of the training of an arm's weights, which may be another arm's.

        Args:
            folder: of the seed, with a folder for each arm.
        """

    @abstractmethod
    def check(self, out: Path) -> None:
        """Refuse settings that some arm, the sampling or the report could not work with."""

    @abstractmethod
    def arm_result(self, name: str, runs: Sequence[Finished]) -> ArmResult:
        """What the report says of an arm beside its distances and pictures."""

    @abstractmethod
    def words(self, seeds: Sequence[int], measure: Measure) -> Words:
        """What the page says beside the numbers."""

    @abstractmethod
    def render(self, result: DemoResult, path: Path) -> None:
        """Write the page."""

    def remedy(self, name: str, steps: int) -> Remedy | None:
        """What the samples of an arm are corrected by."""
        return None

    def begin(self, name: str, weights: Path) -> Beginning | None:
        """Where the samples of an arm begin; None: at N(0, I).

        Args:
            weights: that the arm samples.
        """
        return None

    def source_numbers(
        self, weights: Path, seed: int, measure: Measure, quiet: bool
    ) -> SourceNumbers | None:
        """What is measured of a trained arm beyond its distances by Euler steps, if anything.

        Args:
            weights: of the finished training.
        """
        return None

    def more_findings(self, out: Path, seeds: Sequence[int], measure: Measure) -> DemoResult:
        """What else the report shows."""
        return {}

    def compare_command(self, out: Path, seed: int) -> str | None:
        """The command that compares the arms in detail, if there is one for them."""
        return None
