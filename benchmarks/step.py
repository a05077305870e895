"""One training step of SiT-XL/2 at 256 px, from latents on the device to updated EMA weights.

The arms are those of `benchmarks/arms.py`. All arms of a batch size take turns in one process. A
batch that does not fit is accumulated from halves, quarters, ... and the row says so. Our own
optimizer against the tuned one of torch is a row by itself, op "optimizer".
"""

from __future__ import annotations

import gc
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.arms import ARMS, Arm, PlainState, losses, network, our_optimizer, train_flops
from benchmarks.deadline import Deadline, Expectation
from benchmarks.device import in_short
from benchmarks.providers import GAMMA
from benchmarks.rows import Writer
from benchmarks.stats import Percentiles, paired_ratio, percentiles

BATCHES = (32, 256)
# Dense bf16 peak of H100 and H200 SXM, TFLOP/s.
PEAK_TFLOPS = 989.4
ROUNDS, LEAST_ROUNDS, ROUND_SECONDS = 8, 5, 0.5
OPTIMIZER_SECONDS = 0.2
# Seconds that the rows after the rounds need: memory, launches.
RESERVE = 25
# Of a prediction that is exactly right: rounding leaves 1e-14, other noise leaves 2.
EXACT = 1e-6
OPTIMIZERS = {
    "torch": "fused AdamW and foreach EMA",
    "mixflow_fast": "AdamWEMA, with the gradient norm",
}


