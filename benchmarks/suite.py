"""The kernel suite: every cell is verified at its own shape and only then timed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from benchmarks import rows, timing
from benchmarks.checks import verify
from benchmarks.ops import FAMILIES, REGISTRY, Call, Cell, NotThere
from benchmarks.rows import Percentiles, Ratio, paired_ratio, percentiles
from mixflow_fast.diagnostics.kernel_cases import Function, Inputs, Tensors, shape_name
from mixflow_fast.messages import error_line

# Columns of the table; others follow in the same line.
COLUMNS = ("eager", "compile", "mixflow_fast")
NO_COMPILE = "left out in a smoke run: the first C++ compilation takes most of a minute"
# Arguments of torch.compile. The last mode compiles neighbours of a choice one at a time, several
# seconds a kernel: it is tried where memory bounds bf16, the cells that are claims.
COMPILE_MODES = {
    "default": {},
    "max-autotune without coordinate descent": {"options": {"max_autotune": True}},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}
SLOW_TO_COMPILE = "max-autotune-no-cudagraphs"
# Below this a call is bound by launches, above it by memory: the two are tuned apart.
SMALL_ELEMENTS = 1 << 23


def is_small(cell: Cell) -> bool:
    return cell.elements < SMALL_ELEMENTS


def modes_to_try(cell: Cell) -> list[str]:
    """The modes of torch.compile that are timed for the cell's class."""
    every = cell.op in FAMILIES["objective"] and not is_small(cell)
    every = every and cell.dtype is torch.bfloat16
    return [mode for mode in COMPILE_MODES if every or mode != SLOW_TO_COMPILE]


class Compiler:
    """torch.compile of the plain lines, static shapes, in the fastest mode for the cell's class.

    Timed at the first cell of (op, mode, variant, small or large, dtype); the winner serves the
    others of that class, which keeps the time spent compiling inside a ten-minute run.

    Args:
        quick_ms: time of a call in milliseconds, a few repetitions.
    """

    def __init__(self, quick_ms: Callable[[Call], float]) -> None:
        self._quick_ms = quick_ms
        self._choice: dict[tuple[object, ...], tuple[str, str]] = {}
        self._functions: dict[tuple[str, Function], Function] = {}
        # Static shapes compile afresh for each; the default of 8 would fall back to eager.
        torch._dynamo.config.recompile_limit = 256

    def call(self, cell: Cell, inputs: Inputs) -> tuple[Call, str]:
        """The call, and a sentence that says how it was tuned."""
        plain = REGISTRY[cell.op].plain
        key = (cell.op, cell.mode, cell.variant, is_small(cell), cell.dtype)
        if key not in self._choice:
            tried = modes_to_try(cell)
            calls = {mode: plain(cell, inputs, partial(self._compiled, mode)) for mode in tried}
            times = {mode: self._quick_ms(call) for mode, call in calls.items()}
            best = min(times, key=times.__getitem__)
            text = ", ".join(f"{mode} {ms:.4f} ms" for mode, ms in times.items())
            how = f"torch.compile, {best}, chosen at {shape_name(cell.shape)} ({text})"
            left = [mode for mode in COMPILE_MODES if mode not in tried]
            how += f"; not tried: {', '.join(left)}" if left else ""
            self._choice[key] = best, how
        mode, how = self._choice[key]
        return plain(cell, inputs, partial(self._compiled, mode)), how

    def _compiled(self, mode: str, function: Function) -> Function:
        """The mode's version of a module-level function, made once."""
        key = mode, function
        if key not in self._functions:
            self._functions[key] = torch.compile(function, dynamic=False, **COMPILE_MODES[mode])
        return self._functions[key]


