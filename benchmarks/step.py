"""One training step of SiT-XL/2 at 256 px, from latents on the device to updated EMA weights.

| provider     | network and precision          | objective      | optimizer, EMA, host          |
|--------------|--------------------------------|----------------|-------------------------------|
| eager_tf32   | eager, float32 with TF32       | plain lines    | AdamW, EMA in a Python loop,  |
|              |                                |                | `loss.item()` every step      |
| eager_bf16   | eager, bf16 autocast           | plain lines    | the same                      |
| compile      | compiled blocks, bf16 autocast | compiled lines | fused AdamW, foreach EMA      |
| mixflow_fast | the same                       | MixFlow        | AdamWEMA (with gradient norm) |

Every arm trains the same float32 weights; bf16 means autocast over them. Blocks are compiled one
by one with mode "default". All arms of a batch size take turns in one process. A batch that does
not fit is accumulated from halves, quarters, ... and the row says so.

Model FLOPs per image: forward 24 N D^2 + 4 N^2 D + 12 D^2 a block (N tokens, width D) and the ends;
training three times that, less the gradients of latents and sinusoid, which nobody needs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.deadline import Deadline, Expectation
from benchmarks.device import in_short
from benchmarks.providers import GAMMA, interpolate, prepare, velocity_loss
from benchmarks.rows import Writer
from benchmarks.stats import Percentiles, paired_ratio, percentiles
from mixflow_fast import MixFlow
from mixflow_fast.models import SiT
from mixflow_fast.optim import AdamWEMA

BATCHES = (32, 256)
XL = dict(input_size=32, patch_size=2, hidden_size=1152, depth=28, num_heads=16, num_classes=1000)
TOY = dict(input_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
LR, DECAY = 1e-4, 0.9999
# Dense bf16 peak of H100 and H200 SXM, TFLOP/s.
PEAK_TFLOPS = 989.4
ARMS = {
    "eager_tf32": "eager, float32 with TF32, AdamW, Python EMA, loss.item() every step",
    "eager_bf16": "eager, bf16 autocast, AdamW, Python EMA, loss.item() every step",
    "compile": "blocks compiled (mode=default), bf16 autocast, fused AdamW, foreach EMA",
    "mixflow_fast": "the same network as compile, MixFlow objective, AdamWEMA",
}
ROUNDS, LEAST_ROUNDS, ROUND_SECONDS = 10, 5, 0.5

Draws = tuple[Tensor, Tensor, Tensor]


def train_flops(net: SiT) -> float:
    """Model FLOPs (two a multiply-add) per image and training step, see the module's docstring."""
    c = net.config
    N, D = (c["input_size"] // c["patch_size"]) ** 2, c["hidden_size"]
    area = c["patch_size"] ** 2
    mlp = 4 * N * D * int(D * c["mlp_ratio"])
    block = 8 * N * D * D + mlp + 4 * N * N * D + 12 * D * D
    embed = 2 * N * area * c["in_channels"] * D
    final = 2 * N * D * area * net.out_channels + 4 * D * D
    first_of_times, second_of_times = 2 * 256 * D, 2 * D * D
    forward = c["depth"] * block + embed + final + first_of_times + second_of_times
    return 3 * forward - embed - first_of_times


class PlainState:
    """torch's AdamW and an EMA, as most trainers hold them."""

    def __init__(self, params: list[Tensor], fused: bool) -> None:
        self._params = params
        self._fused = fused
        self._optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=fused or None)
        self.state = self._optimizer.state
        self.ema = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self) -> None:
        self._optimizer.step()
        if self._fused:
            torch._foreach_lerp_(self.ema, self._params, 1 - DECAY)
        else:
            for ema, p in zip(self.ema, self._params, strict=True):
                ema.mul_(DECAY).add_(p, alpha=1 - DECAY)


def _state_bytes(optimizer: PlainState | AdamWEMA) -> int:
    """Bytes of moments and EMA."""
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    if isinstance(optimizer, PlainState):
        tensors += optimizer.ema
    return sum(v.nbytes for v in tensors if isinstance(v, Tensor))


