"""What every suite shares: rows on disk, statistics, the deadline, and the device that is measured.

Import this before anything that imports Triton: without a GPU the kernels run in Triton's
interpreter, which has to be chosen before that import.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
SMI_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


class Row(TypedDict):
    """The keys of every row; `benchmarks/README.md` says what they mean."""

    op: str
    provider: str
    mode: str
    variant: str | None
    metric: str
    shape: list[int]
    dtype: str
    p50: float | None
    p20: float | None
    p80: float | None
    low95: float | None
    high95: float | None
    device: str
    torch: str
    triton: str | None
    cuda: str | None
    git_sha: str
    timestamp: str
    timing: str | None
    note: str


KEYS = tuple(Row.__annotations__)
# What makes two rows measurements of the same thing.
IDENTITY = ("op", "provider", "mode", "variant", "metric", "shape", "dtype", "device")


class Writer:
    """Appends rows with the fields of `environment` to a file of JSON lines, synced one by one.

    `note` is put before every row's own note ("smoke: not a speed").
    """

    def __init__(
        self, path: str | os.PathLike[str], environment: Mapping[str, str | None], note: str = ""
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._environment, self._note = dict(environment), note
        self.count = 0

    def add(self, *, p50: float | None, note: str = "", **fields: object) -> Row:
        """Write one row; `fields` are the keys of `KEYS` that are not the environment's."""
        row = dict.fromkeys(KEYS) | self._environment | {"p50": p50} | fields
        row["note"] = "; ".join(part for part in (self._note, note) if part)
        row["timestamp"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        unknown = sorted(set(row) - set(KEYS))
        if unknown:
            raise ValueError(f"rows have the keys {KEYS}, got also {unknown}")
        for key in ("p50", "p20", "p80", "low95", "high95"):
            if row[key] is not None and not math.isfinite(row[key]):
                raise ValueError(f"{key} of {row['metric']} must be finite or None: {row[key]}")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.count += 1
        return row


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file; a last line that an abrupt end cut off is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines[:-1] if line]
    for row in found:
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"{path}: a row lacks {missing}: it is from another version")
    return found


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last of rows that measure the same thing, in the order in which they first came."""
    return list({json.dumps([row[key] for key in IDENTITY]): row for row in rows}.values())


class Percentiles(NamedTuple):
    """The 20th, 50th and 80th percentile of a sample, linear between neighbours."""

    p20: float
    p50: float
    p80: float

    def times(self, factor: float) -> Percentiles:
        """Those of the sample times a positive factor."""
        return Percentiles(factor * self.p20, factor * self.p50, factor * self.p80)

    def rate(self, amount: float) -> Percentiles:
        """Those of `amount` over the sample: the fast percentile of a time is a rate's high one."""
        return Percentiles(amount / self.p80, amount / self.p50, amount / self.p20)


class Ratio(NamedTuple):
    """Median and spread of other / ours over paired rounds, and the median's 95% interval."""

    p20: float
    p50: float
    p80: float
    low95: float
    high95: float

    def __str__(self) -> str:
        return f"{self.p50:.3f}x [{self.low95:.3f}, {self.high95:.3f}]"


def percentiles(samples: Sequence[float]) -> Percentiles:
    """p20, p50 and p80 of one or more finite numbers."""
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"samples must be one or more finite numbers, got {samples!r}")
    p20, p50, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return Percentiles(p20, p50, p80)


def paired_ratio(
    other: Sequence[float], ours: Sequence[float], resamples: int = 4000, seed: int = 0
) -> Ratio:
    """How many times longer `other` took than `ours`, round by round: > 1 is a win for ours.

    A round measures both within moments of each other, so clocks and neighbours that drift move
    both and cancel. The interval is the percentile bootstrap of the median over rounds; the same
    data and seed give the same interval.
    """
    a, b = np.asarray(other, dtype=np.float64), np.asarray(ours, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(
            f"other and ours must hold one time per round, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        raise ValueError("times must be finite and positive: a round measured nothing")
    ratios = a / b
    draws = np.random.default_rng(seed).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5)).tolist()
    p20, p50, p80 = percentiles(ratios)
    return Ratio(p20, p50, p80, low, high)


Times = Mapping[str, Sequence[float]]
Value = Percentiles | Ratio | float | None


