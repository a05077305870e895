"""What a run says while it works: `metrics.jsonl` for machines, a progress line for people.

Rows of metrics.jsonl by their "kind"; each has "step":

    (none)        training, one per log_every steps: means over the window since the last one
    "start"       a process took up the run: versions, device, how the network is run
    "validation"  losses at fixed times and over the grid, of EMA and live weights
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch

from mixflow_fast import __version__
from mixflow_fast.checkpoints import manifest

TRAINING = "training"  # the kind of rows that name none


class Mirror(Protocol):
    """What gets the rows too."""

    def write(self, row: dict[str, Any]) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line, appended and flushed, so that a killed run keeps what it wrote.

    Args:
        path: the file.
        resume_step: rows of later steps are dropped first, since they will be written again; a
            line that a killed run left unfinished is dropped too.
        mirror: gets each row after the file has it.
    """

    def __init__(self, path: Path, resume_step: int = 0, mirror: Mirror | None = None) -> None:
        self._mirror = mirror
        rows = [row for row in read_metrics(path, kind=None) if row["step"] <= resume_step]
        manifest.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a "step". What is not finite is written as null."""
        row = _finite(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.write(row)

    def picture(self, path: Path, step: int) -> None:
        """Tell the mirror of a picture that was written."""
        if self._mirror is not None:
            self._mirror.picture(path, step)

    def close(self) -> None:
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path, kind: str | None = TRAINING) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; empty if there is none. Unfinished lines are left out.

    Args:
        path: the file.
        kind: of the rows; None gives all.
    """
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                if kind is None or row.get("kind", TRAINING) == kind:
                    rows.append(row)
    return rows


class Stopwatch:
    """Seconds spent inside of `with` since `take` was called last."""

    def __init__(self) -> None:
        self._seconds = self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """The seconds; starts again at 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def peak_memory_mib(device: torch.device) -> float:
    """CUDA: the most that tensors took since the last call. CPU: the process's largest size."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device of this process, for the record of a run."""
    versions = {}
    for name in ("deepspeed", "triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    on_gpu = device.type == "cuda"
    return {
        "mixflow_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _has_screen(stream: TextIO) -> bool:
    """Whether a bar can be seen: on a terminal of no size, as some launchers make, it cannot."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return True


class Progress:
    """A tqdm bar on a terminal, one plain line per report otherwise, nothing when quiet.

    Args:
        total: steps in the run.
        start: steps already done.
        label: what stands before the bar or line.
        quiet: print nothing.
    """

    def __init__(self, total: int, start: int, label: str, quiet: bool = False) -> None:
        self._total, self._label, self._quiet = total, label, quiet
        self._bar = None
        if not quiet and _has_screen(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, unit="step", leave=True)

    def step(self) -> None:
        """One more optimizer step is queued. Reads nothing from the device."""
        if self._bar is not None:
            self._bar.update()

    def report(self, row: dict[str, Any]) -> None:
        """Show a metrics row."""
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"  # every step was skipped
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {row['images_per_s']:.0f} img/s")
        elif not self._quiet:
            self.say(
                f"{self._label}: step {row['step']}/{self._total} loss {loss} "
                f"lr {row['lr']:.2e} {row['images_per_s']:.0f} img/s"
            )

    def say(self, text: str) -> None:
        """A line of text that does not break the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