@dataclass
class Arm:
    """One provider's training step.

    Attributes:
        loss: (rows, draws or None) -> mean loss of these rows of the batch.
        optimizer: with the EMA; two arms may share one.
        reads_loss: `loss.item()` each step.
        micro: samples that a backward pass takes.
    """

    name: str
    loss: Callable[[slice, Draws | None], Tensor]
    optimizer: PlainState | AdamWEMA
    reads_loss: bool
    micro: int
    params: list[Tensor]
    batch: int

    def _parts(self) -> Iterator[tuple[slice, float]]:
        """The micro-batches with their shares of the batch."""
        for first in range(0, self.batch, self.micro):
            rows = slice(first, min(first + self.micro, self.batch))
            yield rows, (rows.stop - rows.start) / self.batch

    def step(self) -> None:
        """One step on the whole batch; gradients are gone afterwards."""
        for rows, share in self._parts():
            loss = self.loss(rows, None)
            (loss * share).backward()
        self.optimizer.step()
        for p in self.params:
            p.grad = None
        if self.reads_loss:
            loss.item()

    def loss_of(self, draws: Draws) -> float:
        """The batch's loss with given noise and times; in the graph that training compiled."""
        return sum(self.loss(rows, draws).item() * share for rows, share in self._parts())


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

    def run(self) -> None:
        """Every batch size in turn, as far as the deadline goes."""
        if not self._smoke:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        expectation = Expectation(first=90.0 if self._on_gpu else 2.0, margin=1.0)
        for batch in (4,) if self._smoke else BATCHES:
            label = f"step {'toy SiT' if self._smoke else 'SiT-XL/2-256'} B={batch}"
            if self._deadline.fits(label, expectation.seconds()):
                start = self._deadline.spent()
                try:
                    self._cell(batch, label)
                except Exception as error:  # rows that are written stay; the next batch may run
                    self.refused.append(f"{label}: {in_short(error)}")
                    print(self.refused[-1], flush=True)
                expectation.saw(self._deadline.spent() - start)

    def _network(self) -> SiT:
        torch.manual_seed(0)
        with self._device:
            net = SiT(**(TOY if self._smoke else XL))
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:  # adaLN-zero would multiply by zeros
                    p.add_(torch.randn_like(p), alpha=0.02)
        return net.train()

    def _cell(self, batch: int, label: str) -> None:
        self._clear()
        net = self._network()
        params = [p for p in net.parameters() if p.requires_grad]
        side = net.input_size
        x1 = torch.randn(batch, 4, side, side, device=self._device)
        y = torch.randint(net.num_classes, (batch,), device=self._device)
        ids = torch.arange(batch, device=self._device)
        losses = self._losses(net, x1, y, ids)
        plain = PlainState(params, fused=False)
        optimizers = {
            "eager_tf32": plain,
            "eager_bf16": plain,
            "compile": PlainState(params, fused=True) if "compile" in losses else None,
            "mixflow_fast": AdamWEMA(params, lr=LR, ema_decay=DECAY),
        }
        arms: dict[str, Arm] = {}
        shape = list(x1.shape)
        for name in ARMS:
            if name not in losses:
                self._add(name, shape, "latency_ms", None, note="compile left out in a smoke run")
                continue
            reads = name.startswith("eager")
            arm = Arm(name, losses[name], optimizers[name], reads, batch, params, batch)
            try:
                self._warm(arm)
            except Exception as error:
                text = in_short(error)
                self._add(name, shape, "latency_ms", None, note=text)
                print(f"{label} {name}: {text}", flush=True)
                if name == "mixflow_fast":
                    self.refused.append(f"{label}: {text}")
                    return
                for p in params:
                    p.grad = None
                continue
            arms[name] = arm
        wrong = self._compare(arms, x1)
        if wrong:
            self.refused.append(label)
            print(f"{label}: RED, no speed:", *wrong, sep="\n  ", flush=True)
            return
        self._report(label, shape, arms, self._rounds(arms), train_flops(net))

    def _losses(
        self, net: SiT, x1: Tensor, y: Tensor, ids: Tensor
    ) -> dict[str, Callable[[slice, Draws | None], Tensor]]:
        """Each provider's loss. Draws (x0, t, m of the whole batch) take the place of its own."""
        eager_blocks = net.blocks
        kind = self._device.type

        def plain(
            blocks: nn.ModuleList,
            half: bool,
            prepare_fn: Callable[..., Any] = prepare,
            loss_fn: Callable[..., Tensor] = velocity_loss,
        ) -> Callable[[slice, Draws | None], Tensor]:
            def loss(rows: slice, draws: Draws | None) -> Tensor:
                data = x1[rows]
                if draws is None:
                    x, t, _, x0 = prepare_fn(data, GAMMA)
                else:
                    x0, t, m = (value[rows] for value in draws)
                    x = interpolate(data, x0, m)
                net.blocks = blocks
                with torch.autocast(kind, torch.bfloat16) if half else nullcontext():
                    pred = net(x, t, y[rows])
                return loss_fn(pred, data, x0)

            return loss

        def ours(blocks: nn.ModuleList) -> Callable[[slice, Draws | None], Tensor]:
            objective = MixFlow(gamma=GAMMA, clock=net.clock, impl=self._impl)

            def loss(rows: slice, draws: Draws | None) -> Tensor:
                if draws is None:
                    it = objective.prepare(x1[rows], ids=ids[rows])
                    ids[rows].add_(len(ids))
                else:
                    x0, t, m = (value[rows] for value in draws)
                    it = objective.prepare(x1[rows], x0=x0, t=t, slowed_t=m)
                net.blocks = blocks
                with torch.autocast(kind, torch.bfloat16):
                    pred = net(it.x, it.t, y[rows])
                return objective.loss(pred, it)

            return loss

        losses = {"eager_tf32": plain(eager_blocks, False), "eager_bf16": plain(eager_blocks, True)}
        if not self._on_gpu:
            return losses | {"mixflow_fast": ours(eager_blocks)}
        torch._dynamo.config.recompile_limit = 256
        compiled_blocks = nn.ModuleList(torch.compile(b, dynamic=False) for b in eager_blocks)
        functions = (torch.compile(f, dynamic=False) for f in (prepare, velocity_loss))
        losses["compile"] = plain(compiled_blocks, True, *functions)
        return losses | {"mixflow_fast": ours(compiled_blocks)}

    def _warm(self, arm: Arm) -> None:
        """Two steps; the micro-batch is halved until they fit the device's memory."""
        while True:
            self._clear()
            try:
                for _ in range(2):
                    arm.step()
                return
            except torch.OutOfMemoryError:
                for p in arm.params:
                    p.grad = None
                if arm.micro == 1:
                    raise
                arm.micro //= 2

    def _compare(self, arms: dict[str, Arm], x1: Tensor) -> list[str]:
        """Given the same noise and times, all arms have the same loss up to their precision."""
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
        return wrong

    def _rounds(self, arms: dict[str, Arm]) -> dict[str, list[float]]:
        """Milliseconds per step of each arm and round, the arms taking turns."""
        steps, times = {}, {name: [] for name in arms}
        for name, arm in arms.items():
            each = timing.wall_ms(arm.step, 1, self._device) * 1e-3
            steps[name] = 1 if self._smoke else max(1, round(ROUND_SECONDS / each))
        names = list(arms)
        rounds = 3 if self._smoke else ROUNDS
        for number in range(timing.WARM_ROUNDS + rounds):
            enough = number >= timing.WARM_ROUNDS + LEAST_ROUNDS
            if enough and self._deadline.left() < 15:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                ms = timing.wall_ms(arms[name].step, steps[name], self._device)
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
        print(f"\n{label}, {flops / 1e9:.1f} GFLOP an image and step")
        for name, arm in arms.items():
            note = ARMS[name]
            if arm.micro < arm.batch:
                note += f"; does not fit at once, accumulated from micro-batches of {arm.micro}"
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
                others = {id(a.optimizer): a.optimizer for a in arms.values()}
                others.pop(id(arm.optimizer))
                not_its_own = sum(map(_state_bytes, others.values())) / 2**20
                peak = timing.peak_memory_mib(arm.step, all_of_it=True) - not_its_own
                self._add_value(name, shape, "peak_memory_mib", peak, note)
                launches = timing.count_launches(arm.step)
                self._add_value(name, shape, "launches", launches, note)
                text += f" {tflops.p50:7.1f} TFLOP/s {percent.p50:5.1f}% of 989 {peak:9.0f} MiB"
                text += f" {launches or '?':>6} launches"
            print(text, flush=True)
        for name in arms:
            if name != "mixflow_fast":
                ratio = paired_ratio(times[name], times["mixflow_fast"])
                rounds = len(times[name])
                fields = {**ratio._asdict(), "note": f"per round, {rounds} rounds; {ARMS[name]}"}
                identity = self._identity("mixflow_fast", shape, f"speedup_over_{name}")
                self._writer.add(**identity, **fields, timing=self._method)
                interval = f"[{ratio.low95:.3f}, {ratio.high95:.3f}]"
                print(f"  mixflow_fast over {name}: {ratio.p50:.3f}x {interval}", flush=True)

    @property
    def _method(self) -> str:
        length = "single steps" if self._smoke else f"rounds of about {ROUND_SECONDS} s"
        return f"wall time of {length}, waited for; arms take turns"

    def _identity(self, provider: str, shape: list[int], metric: str) -> dict[str, Any]:
        dtype = "tf32" if provider == "eager_tf32" else "bfloat16"
        return dict(
            op="step", provider=provider, mode="step", metric=metric, shape=shape, dtype=dtype
        )

    def _add(
        self, provider: str, shape: list[int], metric: str, p: Percentiles | None, note: str
    ) -> None:
        values = p._asdict() if p else {"p50": None}
        identity = self._identity(provider, shape, metric)
        self._writer.add(**identity, **values, note=note, timing=self._method)

    def _add_value(
        self, provider: str, shape: list[int], metric: str, value: float | None, note: str
    ) -> None:
        self._writer.add(**self._identity(provider, shape, metric), p50=value, note=note)

    def _clear(self) -> None:
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
