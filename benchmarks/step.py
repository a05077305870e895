"""A training step from latents on the device to updated EMA weights: SiT-XL/2 and DiT-DH-XL.

All arms of a workload (`benchmarks/step_variants.py`) take turns in one process.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from benchmarks import rows, timing
from benchmarks.flops import PEAK_TFLOPS, train_flops
from benchmarks.plain import GAMMA
from benchmarks.rows import CellRows, Percentiles, Times, paired_ratio, percentiles
from benchmarks.step_optimizers import KINDS, OptimizerStep, Weights, time_optimizers
from benchmarks.step_variants import (
    LADDER,
    RECIPES,
    Arm,
    Workload,
    make_loss,
    network,
    twin,
    workloads,
)
from mixflow_fast.messages import error_line
from mixflow_fast.models import Transformer

ROUND_SECONDS, OPTIMIZER_SECONDS = 0.5, 0.2
ROUNDS, LEAST_ROUNDS = 6, 5
# Seconds that the rows after the rounds need: memory, launches.
RESERVE = 25
# The loss of a prediction that is exactly right: rounding leaves 1e-14, other noise leaves 2.
EXACT = 1e-6
OURS = "mixflow_fast"
MATMUL = [8192, 8192, 8192]


class StepSuite:
    """Times the training step of each workload; `refused` are those without speeds, and why.

    The arguments are those of `KernelSuite`, and operators with wrong results (`red`): arms that
    run on them are left out.
    """

    def __init__(
        self,
        device: torch.device,
        writer: rows.Writer,
        deadline: rows.Deadline,
        impl: str = "triton",
        smoke: bool = False,
        red: Collection[str] = (),
    ) -> None:
        self.refused: list[str] = []
        self._device, self._deadline, self._writer = device, deadline, writer
        self._impl, self._smoke, self._red = impl, smoke, set(red)
        self._on_gpu = device.type == "cuda"
        self._memory = torch.cuda.mem_get_info(device)[1] if self._on_gpu else math.inf
        self._matmul: float | None = None
        self._to_count: tuple[CellRows, dict[str, Arm]] | None = None
        self._has_optimizers = False

    def run(self) -> None:
        """Every workload in turn, as far as the deadline goes, then the launches of one."""
        if not self._smoke:
            # The old names, though torch 2.9 and later warn: after the new ones (fp32_precision)
            # torch.compile fails in those versions.
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        # A step has one shape: another batch compiles anew, and not for every batch.
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 256
        if self._on_gpu:
            self._write_matmul()
        # Of the estimates: compilation takes most of the time, and twice as much on other machines.
        slowness = rows.Expectation(first=1.0, margin=1.0, last=1, cap=2.0)
        for workload in workloads(self._smoke):
            if self._deadline.fits(workload.label, slowness.seconds() * workload.seconds):
                start = self._deadline.spent()
                try:
                    self._measure(workload)
                except Exception as error:  # rows that are written stay; the next one may run
                    self._refuse(workload, error_line(error))
                slowness.saw((self._deadline.spent() - start) / workload.seconds)
        # The profiler slows what is timed after it.
        if self._on_gpu and self._to_count:
            self._write_launches(*self._to_count)

    def _cell(self, workload: Workload, shape: list[int]) -> CellRows:
        method = timing.rounds_method(self._seconds(ROUND_SECONDS))
        tf32 = {"eager_tf32": "tf32"}
        return CellRows(
            self._writer, "step", "step", workload.name, shape, "bfloat16", method, tf32
        )

    def _seconds(self, seconds: float) -> float:
        return 0.0 if self._smoke else seconds  # single steps

    def _refuse(self, workload: Workload, why: str) -> None:
        self.refused.append(f"{workload.label}: {why}")
        print(f"{workload.label}: RED, no speed: {why}", flush=True)

    def _measure(self, workload: Workload) -> None:
        if workload.details:  # its arms are as good, and two sets of them take much memory
            self._to_count = None
        self._clear()
        net = network(workload, self._device)
        flops, batch = train_flops(net), workload.batch
        x1 = torch.randn(batch, net.in_channels, *2 * [net.input_size], device=self._device)
        y = torch.randint(net.num_classes, (batch,), device=self._device)
        weights = Weights(net)
        cell = self._cell(workload, list(x1.shape))
        arms = self._arms(workload, cell, weights, x1, y)
        # Again when all optimizers have their states: a batch that fits must go on fitting.
        for _ in range(2):
            if not self._warm_all(workload, cell, arms):
                return
        weights.copy_from_masters()
        wrong = self._compare(arms, x1)
        if wrong:
            return self._refuse(workload, "; ".join(wrong))
        retries = self._alloc_retries()
        times = self._rounds({name: arm.step for name, arm in arms.items()})
        if self._on_gpu:
            after = self._alloc_retries()
            print(f"{workload.label}: allocator retries {retries}, after the rounds {after}")
        # What an interrupt would hurt most comes first; the profiler slows what follows it.
        self._report(workload, cell, arms, times, flops)
        if workload.details:
            self._to_count = cell, arms
            for arm in arms.values():  # most of what they hold, and others need the memory
                arm.optimizer.reset()
            if not self._has_optimizers:
                self._has_optimizers = True
                self._clear()
                seconds = self._seconds(OPTIMIZER_SECONDS)
                time_optimizers(weights, self._writer, self._rounds, seconds, self._on_gpu)

    def _arms(
        self, workload: Workload, cell: CellRows, weights: Weights, x1: Tensor, y: Tensor
    ) -> dict[str, Arm]:
        """Arms of the same recipe for the network share its twin, and what is compiled for it."""
        ids = torch.arange(len(x1), device=self._device)
        twins: dict[tuple[object, ...], Transformer] = {}
        optimizers: dict[tuple[str, bool], OptimizerStep] = {}
        arms: dict[str, Arm] = {}
        for name in workload.arms:
            recipe = RECIPES[name]
            if why := self._left_out(name, workload):
                cell.add(name, "latency_ms", None, why)
                continue
            key = recipe.execution, recipe.padded, recipe.half
            if key not in twins:
                twins[key] = twin(weights.half if recipe.half else weights.single, recipe)
            kind = recipe.optimizer, recipe.half
            if kind not in optimizers:
                optimizers[kind] = OptimizerStep(recipe.optimizer, weights, recipe.half)
            net, batch = twins[key], len(x1)
            loss = make_loss(recipe, net, x1, y, ids, self._impl)
            arms[name] = Arm(name, recipe, loss, net, optimizers[kind], weights, batch, batch)
        left = 0.92 * self._memory - _resident_bytes(weights, list(optimizers))
        for arm in arms.values():
            arm.micro = _micro_batch(workload, left, arm.recipe.half)
        return arms

    def _left_out(self, name: str, workload: Workload) -> str:
        """Why an arm is not measured here, or an empty string."""
        red = sorted(RECIPES[name].ops(workload.network) & self._red)
        if red:
            print(f"{workload.label} {name}: no speed, {', '.join(red)} is RED", flush=True)
            return f"left out: wrong results of {', '.join(red)} on this device"
        if self._device.type == "cpu" and RECIPES[name].execution.mode == "compile":
            return "compile left out in a smoke run"
        return ""

    def _warm_all(self, workload: Workload, cell: CellRows, arms: dict[str, Arm]) -> bool:
        """Warm every arm and drop those that fail; False if ours is one of them."""
        self._clear()
        for name, arm in list(arms.items()):
            start = self._deadline.spent()
            try:
                arm.warm(self._clear)
            except Exception as error:
                text = error_line(error)
                cell.add(name, "latency_ms", None, text)
                print(f"{workload.label} {name}: {text}", flush=True)
                if name == OURS:
                    self._refuse(workload, text)
                    return False
                arm.drop_gradients()
                del arms[name]
            if self._on_gpu:
                print(f"  {name}: warm after {self._deadline.spent() - start:.1f} s", flush=True)
        return bool(arms)

    def _compare(self, arms: dict[str, Arm], x1: Tensor) -> list[str]:
        """What is wrong with the losses.

        Given the same noise and times, all arms have the same loss up to their precision. And
        drawing for itself as it does in training, ours has none for the right prediction.
        """
        x0 = torch.randn_like(x1)
        t = torch.rand(len(x1), device=x1.device).sqrt()
        draws = x0, t, t * (1 - GAMMA * torch.rand_like(t))
        values = {name: arm.loss_of(draws) for name, arm in arms.items()}
        wrong = [f"{name}: loss {v}" for name, v in values.items() if not math.isfinite(v)]
        # Without ours, whose operators were red, the others are compared among themselves.
        first = OURS if OURS in arms else list(arms)[-1]
        for name, value in values.items():
            # The same network in the same precision, or another precision.
            allowed = 1e-2 if "eager_tf32" in (name, first) else 2e-3
            if not abs(value - values[first]) <= allowed * abs(value):
                wrong.append(f"{name} has loss {value:.6f} where {first} has {values[first]:.6f}")
        if OURS in arms:
            exact = arms[OURS].exact_loss()
            if not exact < EXACT:
                wrong.append(f"{OURS}: loss {exact:.3g} where x1 - x0 is predicted: other noise")
        return wrong

    def _rounds(
        self, calls: Mapping[str, timing.Call], seconds: float | None = None
    ) -> dict[str, list[float]]:
        """Times of one step of each, in turns of about `seconds`."""

        def enough(done: int) -> bool:
            return done >= LEAST_ROUNDS and self._deadline.left() < RESERVE

        length = self._seconds(ROUND_SECONDS if seconds is None else seconds)
        rounds = 3 if self._smoke else ROUNDS
        return timing.rounds_ms(calls, self._device, length, rounds, enough)

    def _report(
        self, workload: Workload, cell: CellRows, arms: dict[str, Arm], times: Times, flops: float
    ) -> None:
        """Times and rates, then the ratios, then what takes another step: memory, idle host."""
        toy = " (smoke run at toy sizes: not speeds)" if self._smoke else ""
        print(f"\n{workload.label}, {flops / 1e9:.1f} GFLOP an image and step{toy}")
        notes = {name: arm.note for name, arm in arms.items()}
        for name, arm in arms.items():
            ms = percentiles(times[name])
            images = ms.rate(arm.batch * 1e3)
            cell.add(name, "latency_ms", ms, notes[name])
            cell.add(name, "images_per_s", images, notes[name])
            text = f"  {name:22}{ms.p50:10.2f} ms {images.p50:9.1f} img/s"
            if self._on_gpu:
                text += self._report_flops(cell, name, images.times(flops / 1e12), notes[name])
            print(text, flush=True)
        cell.add_ratios(OURS, times, notes)
        add_ladder(cell, times, notes)
        for name, arm in arms.items() if self._on_gpu else ():
            self._clear()
            above, reserved, before = timing.peaks_mib(arm.step)
            resident = arm.resident_bytes() / 2**20
            peak, reserved = above + resident, reserved - before + resident
            idle = timing.host_idle_percent(arm.step)
            cell.add(name, "peak_memory_mib", peak, notes[name], timed=False)
            cell.add(name, "peak_reserved_mib", reserved, notes[name], timed=False)
            cell.add(name, "host_idle_percent", idle, notes[name], timed=False)
            text = f"{peak:10.0f} MiB allocated{reserved:10.0f} reserved, host idle {idle:.0f}%"
            text += f", micro-batches of {arm.micro}" if arm.micro < arm.batch else ""
            print(f"  {name:22}{text}", flush=True)

    def _report_flops(self, cell: CellRows, name: str, tflops: Percentiles, note: str) -> str:
        """Rows of the model FLOPs, and what is printed of them."""
        cell.add(name, "model_tflops", tflops, note)
        text = f" {tflops.p50:7.1f} TFLOP/s"
        for metric, whole in (("989", PEAK_TFLOPS), ("matmul", self._matmul)):
            if whole:
                percent = tflops.times(100 / whole)
                cell.add(name, f"percent_of_{metric}", percent, note)
                text += f" {percent.p50:5.1f}% of {whole:.0f} ({metric})"
        return text

    def _write_launches(self, cell: CellRows, arms: dict[str, Arm]) -> None:
        for name, arm in arms.items():
            if self._deadline.left() > 5:
                arm.step()
                launches = timing.count_launches(arm.step)
                cell.add(name, "launches", launches, arm.note, timed=False)
                print(f"  {name:22}{launches or '?':>10} launches, {cell.label}", flush=True)

    def _write_matmul(self) -> None:
        self._matmul = timing.matmul_tflops(MATMUL[0])
        print(f"matmul {self._matmul:.0f} TFLOP/s ({MATMUL[0]}^3, bf16), peak {PEAK_TFLOPS}")
        fields = dict(op="matmul", provider="torch", mode="forward", metric="model_tflops")
        note = "bf16 product, the denominator of percent_of_matmul"
        self._writer.add(**fields, p50=self._matmul, shape=MATMUL, dtype="bfloat16", note=note)

    def _alloc_retries(self) -> int:
        """How often the allocator had to give memory back to the driver to go on."""
        return torch.cuda.memory_stats()["num_alloc_retries"] if self._on_gpu else 0

    def _clear(self) -> None:
        if self._on_gpu:
            gc.collect()
            torch.cuda.empty_cache()


def add_ladder(cell: CellRows, times: Times, notes: Mapping[str, str]) -> None:
    """Each row of the ladder over the row before and over the first: what pays."""
    rungs = [name for name in LADDER if name in times]
    if len(rungs) < 4:
        return
    print(f"  step by step, {cell.label}: over the row before [95%], over the first")
    for before, name in zip([rungs[0], *rungs], rungs, strict=False):
        ratio, whole = (paired_ratio(times[n], times[name]) for n in (before, rungs[0]))
        if name not in (before, OURS):
            cell.add_ratio(name, before, ratio, notes[before])
        # Rows between the two may be left out.
        last = LADDER.index(name)
        added = LADDER[min(LADDER.index(before) + 1, last) : last + 1]
        adds = ", ".join(RECIPES[step].adds for step in added)
        print(f"  + {adds:40} {name:22} {ratio}  {whole.p50:.2f}x")


def _resident_bytes(weights: Weights, optimizers: list[tuple[str, bool]]) -> int:
    """What the arms of a workload keep between steps, all of them together, and gradients."""
    params = sum(p.numel() for p in weights.masters)
    states = sum(KINDS[kind].state_bytes for kind, _ in optimizers)
    # Masters, bf16 weights, EMA; gradients of either.
    return params * (4 + 2 + 4 + 6 + states)


def _micro_batch(workload: Workload, left: float, half: bool) -> int:
    """The batch, or the largest half, quarter, ... of it whose activations fit what is left.

    By estimate, the same for all arms of a precision: they are to be compared, and a batch that
    turns out too large has been compiled for nothing.
    """
    micro, image = workload.batch, workload.image_gb * 1e9 * (1 if half else 2)
    while micro > 1 and micro * image > left:
        micro = (micro + 1) // 2
    return micro
