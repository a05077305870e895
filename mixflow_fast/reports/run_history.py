"""What a run's folder holds, read without touching it: for its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixflow_fast.config.loading import RECIPES, REQUIRED, from_dict
from mixflow_fast.config.schema import Config
from mixflow_fast.metrics.metrics_file import TRAINING, read_metrics


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        out: the folder.
        config: None where it was never written or cannot be read.
        starts, training, validation: rows of metrics.jsonl, in order of their steps.
        previews: (step, file).
        active: a process of this machine is in the run now.
    """

    out: Path
    config: Config | None
    starts: list[dict[str, Any]]
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    previews: list[tuple[int, Path]]
    active: bool

    @property
    def step(self) -> int:
        """Steps done, as far as they were written down."""
        return max((row["step"] for row in (*self.training, *self.validation)), default=0)

    @property
    def status(self) -> str:
        """In words."""
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
    if not (out / "config.yaml").is_file() and not (out / "metrics.jsonl").is_file():
        raise ValueError(
            f"{out} holds no run: give the folder that out= named, with config.yaml and "
            "metrics.jsonl in it"
        )
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    starts = []
    for row in read_metrics(out / "metrics.jsonl", kind=None):
        kind = row.get("kind", TRAINING)
        if kind == "start":
            starts.append(row)
        else:  # a step that was done again counts as it was the last time
            rows.setdefault(kind, {})[row["step"]] = row
    training, validation = (
        [found[step] for step in sorted(found)]
        for found in (rows.get(TRAINING, {}), rows.get("validation", {}))
    )
    previews = [
        (int(path.stem.removeprefix("step_")), path)
        for path in sorted((out / "previews").glob("step_*.png"))
        if path.stem.removeprefix("step_").isdigit()
    ]
    config = _read_config(out / "config.yaml")
    return Run(out, config, starts, training, validation, previews, _active(out))


def _read_config(file: Path) -> Config | None:
    import yaml

    try:
        return from_dict(yaml.safe_load(file.read_text()))
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return None


def _active(out: Path) -> bool:
    """Whether a process holds the run's lock."""
    import fcntl

    try:
        with (out / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def read_recipe(name: str | None) -> tuple[Config | None, set[str]]:
    """A recipe with its open places at their defaults, and which those are."""
    import yaml

    if name is None:
        return None, set()
    file = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    try:
        tree = yaml.safe_load(file.read_text()) or {}
        needed = {key for key, value in flat(tree).items() if value == REQUIRED}
        for key in needed:
            section, _, field = key.rpartition(".")
            (tree[section] if section else tree).pop(field)
        return from_dict(tree), needed
    except (OSError, ValueError, AttributeError, KeyError, yaml.YAMLError):
        return None, set()


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
