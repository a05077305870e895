"""The kernel suite: every cell is verified at its own shape and only then timed."""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks import block_providers, timing
from benchmarks.block_ops import BlockCase
from benchmarks.cases import Case
from benchmarks.providers import Call, Compiler, make_inputs, mixflow_call, plain_call
from benchmarks.rows import (
    Deadline,
    Expectation,
    Percentiles,
    Ratio,
    Writer,
    paired_ratio,
    percentiles,
)
from benchmarks.verify import verify
from mixflow_fast.messages import error_line

# Columns of the table; others follow in the same line.
COLUMNS = ("eager", "compile", "mixflow_fast")
AnyCase = Case | BlockCase
NO_COMPILE = "left out in a smoke run: the first C++ compilation takes most of a minute"


class KernelSuite:
    """Times the kernel cells on one device.

    Args:
        device: where.
        writer: takes the rows.
        deadline: cells that would not fit are left out.
        impl: of `MixFlow`; a smoke run on the CPU times the reference.
        smoke: few rounds, and `compile` is left out.

    Attributes:
        refused: cells without a speed because something in them was wrong.
    """

    def __init__(
        self,
        device: torch.device,
        writer: Writer,
        deadline: Deadline,
        impl: str = "triton",
        smoke: bool = False,
    ) -> None:
        self.refused: list[str] = []
        self._device, self._writer, self._deadline = device, writer, deadline
        self._impl, self._smoke = impl, smoke
        self._on_gpu = device.type == "cuda"
        self._timer = timing.CudaTimer() if self._on_gpu else None
        self._compiler = Compiler(self._timer.quick_ms) if self._timer else None
        self._to_count: list[tuple[AnyCase, str, str]] = []
        self._copy = timing.copy_bandwidth(self._timer) if self._timer else None
        if self._copy:
            print(f"copy bandwidth {self._copy / 1e9:.0f} GB/s (1 GiB, read plus written)")

    def run(self, cases: list[AnyCase]) -> None:
        """Every case in turn, as far as the deadline goes, then the launches of those timed."""
        self._print_head()
        expectation = Expectation(first=20.0 if self._on_gpu else 1.0, cap=20.0)
        for number, case in enumerate(cases):
            if self._deadline.fits(case.label, expectation.seconds()):
                start = self._deadline.spent()
                try:
                    self._cell(case)
                except Exception as error:  # the other cells are worth having
                    self.refused.append(f"{case.label}: {error_line(error)}")
                    print(self.refused[-1], flush=True)
                expectation.saw(self._deadline.spent() - start)
            if number == 0 and self._on_gpu:
                # What the compilers leave behind makes every later collection a quarter second.
                gc.collect()
                gc.freeze()
        # The profiler slows what is timed after it.
        for case, provider, note in self._to_count:
            if self._deadline.left() > 2:
                try:
                    self._write_launches(case, provider, note)
                except Exception as error:  # the other counts are worth having
                    print(f"{case.label} {provider}: no launches: {error_line(error)}", flush=True)

    def _inputs(self, case: AnyCase) -> Any:
        make = block_providers.make_inputs if isinstance(case, BlockCase) else make_inputs
        return make(case, self._device)

    def _call(self, provider: str, case: AnyCase, inputs: Any) -> tuple[Call, str]:
        """The provider's call, and a sentence that says how it was set up."""
        block = isinstance(case, BlockCase)
        plain = block_providers.plain_call if block else plain_call
        if provider == "compile":
            return self._compiler.call(case, inputs, plain)
        if provider == "eager":
            return plain(case, inputs), "plain PyTorch lines"
        if not block:
            return mixflow_call(case, inputs, self._impl), f"MixFlow(impl={self._impl!r})"
        if provider == "mixflow_fast":
            call = block_providers.mixflow_call(case, inputs, self._impl)
            return call, block_providers.note(case, inputs, self._impl)
        return block_providers.other_call(provider, case, inputs, self._impl)

    @staticmethod
    def _wrong(provider: str, case: AnyCase, inputs: Any, made: dict[str, Any]) -> list[str]:
        if isinstance(case, BlockCase):
            found = block_providers.verify(case, inputs, made, provider)
        else:
            found = verify(case, inputs, made)
        return [f"{provider}: {line}" for line in found]

    def _cell(self, case: AnyCase) -> None:
        if self._on_gpu:
            torch.cuda.empty_cache()
        inputs = self._inputs(case)
        calls: dict[str, Call] = {}
        notes: dict[str, str] = {}
        missing: dict[str, str] = {}
        wrong: list[str] = []
        for provider in case.providers:
            if provider == "compile" and self._compiler is None:
                missing[provider] = NO_COMPILE
                continue
            try:
                call, notes[provider] = self._call(provider, case, inputs)
                found = self._wrong(provider, case, inputs, call())
                if found and provider not in COLUMNS:  # no reason to leave out the others
                    raise block_providers.NotThere(f"wrong result: {', '.join(found)}")
                wrong += found
            except block_providers.NotThere as error:
                missing[provider] = str(error)
            except Exception as error:
                text = error_line(error)
                if provider == "mixflow_fast":
                    wrong.append(f"{provider}: {text}")
                missing[provider] = text
            else:
                calls[provider] = call
        for provider, why in missing.items():
            self._add(case, provider, "latency_ms", None, note=why)
            if why != NO_COMPILE:
                print(f"{case.label}: without {provider}: {why}", flush=True)
        if wrong:
            self.refused.append(case.label)
            print(f"{case.label}: RED, no speed:", *wrong, sep="\n  ", flush=True)
            return
        if isinstance(case, BlockCase):
            inputs.scratch.clear()
        rounds = 3 if self._smoke else 8
        timed = timing.measure(calls, self._device, self._timer, rounds)
        latency = self._write_times(case, timed, notes)
        ratios = self._write_ratios(case, timed, notes)
        self._print_line(case, latency, ratios)
        if self._on_gpu:
            for provider, call in calls.items():
                peak = timing.peak_memory_mib(call)
                self._add_value(case, provider, "peak_memory_mib", peak, note=notes[provider])
                self._to_count.append((case, provider, notes[provider]))

    def _write_launches(self, case: AnyCase, provider: str, note: str) -> None:
        call, _ = self._call(provider, case, self._inputs(case))
        call()
        launches = timing.count_launches(call)
        why = note if launches else f"{note}; the profiler saw no device activity"
        self._add_value(case, provider, "launches", launches, note=why)

    def _write_times(
        self, case: AnyCase, timed: timing.Timing, notes: dict[str, str]
    ) -> dict[str, Percentiles]:
        """The rows of each provider; returns their latencies."""
        latency = {}
        for provider, rounds in timed.rounds.items():
            note, method = notes[provider], timed.method
            latency[provider] = p = percentiles([value for each in rounds for value in each])
            self._add(case, provider, "latency_ms", p, note=note, timing=method)
            wall = percentiles(timed.wall[provider])
            how = f"wall time per call of {timing.WALL_CALLS}" if self._on_gpu else method
            self._add(case, provider, "call_ms", wall, note=note, timing=how)
            if not self._on_gpu:
                continue
            # The fast percentile of a time is the high one of a rate.
            rate = Percentiles(*(case.algorithmic_bytes / (ms * 1e6) for ms in p[::-1]))
            percent = Percentiles(*(100 * gb * 1e9 / self._copy for gb in rate))
            self._add(case, provider, "gb_per_s", rate, note=note, timing=method)
            self._add(case, provider, "percent_of_copy", percent, note=note, timing=method)
            if case.flops:
                tflops = Percentiles(*(case.flops / (ms * 1e9) for ms in p[::-1]))
                self._add(case, provider, "model_tflops", tflops, note=note, timing=method)
        return latency

    def _write_ratios(
        self, case: AnyCase, timed: timing.Timing, notes: dict[str, str]
    ) -> dict[str, tuple[Ratio, Ratio]]:
        """The rows of ours against each other provider; returns those of latency_ms and call_ms."""
        medians = {
            provider: [percentiles(each).p50 for each in rounds]
            for provider, rounds in timed.rounds.items()
        }
        ratios = {}
        for provider in case.providers:  # the rounds turn their order
            if provider == "mixflow_fast" or provider not in timed.rounds:
                continue
            note = f"per round, {len(medians[provider])} rounds; against {notes[provider]}"
            ratios[provider] = tuple(
                paired_ratio(times[provider], times["mixflow_fast"])
                for times in (medians, timed.wall)
            )
            for prefix, ratio in zip(("", "call_"), ratios[provider], strict=True):
                identity = self._identity(case, "mixflow_fast", f"{prefix}speedup_over_{provider}")
                self._writer.add(**identity, **ratio._asdict(), timing=timed.method, note=note)
        return ratios

    @staticmethod
    def _identity(case: AnyCase, provider: str, metric: str) -> dict[str, object]:
        return {
            "op": case.op,
            "provider": provider,
            "mode": case.mode,
            "variant": case.variant,
            "metric": metric,
            "shape": list(case.shape),
            "dtype": case.dtype_name,
        }

    def _add(
        self, case: AnyCase, provider: str, metric: str, p: Percentiles | None, **fields: str
    ) -> None:
        values = p._asdict() if p else {"p50": None}
        self._writer.add(**self._identity(case, provider, metric), **values, **fields)

    def _add_value(
        self, case: AnyCase, provider: str, metric: str, value: float | None, note: str
    ) -> None:
        self._writer.add(**self._identity(case, provider, metric), p50=value, note=note)

    def _print_head(self) -> None:
        heads = "".join(f"{provider:>14}" for provider in COLUMNS)
        print(
            f"\nlatency p50 in ms{'':47}{heads}  of copy  ours against eager, compile and others: "
            "on the device [95%] / by the wall clock of a call from Python"
            + (" (smoke run at toy sizes: not speeds)" if self._smoke else "")
        )

    def _print_line(
        self,
        case: AnyCase,
        latency: dict[str, Percentiles],
        ratios: dict[str, tuple[Ratio, Ratio]],
    ) -> None:
        times = "".join(
            f"{latency[p].p50:14.4f}" if p in latency else f"{'-':>14}" for p in COLUMNS
        )
        percent = ""
        if self._copy:
            seconds = latency["mixflow_fast"].p50 * 1e-3
            percent = f"{100 * case.algorithmic_bytes / seconds / self._copy:.0f}%"
        wins = ", ".join(
            ("" if provider in COLUMNS else f"{provider} {latency[provider].p50:.4f} ms ")
            + f"{device.p50:.2f}x [{device.low95:.2f}, {device.high95:.2f}] / {wall.p50:.2f}x"
            for provider, (device, wall) in ratios.items()
        )
        print(f"{case.label:64}{times}{percent:>9}  {wins}", flush=True)
