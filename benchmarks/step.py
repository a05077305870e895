"""A training step from latents on the device to updated EMA weights: SiT-XL/2 and DiT-DH-XL.

The arms are those of `benchmarks/step_variants.py`. All arms of a workload take turns in one
process. A batch that does not fit is accumulated from halves, quarters, ... of it and the row says
so. The optimizers against each other are rows by themselves, op "optimizer".
"""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.providers import GAMMA
from benchmarks.rows import Deadline, Expectation, Percentiles, Writer, percentiles
from benchmarks.step_optimizers import (
    KINDS,
    STATE_BYTES,
    STEP_BYTES,
    OptimizerStep,
    Weights,
    describe_adamwema,
)
from benchmarks.step_rows import OPTIMIZER_SECONDS, ROUND_SECONDS, StepRows
from benchmarks.step_variants import (
    RECIPES,
    Arm,
    Workload,
    backends,
    make_loss,
    network,
    train_flops,
    twin,
    workloads,
)
from mixflow_fast.environment import apex_message, detect_apex
from mixflow_fast.messages import error_line

# Dense bf16 peak of H100 and H200 SXM, TFLOP/s.
PEAK_TFLOPS = 989.4
ROUNDS, LEAST_ROUNDS, WARM_ROUNDS = 6, 5, 1
# Seconds that the rows after the rounds need: memory, launches.
RESERVE = 25
# Of a prediction that is exactly right: rounding leaves 1e-14, other noise leaves 2.
EXACT = 1e-6
NO_COMPILE = "compile left out in a smoke run"
MATMUL = [8192, 8192, 8192]