@dataclass(frozen=True)
class CellRows:
    """The rows of one cell: they differ in provider and metric, and in dtype by `dtypes`."""

    writer: Writer
    op: str
    mode: str
    variant: str | None
    shape: list[int]
    dtype: str
    timing: str
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Op, network and batch as they are printed."""
        return f"{self.op} {self.variant} B={self.shape[0]}"

    def add(self, provider: str, metric: str, value: Value, note: str, timed: bool = True) -> None:
        """Write a row, with `timing` if it is `timed`."""
        self.writer.add(
            op=self.op,
            provider=provider,
            mode=self.mode,
            variant=self.variant,
            metric=metric,
            shape=self.shape,
            dtype=self.dtypes.get(provider, self.dtype),
            timing=self.timing if timed else None,
            note=note,
            **(value._asdict() if isinstance(value, tuple) else {"p50": value}),
        )

    def add_ratio(self, provider: str, over: str, ratio: Ratio, note: str) -> None:
        """Write how many times faster `provider` is than `over`."""
        self.add(provider, f"speedup_over_{over}", ratio, f"per round; {note}")

    def add_ratios(self, ours: str, times: Times, notes: Mapping[str, str]) -> None:
        """Write and print how many times faster `ours` is than each other provider."""
        for name in times:
            if name != ours and ours in times:
                ratio = paired_ratio(times[name], times[ours])
                self.add_ratio(ours, name, ratio, notes[name])
                print(f"  {self.op}: {ours} over {name}: {ratio}", flush=True)


class Deadline:
    """A budget of wall-clock seconds, asked before a cell starts so that none is cut in the middle.

    None is no limit. `left_out` are the names of the cells that did not fit, in order.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"deadline must be a number of seconds > 0, got {seconds!r}")
        self._clock = clock
        self._start = clock()
        self._seconds = math.inf if seconds is None else seconds
        self.left_out: list[str] = []

    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def left(self) -> float:
        """Seconds until the deadline, inf without one, negative after it."""
        return self._seconds - self.spent()

    def fits(self, name: str, expected: float) -> bool:
        """Whether `expected` seconds are left; if not, `name` is noted as left out."""
        if expected <= self.left():
            return True
        self.left_out.append(name)
        return False

    def report(self) -> str:
        """One line for each cell left out, or an empty string."""
        head = f"left out, {self._seconds:g} s were not enough:"
        return "\n  ".join([head, *self.left_out]) if self.left_out else ""


class Expectation:
    """Seconds of the next cell: `margin` times the longest of the `last` few; `first` is a guess.

    Never more than `cap`: what is left out teaches nothing, so one slow cell (the first of its kind
    compiles) would otherwise keep out all that follow.
    """

    def __init__(
        self, first: float, margin: float = 1.25, last: int = 4, cap: float = math.inf
    ) -> None:
        self._seen: deque[float] = deque(maxlen=last)
        self._first, self._margin, self._cap = first, margin, cap

    def seconds(self) -> float:
        """Expected seconds of the next cell."""
        return min(self._cap, self._margin * max(self._seen)) if self._seen else self._first

    def saw(self, seconds: float) -> None:
        """Learn what a cell took."""
        self._seen.append(seconds)


def pick(name: str) -> torch.device:
    """The device called "cuda" or "cpu"; ValueError where it is not there."""
    if name not in ("cuda", "cpu"):
        raise ValueError(f'device must be "cuda" or "cpu", got {name!r}')
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device cuda is not there: speeds need a GPU. Correctness alone runs in Triton's "
            "interpreter: python -m benchmarks.checks --device cpu. The whole path at toy sizes: "
            "python -m benchmarks.run --smoke --device cpu"
        )
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def environment(device: torch.device) -> dict[str, str | None]:
    """The fields of every row that say where it was measured."""
    # Inside the function because it imports Triton, see the module's first lines.
    from mixflow_fast.environment import current_environment

    found = current_environment(device).to_dict()
    where = {key: found[key] for key in ("device", "torch", "triton", "cuda")}
    return where | {"git_sha": git_sha()}


def git_sha() -> str:
    """The checkout's commit, with "+changes" if files differ; $GIT_SHA where git cannot say."""
    git = ("git", "-C", str(ROOT))
    sha = _command(*git, "rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if sha is None:
        return os.environ.get("GIT_SHA") or "unknown"
    return sha + ("+changes" if _command(*git, "status", "--porcelain") else "")


def conditions(device: torch.device) -> str:
    """Clocks, power and temperature of the GPU at this moment, in nvidia-smi's words."""
    if device.type != "cuda":
        return f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    query = f"--query-gpu={','.join(SMI_FIELDS)}"
    index = f"--id={torch.cuda.current_device()}"
    state = _command("nvidia-smi", query, "--format=csv,noheader", index)
    if state is None:
        return "clocks and power unknown (nvidia-smi gave nothing)"
    values = [value.strip() for value in state.splitlines()[0].split(",")]
    return ", ".join(f"{k} {v}" for k, v in zip(SMI_FIELDS, values, strict=False))


def keep_state(out: Path, suite: str, state: Mapping[str, str | None]) -> None:
    """OUT/environment.json: the state of each suite's run under the suite's name."""
    # Inside the function because it may import Triton, see the module's first lines.
    from mixflow_fast import files

    path = out / "environment.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut off by a kill
        kept = {}
    files.write_json(path, kept | {suite: dict(state)})


def _command(*words: str) -> str | None:
    """Standard output of a command, or None where it is missing or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
