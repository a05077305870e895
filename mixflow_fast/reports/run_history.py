"""What a run's folder holds, read without touching it: for its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from mixflow_fast.config.loading import REQUIRED, flatten, from_dict
from mixflow_fast.config.schema import Config
from mixflow_fast.files import existing_folder
from mixflow_fast.folder_lock import is_held
from mixflow_fast.messages import error_line
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.metrics.rows import StartRow, TrainingRow, ValidationRow
from mixflow_fast.recipes import FOLDER

Status = Literal["running", "finished", "interrupted", "no step yet"]
_Row = TypeVar("_Row", TrainingRow, ValidationRow)


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        out: the folder.
        config: None where it was never written or cannot be read; `problem` then says why.
        starts, training, validation: rows of metrics.jsonl, in order of their steps.
        previews: (step, file).
        active: a process of this machine is in the run now.
    """

    out: Path
    config: Config | None
    problem: str
    starts: list[StartRow]
    training: list[TrainingRow]
    validation: list[ValidationRow]
    previews: list[tuple[int, Path]]
    active: bool

    @property
    def step(self) -> int:
        """Steps done, as far as they were written down."""
        steps = [row["step"] for row in self.training] + [row["step"] for row in self.validation]
        return max(steps, default=0)

    @property
    def status(self) -> Status:
        """Where the run stands."""
        total = self.config.steps if self.config else None
        if self.active:
            return "running"
        if total is not None and self.step >= total:
            return "finished"
        return "interrupted" if self.training else "no step yet"


def read_run(out: Path) -> Run:
    """Read a run folder, whatever state it is in.

    Raises:
        ValueError: no run folder.
    """
    existing_folder(out, "the folder that out= named")
    if not (out / "config.yaml").is_file() and not (out / "metrics.jsonl").is_file():
        raise ValueError(
            f"{out} holds no run: give the folder that out= named, with config.yaml and "
            "metrics.jsonl in it"
        )
    metrics = out / "metrics.jsonl"
    previews = [
        (int(path.stem.removeprefix("step_")), path)
        for path in sorted((out / "previews").glob("step_*.png"))
        if path.stem.removeprefix("step_").isdigit()
    ]
    config, problem = _read_config(out / "config.yaml")
    return Run(
        out=out,
        config=config,
        problem=problem,
        starts=read_metrics(metrics, kind="start"),
        training=_last_of_each_step(read_metrics(metrics)),
        validation=_last_of_each_step(read_metrics(metrics, kind="validation")),
        previews=previews,
        active=is_held(out),
    )


def _last_of_each_step(rows: Sequence[_Row]) -> list[_Row]:
    """In the order of steps. A step that was done twice counts as it was the last time."""
    last = {row["step"]: row for row in rows}
    return [last[step] for step in sorted(last)]


def _read_config(file: Path) -> tuple[Config | None, str]:
    import yaml

    # A configuration of another release may not be read; the rest of the report is worth having.
    try:
        return from_dict(yaml.safe_load(file.read_text())), ""
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        return None, error_line(error)


def read_recipe(name: str | None) -> tuple[Config | None, set[str]]:
    """A recipe with the settings it leaves open (`???`) at their defaults, and their names."""
    import yaml

    if name is None:
        return None, set()
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        tree = yaml.safe_load(file.read_text()) or {}
        # `from_dict` refuses a `???`; what the run was given there is listed as a difference.
        needed = {key for key, value in flatten(tree).items() if value == REQUIRED}
        for key in needed:
            section, _, field = key.rpartition(".")
            (tree[section] if section else tree).pop(field)
        return from_dict(tree), needed
    # The recipe may be gone or have changed since; the report then compares with the defaults.
    except (OSError, ValueError, AttributeError, KeyError, yaml.YAMLError):
        return None, set()
