"""`metrics.jsonl`: the record of a run, one JSON object a line (see `rows`)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, overload

from mixflow_fast import files
from mixflow_fast.metrics.rows import (
    TRAINING,
    CheckpointRow,
    EvaluationRow,
    Kind,
    Row,
    StartRow,
    TrainingRow,
    ValidationRow,
)


class Logger(Protocol):
    """A copy of the record, such as TensorBoard's."""

    def write(self, row: Mapping[str, object]) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line, appended at once, so that a killed run keeps what it wrote.

    Rows that do not fit (a full disk) are a warning: they stay in memory until there is room.

    Args:
        path: the file.
        resume_step: rows of later steps are dropped first, since they will be written again; a
            line that a killed run left unfinished is dropped too.
        logger: gets each row after the file has it.
        warn: prints a line.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int = 0,
        logger: Logger | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._path, self._logger, self._warn = path, logger, warn
        rows = [row for row in read_metrics(path, kind=None) if row["step"] <= resume_step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        # Without a buffer: after an error it is known what the file has.
        self._file = path.open("ab", buffering=0)
        self._missing = b""
        self._warned = False

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row; it must have a "step". What is not finite is written as null."""
        row = _finite_row(row)
        self._missing += (json.dumps(row, allow_nan=False) + "\n").encode()
        self._append()
        if self._logger is not None:
            self._logger.write(row)

    def _append(self) -> None:
        """Write what is missing in the file, to the system and not to the disk."""
        try:
            while self._missing:
                self._missing = self._missing[self._file.write(self._missing) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"warning: {self._path} cannot be written ({error.strerror}): its rows wait in "
                    "memory"
                )
            self._warned = True

    def picture(self, path: Path, step: int) -> None:
        """Tell the logger of a picture that was written."""
        if self._logger is not None:
            self._logger.picture(path, step)

    def close(self) -> None:
        self._append()
        self._file.close()
        if self._logger is not None:
            self._logger.close()


def _finite_row(row: Mapping[str, object]) -> dict[str, object]:
    return {key: _finite(value) for key, value in row.items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return _finite_row(value)
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@overload
def read_metrics(path: Path, kind: Literal["training"] = ...) -> list[TrainingRow]: ...
@overload
def read_metrics(path: Path, kind: Literal["start"]) -> list[StartRow]: ...
@overload
def read_metrics(path: Path, kind: Literal["checkpoint"]) -> list[CheckpointRow]: ...
@overload
def read_metrics(path: Path, kind: Literal["validation"]) -> list[ValidationRow]: ...
@overload
def read_metrics(path: Path, kind: Literal["evaluation"]) -> list[EvaluationRow]: ...
@overload
def read_metrics(path: Path, kind: None) -> list[Row]: ...


def read_metrics(path: Path, kind: Kind | None = TRAINING) -> list:
    """The rows of a `metrics.jsonl`; empty if there is none. Unfinished lines are left out.

    Args:
        path: the file.
        kind: which rows; None gives all.
    """
    rows = []
    if path.exists():
        # A line that was cut off in the middle of a character is still only one bad line.
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                if kind is None or row.get("kind", TRAINING) == kind:
                    rows.append(row)
    return rows