class StepSuite:
    """Times the training step of each workload; arguments as `KernelSuite`."""

    def __init__(
        self,
        device: torch.device,
        writer: Writer,
        deadline: Deadline,
        impl: str = "triton",
        smoke: bool = False,
    ) -> None:
        self.refused: list[str] = []
        self._device, self._deadline, self._writer = device, deadline, writer
        self._rows = StepRows(writer, smoke)
        self._impl, self._smoke = impl, smoke
        self._not_a_speed = " (smoke run at toy sizes: not speeds)" if smoke else ""
        self._on_gpu = device.type == "cuda"
        properties = torch.cuda.get_device_properties(device) if self._on_gpu else None
        self._memory: float = properties.total_memory if properties else math.inf
        self._matmul: float | None = None
        self._to_count: tuple[Workload, list[int], dict[str, Arm]] | None = None
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
        slowness = Expectation(first=1.0, margin=1.0, last=1, cap=2.0)
        for workload in workloads(self._smoke):
            if self._deadline.fits(workload.label, slowness.seconds() * workload.seconds):
                start = self._deadline.spent()
                try:
                    self._cell(workload)
                except Exception as error:  # rows that are written stay; the next one may run
                    self.refused.append(f"{workload.label}: {error_line(error)}")
                    print(self.refused[-1], flush=True)
                slowness.saw((self._deadline.spent() - start) / workload.seconds)
        # The profiler slows what is timed after it.
        if self._on_gpu and self._to_count:
            self._write_launches(*self._to_count)

    def _cell(self, workload: Workload) -> None:
        if workload.details:  # its arms are as good, and two sets of them take much memory
            self._to_count = None
        self._clear()
        net = network(workload, self._device)
        flops, batch = train_flops(net), workload.batch
        x1 = torch.randn(batch, net.in_channels, *2 * [net.input_size], device=self._device)
        y = torch.randint(net.num_classes, (batch,), device=self._device)
        weights, shape = Weights(net), list(x1.shape)
        arms = self._arms(workload, weights, x1, y)
        # Again when all optimizers have their states: a batch that fits must go on fitting.
        for _ in range(2):
            if not self._warm_all(workload, arms, shape):
                return
        weights.settle()
        wrong = self._compare(arms, x1)
        if wrong:
            self.refused.append(workload.label)
            print(f"{workload.label}: RED, no speed:", *wrong, sep="\n  ", flush=True)
            return
        retries = self._alloc_retries()
        times = self._rounds(arms, ROUND_SECONDS)
        if self._on_gpu:
            after = self._alloc_retries()
            print(f"{workload.label}: allocator retries {retries}, after the rounds {after}")
        # What an interrupt would hurt most comes first; the profiler slows what follows it.
        self._report(workload, shape, arms, times, flops)
        if workload.details:
            self._to_count = workload, shape, arms
            for arm in arms.values():  # most of what they hold, and others need the memory
                arm.optimizer.forget()
            if not self._has_optimizers:
                self._has_optimizers = True
                self._time_optimizers(weights)

    def _arms(self, workload: Workload, weights: Weights, x1: Tensor, y: Tensor) -> dict[str, Arm]:
        """Arms of the same recipe for the network share its twin, and what is compiled for it."""
        ids = torch.arange(len(x1), device=self._device)
        twins: dict[Any, Any] = {}
        optimizers: dict[Any, OptimizerStep] = {}
        arms: dict[str, Arm] = {}
        for name in workload.arms:
            recipe = RECIPES[name]
            if self._device.type == "cpu" and recipe.execution.mode == "compile":
                self._rows.add(workload, name, list(x1.shape), "latency_ms", None, NO_COMPILE)
                continue
            key = recipe.execution, recipe.padded, recipe.half
            if key not in twins:
                twins[key] = twin(weights.half if recipe.half else weights.single, recipe)
            kind = recipe.optimizer, recipe.half
            if kind not in optimizers:
                optimizers[kind] = OptimizerStep(recipe.optimizer, weights, recipe.half)
            loss = make_loss(recipe, twins[key], x1, y, ids, self._impl)
            parts = twins[key], optimizers[kind], weights
            arms[name] = Arm(name, recipe, loss, *parts, len(x1), len(x1))
        left = 0.92 * self._memory - _resident_bytes(weights, list(optimizers))
        for arm in arms.values():
            arm.micro = _micro_batch(workload, left, arm.recipe.half)
        return arms

    def _warm_all(self, workload: Workload, arms: dict[str, Arm], shape: list[int]) -> bool:
        """Warm every arm and drop those that fail; False if ours is one of them."""
        self._clear()
        for name, arm in list(arms.items()):
            start = self._deadline.spent()
            try:
                self._warm(arm)
            except Exception as error:
                text = error_line(error)
                self._rows.add(workload, name, shape, "latency_ms", None, text)
                print(f"{workload.label} {name}: {text}", flush=True)
                if name == "mixflow_fast":
                    self.refused.append(f"{workload.label}: {text}")
                    return False
                arm.drop_gradients()
                del arms[name]
            if self._on_gpu:
                print(f"  {name}: warm after {self._deadline.spent() - start:.1f} s", flush=True)
        return True

    def _warm(self, arm: Arm) -> None:
        """A step; the micro-batch is halved until it fits the device's memory."""
        while True:
            try:
                return arm.step()
            except torch.OutOfMemoryError:
                arm.drop_gradients()
                if arm.micro == 1:
                    raise
                arm.micro //= 2
            self._clear()

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
        ours = values["mixflow_fast"]
        for name, value in values.items():
            # The same network in the same precision, or another precision.
            allowed = 1e-2 if name == "eager_tf32" else 2e-3
            if not abs(value - ours) <= allowed * abs(value):
                wrong.append(f"{name} has loss {value:.6f} where mixflow_fast has {ours:.6f}")
        exact = arms["mixflow_fast"].exact_loss()
        if not exact < EXACT:
            wrong.append(f"mixflow_fast: loss {exact:.3g} where x1 - x0 is predicted: other noise")
        return wrong

    def _rounds(self, steppers: dict[str, Any], seconds: float) -> dict[str, list[float]]:
        """Milliseconds per step of each and each round, taking turns of about `seconds`."""
        steps, times = {}, {name: [] for name in steppers}
        for name, stepper in steppers.items():
            each = timing.wall_ms(stepper.step, 1, self._device) * 1e-3
            steps[name] = 1 if self._smoke else max(1, round(seconds / each))
        names = list(steppers)
        rounds = 3 if self._smoke else ROUNDS
        for number in range(WARM_ROUNDS + rounds):
            enough = number >= WARM_ROUNDS + LEAST_ROUNDS
            if enough and self._deadline.left() < RESERVE:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                ms = timing.wall_ms(steppers[name].step, steps[name], self._device)
                if number >= WARM_ROUNDS:
                    times[name].append(ms)
        return times

    def _report(
        self,
        workload: Workload,
        shape: list[int],
        arms: dict[str, Arm],
        times: dict[str, list[float]],
        flops: float,
    ) -> None:
        """Times and rates, then the ratios, then what takes another step: memory, idle host."""
        print(f"\n{workload.label}, {flops / 1e9:.1f} GFLOP an image and step{self._not_a_speed}")
        for name, arm in arms.items():
            note = self._note(arm)
            ms = percentiles(times[name])
            rate = Percentiles(*(arm.batch / (value * 1e-3) for value in ms[::-1]))
            self._rows.add(workload, name, shape, "latency_ms", ms, note)
            self._rows.add(workload, name, shape, "images_per_s", rate, note)
            text = f"  {name:22}{ms.p50:10.2f} ms {rate.p50:9.1f} img/s"
            if self._on_gpu:
                tflops = Percentiles(*(value * flops / 1e12 for value in rate))
                self._rows.add(workload, name, shape, "model_tflops", tflops, note)
                text += f" {tflops.p50:7.1f} TFLOP/s"
                for metric, whole in (("989", PEAK_TFLOPS), ("matmul", self._matmul)):
                    if whole:
                        percent = Percentiles(*(100 * value / whole for value in tflops))
                        self._rows.add(workload, name, shape, f"percent_of_{metric}", percent, note)
                        text += f" {percent.p50:5.1f}% of {whole:.0f} ({metric})"
            print(text, flush=True)
        notes = {name: self._note(arm) for name, arm in arms.items()}
        self._rows.write_ratios(workload, "step", shape, times, notes)
        self._rows.write_ladder(workload, shape, times, notes)
        if not self._on_gpu:
            return
        for name, arm in arms.items():
            self._clear()
            above, reserved, before = timing.peaks_mib(arm.step)
            resident = arm.resident_bytes() / 2**20
            peak, reserved = above + resident, reserved - before + resident
            idle = timing.host_idle_percent(arm.step)
            for metric, value in (
                ("peak_memory_mib", peak),
                ("peak_reserved_mib", reserved),
                ("host_idle_percent", idle),
            ):
                self._rows.add_value(workload, name, shape, metric, value, self._note(arm))
            text = f"{peak:10.0f} MiB allocated{reserved:10.0f} reserved, host idle {idle:.0f}%"
            text += f", micro-batches of {arm.micro}" if arm.micro < arm.batch else ""
            print(f"  {name:22}{text}", flush=True)

    def _write_launches(self, workload: Workload, shape: list[int], arms: dict[str, Arm]) -> None:
        for name, arm in arms.items():
            if self._deadline.left() > 5:
                arm.step()
                launches = timing.count_launches(arm.step)
                self._rows.add_value(workload, name, shape, "launches", launches, self._note(arm))
                print(f"  {name:22}{launches or '?':>10} launches, {workload.label}", flush=True)

    def _write_matmul(self) -> None:
        self._matmul = timing.matmul_tflops(MATMUL[0])
        print(f"matmul {self._matmul:.0f} TFLOP/s ({MATMUL[0]}^3, bf16), peak {PEAK_TFLOPS}")
        fields = dict(op="matmul", provider="torch", mode="forward", metric="model_tflops")
        note = "bf16 product, the denominator of percent_of_matmul"
        self._writer.add(**fields, p50=self._matmul, shape=MATMUL, dtype="bfloat16", note=note)

    def _time_optimizers(self, weights: Weights) -> None:
        """The optimizers on the float32 masters alone, gradients in place."""
        self._clear()
        kinds = {"torch": "tuned", "mixflow_fast": "adamwema"}
        steppers = {name: OptimizerStep(kind, weights, False) for name, kind in kinds.items()}
        more = {"apex": "apex", "mixflow_fast_apex": "apex_adamwema"}
        print(f"  optimizer apex: {apex_message()}{'' if self._on_gpu else ' (it runs on a GPU)'}")
        for name, kind in more.items() if self._on_gpu and detect_apex() == "nvidia" else ():
            try:
                steppers[name] = OptimizerStep(kind, weights, False)
            except Exception as error:  # without its CUDA extensions, or of another torch
                print(f"  optimizer {name}: {error_line(error)}")
                continue
            kinds[name] = kind
        for p in weights.masters:
            p.grad = torch.randn_like(p).mul_(1e-3)
        for stepper in steppers.values():
            stepper.step()
        times = self._rounds(steppers, OPTIMIZER_SECONDS)
        for p in weights.masters:
            p.grad = None
        shape = [sum(p.numel() for p in weights.masters)]
        notes = {name: KINDS[kind] for name, kind in kinds.items()}
        notes["mixflow_fast"] += f"; {describe_adamwema(weights.masters[0].device.type)}"
        for name, note in notes.items():
            ms = percentiles(times[name])
            self._rows.add(None, name, shape, "latency_ms", ms, note, op="optimizer")
            rate = Percentiles(*(STEP_BYTES * shape[0] / value / 1e6 for value in ms[::-1]))
            self._rows.add(None, name, shape, "gb_per_s", rate, note, op="optimizer")
            print(
                f"  optimizer {name:18}{ms.p50:10.2f} ms, {rate.p50:.0f} GB/s, "
                f"{shape[0] / 1e6:.1f} M parameters; {note}"
            )
        self._rows.write_ratios(None, "optimizer", shape, times, notes)

    def _note(self, arm: Arm) -> str:
        if arm.net is None:
            return arm.recipe.note
        execution = arm.net.execution
        note = replace(arm.recipe, execution=execution).note
        if execution.mode == "fused":
            note += f", attention {execution.attention}"
            if execution.attention == "auto":
                note += f": {backends(arm.net, arm.micro)}"
        if arm.micro < arm.batch:
            note += f"; does not fit at once, accumulated from micro-batches of {arm.micro}"
        return note

    def _alloc_retries(self) -> int:
        """How often the allocator had to give memory back to the driver to go on."""
        return torch.cuda.memory_stats()["num_alloc_retries"] if self._on_gpu else 0

    def _clear(self) -> None:
        if self._on_gpu:
            gc.collect()
            torch.cuda.empty_cache()


def _resident_bytes(weights: Weights, optimizers: list[tuple[str, bool]]) -> int:
    """What the arms of a workload keep between steps, all of them together, and gradients."""
    params = sum(p.numel() for p in weights.masters)
    states = sum(STATE_BYTES[kind] for kind, _ in optimizers)
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
