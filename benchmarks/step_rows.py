"""The rows and tables of `benchmarks.step`: cells, paired ratios, the ladder of techniques."""

from __future__ import annotations

from typing import Any

from benchmarks.rows import Percentiles, Ratio, Writer, paired_ratio
from benchmarks.step_variants import LADDER, RECIPES, Workload

ROUND_SECONDS, OPTIMIZER_SECONDS = 0.5, 0.2


class StepRows:
    """Writes what the suite measures.

    Args:
        writer: takes the rows.
        smoke: rounds are single steps.
    """

    def __init__(self, writer: Writer, smoke: bool) -> None:
        self._writer, self._smoke = writer, smoke

    def write_ratios(
        self,
        workload: Workload | None,
        op: str,
        shape: list[int],
        times: dict[str, list[float]],
        notes: dict[str, str],
    ) -> None:
        """Ours over each other arm."""
        for name in times:
            if name != "mixflow_fast":
                ratio = paired_ratio(times[name], times["mixflow_fast"])
                self.write_ratio(workload, op, shape, "mixflow_fast", name, ratio, notes[name])
                print(f"  {op}: mixflow_fast over {name}: {_text(ratio)}", flush=True)

    def write_ratio(
        self,
        workload: Workload | None,
        op: str,
        shape: list[int],
        provider: str,
        over: str,
        ratio: Ratio,
        note: str,
    ) -> None:
        fields = self.identity(workload, provider, shape, f"speedup_over_{over}", op)
        fields |= ratio._asdict() | {"timing": self.method(op), "note": f"per round; {note}"}
        self._writer.add(**fields)

    def write_ladder(
        self,
        workload: Workload,
        shape: list[int],
        times: dict[str, list[float]],
        notes: dict[str, str],
    ) -> None:
        """Each row of the ladder over the row before and over the first: what pays."""
        rungs = [name for name in LADDER if name in times]
        if len(rungs) < 4:
            return
        print(f"  step by step, {workload.label}: over the row before [95%], over the first")
        for place, name in enumerate(rungs):
            before = rungs[max(place - 1, 0)]
            ratio, whole = (paired_ratio(times[n], times[name]) for n in (before, rungs[0]))
            if before != name and name != "mixflow_fast":
                self.write_ratio(workload, "step", shape, name, before, ratio, notes[before])
            print(f"  + {_adds(before, name):40} {name:22} {_text(ratio)}  {whole.p50:.2f}x")

    def method(self, op: str) -> str:
        seconds = OPTIMIZER_SECONDS if op == "optimizer" else ROUND_SECONDS
        length = "single steps" if self._smoke else f"rounds of about {seconds} s"
        return f"wall time of {length}, waited for; providers take turns"

    def identity(
        self,
        workload: Workload | None,
        provider: str,
        shape: list[int],
        metric: str,
        op: str = "step",
    ) -> dict[str, Any]:
        dtype = "tf32" if provider == "eager_tf32" else "bfloat16"
        dtype = "float32" if op == "optimizer" else dtype
        name = None if workload is None else workload.name
        cell = dict(op=op, provider=provider, mode="step", variant=name, metric=metric)
        return cell | dict(shape=shape, dtype=dtype)

    def add(
        self,
        workload: Workload | None,
        provider: str,
        shape: list[int],
        metric: str,
        p: Percentiles | None,
        note: str,
        op: str = "step",
    ) -> None:
        values = p._asdict() if p else {"p50": None}
        identity = self.identity(workload, provider, shape, metric, op)
        self._writer.add(**identity, **values, note=note, timing=self.method(op))

    def add_value(
        self,
        workload: Workload,
        provider: str,
        shape: list[int],
        metric: str,
        value: float | None,
        note: str,
    ) -> None:
        identity = self.identity(workload, provider, shape, metric)
        self._writer.add(**identity, p50=value, note=note)


def _adds(before: str, name: str) -> str:
    """What a row of the ladder has that `before` has not; rows between them may be left out."""
    last = LADDER.index(name)
    steps = LADDER[min(LADDER.index(before) + 1, last) : last + 1]
    return ", ".join(RECIPES[step].adds for step in steps)


def _text(ratio: Ratio) -> str:
    return f"{ratio.p50:.3f}x [{ratio.low95:.3f}, {ratio.high95:.3f}]"