class StepSuite:
    """Times the training step at each batch size; arguments as `KernelSuite`."""

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
        self._batches = (4,) if smoke else BATCHES

    def run(self) -> None:
        """Every batch size in turn, as far as the deadline goes."""
        if not self._smoke:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        expectation = Expectation(first=90.0 if self._on_gpu else 2.0, margin=1.0)
        for batch in self._batches:
            label = f"step {'toy SiT' if self._smoke else 'SiT-XL/2-256'} B={batch}"
            if self._deadline.fits(label, expectation.seconds()):
                start = self._deadline.spent()
                try:
                    self._cell(batch, label)
                except Exception as error:  # rows that are written stay; the next batch may run
                    self.refused.append(f"{label}: {in_short(error)}")
                    print(self.refused[-1], flush=True)
                expectation.saw(self._deadline.spent() - start)

    def _cell(self, batch: int, label: str) -> None:
        self._clear()
        net = network(self._device, toy=self._smoke)
        params = [p for p in net.parameters() if p.requires_grad]
        side = net.input_size
        x1 = torch.randn(batch, 4, side, side, device=self._device)
        y = torch.randint(net.num_classes, (batch,), device=self._device)
        ids = torch.arange(batch, device=self._device)
        made = losses(net, x1, y, ids, self._impl)
        plain, tuned = PlainState(params, fused=False), PlainState(params, fused=self._on_gpu)
        arms: dict[str, Arm] = {}
        shape = list(x1.shape)
        for name in ARMS:
            if name not in made:
                self._add(name, shape, "latency_ms", None, note="compile left out in a smoke run")
                continue
            eager = name.startswith("eager")
            optimizer = plain if eager else tuned
            arms[name] = Arm(name, made[name], optimizer, eager, batch, params, batch)
        # Again when all optimizers have their states: a batch that fits must go on fitting.
        for steps in (2, 1):
            if not self._warm_all(arms, shape, label, steps):
                return
        wrong = self._compare(arms, x1)
        if wrong:
            self.refused.append(label)
            print(f"{label}: RED, no speed:", *wrong, sep="\n  ", flush=True)
            return
        retries = self._alloc_retries()
        times = self._rounds(arms, ROUND_SECONDS)
        if self._on_gpu:
            print(f"{label}: allocator retries {retries}, after the rounds {self._alloc_retries()}")
        # What an interrupt would hurt most comes first; the profiler slows what follows it.
        self._report(label, shape, arms, times, train_flops(net))
        if batch == self._batches[0]:
            self._time_optimizers(params, tuned)
        if self._on_gpu and batch == self._batches[-1]:
            self._write_launches(shape, arms)

    def _warm_all(self, arms: dict[str, Arm], shape: list[int], label: str, steps: int) -> bool:
        """Warm every arm and drop those that fail; False if ours is one of them."""
        self._clear()
        for name, arm in list(arms.items()):
            try:
                self._warm(arm, steps)
            except Exception as error:
                text = in_short(error)
                self._add(name, shape, "latency_ms", None, note=text)
                print(f"{label} {name}: {text}", flush=True)
                if name == "mixflow_fast":
                    self.refused.append(f"{label}: {text}")
                    return False
                arm.drop_gradients()
                del arms[name]
        return True

    def _warm(self, arm: Arm, steps: int) -> None:
        """Some steps; the micro-batch is halved until they fit the device's memory."""
        while True:
            try:
                for _ in range(steps):
                    arm.step()
                return
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
        for number in range(timing.WARM_ROUNDS + rounds):
            enough = number >= timing.WARM_ROUNDS + LEAST_ROUNDS
            if enough and self._deadline.left() < RESERVE:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                ms = timing.wall_ms(steppers[name].step, steps[name], self._device)
                if number >= timing.WARM_ROUNDS:
                    times[name].append(ms)
        return times

    def _report(
        self,
        label: str,
        shape: list[int],
        arms: dict[str, Arm],
        times: dict[str, list[float]],
        flops: float,
    ) -> None:
        """Times and rates, then the ratios, then what takes another step: memory."""
        print(f"\n{label}, {flops / 1e9:.1f} GFLOP an image and step")
        for name, arm in arms.items():
            note = self._note(arm)
            ms = percentiles(times[name])
            rate = Percentiles(*(arm.batch / (value * 1e-3) for value in ms[::-1]))
            self._add(name, shape, "latency_ms", ms, note)
            self._add(name, shape, "images_per_s", rate, note)
            text = f"  {name:13}{ms.p50:10.2f} ms {rate.p50:9.1f} img/s"
            if self._on_gpu:
                tflops = Percentiles(*(value * flops / 1e12 for value in rate))
                percent = Percentiles(*(100 * value / PEAK_TFLOPS for value in tflops))
                self._add(name, shape, "model_tflops", tflops, note)
                self._add(name, shape, "percent_of_989", percent, note)
                text += f" {tflops.p50:7.1f} TFLOP/s {percent.p50:5.1f}% of 989"
            print(text, flush=True)
        self._write_ratios("step", shape, times, {name: self._note(a) for name, a in arms.items()})
        if not self._on_gpu:
            return
        for name, arm in arms.items():
            others = {id(a.optimizer): a.optimizer for a in arms.values()}
            others.pop(id(arm.optimizer))
            not_its_own = sum(other.state_bytes() for other in others.values()) / 2**20
            peak = timing.peak_memory_mib(arm.step, all_of_it=True) - not_its_own
            self._add_value(name, shape, "peak_memory_mib", peak, self._note(arm))
            print(f"  {name:13}{peak:10.0f} MiB", flush=True)

    def _write_ratios(
        self, op: str, shape: list[int], times: dict[str, list[float]], notes: dict[str, str]
    ) -> None:
        for name in times:
            if name != "mixflow_fast":
                ratio = paired_ratio(times[name], times["mixflow_fast"])
                fields = self._identity("mixflow_fast", shape, f"speedup_over_{name}", op)
                fields["note"] = f"per round, {len(times[name])} rounds; {notes[name]}"
                self._writer.add(**fields, **ratio._asdict(), timing=self._method(op))
                text = f"{ratio.p50:.3f}x [{ratio.low95:.3f}, {ratio.high95:.3f}]"
                print(f"  {op}: mixflow_fast over {name}: {text}", flush=True)

    def _write_launches(self, shape: list[int], arms: dict[str, Arm]) -> None:
        for name, arm in arms.items():
            if self._deadline.left() > 5:
                launches = timing.count_launches(arm.step)
                self._add_value(name, shape, "launches", launches, self._note(arm))
                print(f"  {name:13}{launches or '?':>10} launches", flush=True)

    def _time_optimizers(self, params: list[Tensor], tuned: PlainState) -> None:
        """AdamWEMA's step against the optimizer that the arms share, gradients in place."""
        self._clear()
        steppers = {"torch": tuned, "mixflow_fast": our_optimizer(params)}
        for p in params:
            p.grad = torch.randn_like(p).mul_(1e-3)
        for stepper in steppers.values():
            stepper.step()
        times = self._rounds(steppers, OPTIMIZER_SECONDS)
        for p in params:
            p.grad = None
        shape = [sum(p.numel() for p in params)]
        for name in steppers:
            ms = percentiles(times[name])
            self._add(name, shape, "latency_ms", ms, OPTIMIZERS[name], op="optimizer")
            print(f"  optimizer {name:13}{ms.p50:10.2f} ms, {shape[0] / 1e6:.1f} M parameters")
        self._write_ratios("optimizer", shape, times, OPTIMIZERS)

    @staticmethod
    def _note(arm: Arm) -> str:
        note = ARMS[arm.name]
        if arm.micro < arm.batch:
            note += f"; does not fit at once, accumulated from micro-batches of {arm.micro}"
        return note

    def _method(self, op: str) -> str:
        seconds = OPTIMIZER_SECONDS if op == "optimizer" else ROUND_SECONDS
        length = "single steps" if self._smoke else f"rounds of about {seconds} s"
        return f"wall time of {length}, waited for; providers take turns"

    def _identity(
        self, provider: str, shape: list[int], metric: str, op: str = "step"
    ) -> dict[str, Any]:
        dtype = "tf32" if provider == "eager_tf32" else "bfloat16"
        dtype = "float32" if op == "optimizer" else dtype
        return dict(op=op, provider=provider, mode="step", metric=metric, shape=shape, dtype=dtype)

    def _add(
        self,
        provider: str,
        shape: list[int],
        metric: str,
        p: Percentiles | None,
        note: str,
        op: str = "step",
    ) -> None:
        values = p._asdict() if p else {"p50": None}
        identity = self._identity(provider, shape, metric, op)
        self._writer.add(**identity, **values, note=note, timing=self._method(op))

    def _add_value(
        self, provider: str, shape: list[int], metric: str, value: float | None, note: str
    ) -> None:
        self._writer.add(**self._identity(provider, shape, metric), p50=value, note=note)

    def _alloc_retries(self) -> int:
        """How often the allocator had to give memory back to the driver to go on."""
        return torch.cuda.memory_stats()["num_alloc_retries"] if self._on_gpu else 0

    def _clear(self) -> None:
        if self._on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