class KernelSuite:
    """Times the kernel cells on one device; `refused` are those in which something was wrong.

    Args:
        deadline: cells that would not fit are left out.
        impl: of the operators; a smoke run on the CPU times the reference.
        smoke: few rounds, and `compile` is left out.
    """

    def __init__(
        self,
        device: torch.device,
        writer: rows.Writer,
        deadline: rows.Deadline,
        impl: str = "triton",
        smoke: bool = False,
    ) -> None:
        self.refused: list[str] = []
        self._device, self._writer, self._deadline = device, writer, deadline
        self._impl, self._smoke = impl, smoke
        self._on_gpu = device.type == "cuda"
        self._timer = timing.CudaTimer() if self._on_gpu else None
        self._compiler = Compiler(self._timer.quick_ms) if self._timer else None
        self._to_count: list[tuple[Cell, str, str]] = []
        self._copy = timing.copy_bandwidth(self._timer) if self._timer else None
        if self._copy:
            print(f"copy bandwidth {self._copy / 1e9:.0f} GB/s (1 GiB, read plus written)")

    def run(self, cells: list[Cell]) -> None:
        """Every cell in turn, as far as the deadline goes, then the launches of those timed."""
        self._print_head()
        expectation = rows.Expectation(first=20.0 if self._on_gpu else 1.0, cap=20.0)
        for number, cell in enumerate(cells):
            if self._deadline.fits(cell.label, expectation.seconds()):
                start = self._deadline.spent()
                try:
                    self._cell(cell)
                except Exception as error:  # the other cells are worth having
                    self.refused.append(f"{cell.label}: {error_line(error)}")
                    print(self.refused[-1], flush=True)
                expectation.saw(self._deadline.spent() - start)
            if number == 0 and self._on_gpu:
                # What the compilers leave behind makes every later collection a quarter second.
                gc.collect()
                gc.freeze()
        # The profiler slows what is timed after it.
        for cell, provider, note in self._to_count:
            if self._deadline.left() > 2:
                try:
                    self._write_launches(cell, provider, note)
                except Exception as error:  # the other counts are worth having
                    print(f"{cell.label} {provider}: no launches: {error_line(error)}", flush=True)

    def _call(self, provider: str, cell: Cell, inputs: Inputs) -> tuple[Call, str]:
        """The provider's call, and a sentence that says how it was set up."""
        op = REGISTRY[cell.op]
        if provider == "compile":
            return self._compiler.call(cell, inputs)
        if provider == "eager":
            return op.plain(cell, inputs), "plain PyTorch lines"
        if provider == "mixflow_fast":
            return op.ours(cell, inputs, self._impl)
        return op.other(provider, cell, inputs, self._impl)

    def _cell(self, cell: Cell) -> None:
        if self._on_gpu:
            torch.cuda.empty_cache()
        inputs = REGISTRY[cell.op].inputs(cell, self._device)
        calls, notes, wrong = self._right_calls(cell, inputs)
        if wrong:
            self.refused.append(cell.label)
            print(f"{cell.label}: RED, no speed:", *wrong, sep="\n  ", flush=True)
            return
        rounds = 3 if self._smoke else 8
        timed = timing.measure(calls, self._device, self._timer, rounds)
        latency = self._write_times(cell, timed, notes)
        ratios = self._write_ratios(cell, timed, notes)
        self._print_line(cell, latency, ratios)
        if self._on_gpu:
            for provider, call in calls.items():
                peak, note = timing.peaks_mib(call)[0], notes[provider]
                self._rows(cell).add(provider, "peak_memory_mib", peak, note, timed=False)
                self._to_count.append((cell, provider, note))

    def _right_calls(
        self, cell: Cell, inputs: Inputs
    ) -> tuple[dict[str, Call], dict[str, str], list[str]]:
        """(calls, notes on them, what is wrong) by provider; says which are not there, and why."""
        calls: dict[str, Call] = {}
        notes: dict[str, str] = {}
        missing: dict[str, str] = {}
        wrong: list[str] = []
        truth: Tensors = {}
        for provider in cell.providers:
            if provider == "compile" and self._compiler is None:
                missing[provider] = NO_COMPILE
                continue
            try:
                call, notes[provider] = self._call(provider, cell, inputs)
                lines = verify(cell, inputs, call(), provider, truth)
                found = [f"{provider}: {line}" for line in lines]
                if found and provider not in COLUMNS:  # no reason to leave out the others
                    raise NotThere(f"wrong result: {', '.join(found)}")
                wrong += found
            except NotThere as error:
                missing[provider] = str(error)
            except Exception as error:
                text = error_line(error)
                if provider == "mixflow_fast":
                    wrong.append(f"{provider}: {text}")
                missing[provider] = text
            else:
                calls[provider] = call
        for provider, why in missing.items():
            self._rows(cell).add(provider, "latency_ms", None, why, timed=False)
            if why != NO_COMPILE:
                print(f"{cell.label}: without {provider}: {why}", flush=True)
        return calls, notes, wrong

    def _rows(self, cell: Cell, timing: str = "") -> rows.CellRows:
        shape, dtype = list(cell.shape), cell.dtype_name
        return rows.CellRows(self._writer, cell.op, cell.mode, cell.variant, shape, dtype, timing)

    def _write_launches(self, cell: Cell, provider: str, note: str) -> None:
        call, _ = self._call(provider, cell, REGISTRY[cell.op].inputs(cell, self._device))
        call()
        launches = timing.count_launches(call)
        why = note if launches else f"{note}; the profiler saw no device activity"
        self._rows(cell).add(provider, "launches", launches, why, timed=False)

    def _write_times(
        self, cell: Cell, timed: timing.Timing, notes: dict[str, str]
    ) -> dict[str, Percentiles]:
        """The rows of each provider; returns their latencies."""
        latency = {}
        out = self._rows(cell, timed.method)
        how = f"wall time per call of {timing.WALL_CALLS}" if self._on_gpu else timed.method
        by_wall = self._rows(cell, how)
        for provider, rounds in timed.rounds.items():
            note = notes[provider]
            latency[provider] = p = percentiles([value for each in rounds for value in each])
            out.add(provider, "latency_ms", p, note)
            by_wall.add(provider, "call_ms", percentiles(timed.wall[provider]), note)
            if not self._on_gpu:
                continue
            moved = cell.algorithmic_bytes
            out.add(provider, "gb_per_s", p.rate(moved / 1e6), note)
            out.add(provider, "percent_of_copy", p.rate(1e5 * moved / self._copy), note)
            if cell.flops:
                out.add(provider, "model_tflops", p.rate(cell.flops / 1e9), note)
        return latency

    def _write_ratios(
        self, cell: Cell, timed: timing.Timing, notes: dict[str, str]
    ) -> dict[str, tuple[Ratio, Ratio]]:
        """The rows of ours against each other provider; returns those of latency_ms and call_ms."""
        medians = {name: [*map(median, rounds)] for name, rounds in timed.rounds.items()}
        out, ratios = self._rows(cell, timed.method), {}
        for provider in cell.providers:  # the rounds turn their order
            if provider == "mixflow_fast" or provider not in timed.rounds:
                continue
            note = f"per round, {len(medians[provider])} rounds; against {notes[provider]}"
            device, wall = (
                paired_ratio(times[provider], times["mixflow_fast"])
                for times in (medians, timed.wall)
            )
            out.add("mixflow_fast", f"speedup_over_{provider}", device, note)
            out.add("mixflow_fast", f"call_speedup_over_{provider}", wall, note)
            ratios[provider] = device, wall
        return ratios

    def _print_head(self) -> None:
        heads = "".join(f"{provider:>14}" for provider in COLUMNS)
        print(
            f"\nlatency p50 in ms{'':47}{heads}  of copy  ours against eager, compile and others: "
            "on the device [95%] / by the wall clock of a call from Python"
            + (" (smoke run at toy sizes: not speeds)" if self._smoke else "")
        )

    def _print_line(
        self, cell: Cell, latency: dict[str, Percentiles], ratios: dict[str, tuple[Ratio, Ratio]]
    ) -> None:
        times = "".join(
            f"{latency[p].p50:14.4f}" if p in latency else f"{'-':>14}" for p in COLUMNS
        )
        percent = ""
        if self._copy:
            seconds = latency["mixflow_fast"].p50 * 1e-3
            percent = f"{100 * cell.algorithmic_bytes / seconds / self._copy:.0f}%"
        wins = ", ".join(
            ("" if provider in COLUMNS else f"{provider} {latency[provider].p50:.4f} ms ")
            + f"{device.p50:.2f}x [{device.low95:.2f}, {device.high95:.2f}] / {wall.p50:.2f}x"
            for provider, (device, wall) in ratios.items()
        )
        print(f"{cell.label:64}{times}{percent:>9}  {wins}", flush=True)
